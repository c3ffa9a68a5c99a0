"""What is taken for a checkpoint is, bit for bit, what DeepSpeed's own save writes, and taking it changes nothing.

DeepSpeed gives up every gathered parameter before it saves at ZeRO 3 and gathers the small ones again after; a snapshot
does not. So it is held against DeepSpeed's save in each state that parameters can be in.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import plan, recipe_file, rundir
from launcher import recipe as schema
from launcher.rundir import Attempt, Run, read_lines
from launcher.worker.pack import write_pack
from tests.worker import worlds
from tests.worker.backbones import make_wav2vec2, wav2vec2

END = 4
COMPARED = 2
"""The step after which every state is looked at; training goes on behind it."""

MOMENTS = {"0": 2, "1": 2, "2": 2, "3": 4, "3-offload": 4}

CASES = [("1", "fp32"), ("3", "fp32"), ("3-offload", "bf16")]
if os.environ.get("SPEECHCTL_TEST_SNAPSHOT"):
    CASES = [(kind, precision) for kind in MOMENTS for precision in ("fp32", "bf16")]


def prepared(root: Path, source: Path, kind: str, precision: str, saves: bool) -> Attempt:
    recipe = schema.Recipe.model_validate(
        {
            "name": "taken",
            "run_dir": root / f"{kind}-{precision}-{saves}",
            "data": {"corpus": root, "packs": root / "packs", "train": ["train-clean-100"]},
            "backbone": wav2vec2(source, freeze_feature_encoder=True).model_dump(),
            "zero_stage": int(kind[0]),
            "precision": precision,
            "max_steps": END,
            "batch": {"step_seconds": 8, "max_rank_seconds": 4},
            "optimizer": {"learning_rate": 1e-3},
            "evaluate": {"subsets": ["dev-clean"], "at_end": False, "every_steps": 100},
            "checkpoint": {"every_steps": 1 if saves else 100},
        }
    )
    run = Run(recipe.run_path)
    for folder in (run.root, run.checkpoints, run.stop_request.parent):
        folder.mkdir()
    rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
    config = plan.deepspeed_config(recipe, 1, 10**6)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100  # some stay gathered, and some do not
    if kind.endswith("offload"):
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"] |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    rundir.write_json(run.deepspeed, config)
    return run.new_attempt()


def _rank(attempts: list[str]) -> None:
    import deepspeed

    from launcher.worker import models, train
    from launcher.worker.ranks import Ranks

    torch.set_num_threads(1)

    def with_more(*arguments: Any, **options: Any) -> Any:
        model = models.build(*arguments, **options)
        model.register_buffer("kept", torch.arange(5.0))
        model.register_buffer("not_kept", torch.arange(3.0), persistent=False)
        model.again = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))  # one module by two names
        return model

    class Taking(train.Training):
        def one_step(self, *arguments: Any) -> bool:
            if self.progress.step == 0:
                frozen = [p for p in self.engine.model.parameters() if not p.requires_grad]
                with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
                    for parameter in frozen:
                        parameter.data.mul_(1.5)
            stop = super().one_step(*arguments)
            if self.recipe.checkpoint.every_steps == 1 and self.progress.step == COMPARED:
                compare(self)
            return stop

    train.build = with_more  # type: ignore[attr-defined]
    close, Ranks.close = Ranks.close, Ranks.barrier  # type: ignore[method-assign]
    for attempt in attempts:
        training = Taking(Attempt(Path(attempt)), [False], fresh=False)
        training.go()
    close(training.ranks)


def compare(training: Any) -> None:
    """Ours first, in each state; DeepSpeed's own save leaves parameters as it likes."""
    import deepspeed

    engine, ranks = training.engine, training.ranks
    parameters = list(engine.model.parameters())
    stage = engine.engine.zero_optimization_stage()
    moments: dict[str, Callable[[], Any]] = {"as the update left it": lambda: taken(engine)}

    def heard() -> Any:
        assert training.evaluator.compute(engine.infer, lambda: False) is not None
        return taken(engine)

    moments["after an evaluation"] = heard
    if stage == 3:

        def all_gathered() -> Any:
            with deepspeed.zero.GatheredParameters(parameters):
                assert all(p.numel() for p in parameters)
                return taken(engine)

        def none_gathered() -> Any:
            engine.engine.optimizer.checkpoint_event_prologue()
            assert not any(p.numel() for p in parameters)
            return taken(engine)

        moments |= {"all gathered": all_gathered, "none gathered": none_gathered}
        sizes = [p.numel() for p in parameters]
        assert any(sizes) and not all(sizes), "as the update left it, some are gathered"
    seen = {}
    for name, moment in moments.items():
        mine = moment()
        theirs = of_deepspeed(training, training.run.root / "theirs")
        assert sorted(mine) == sorted(theirs), name
        for file in mine:
            same(mine[file], theirs[file], f"{name}, rank {ranks.rank}: {file}")
        seen[name] = sorted(mine)
    (training.run.root / f"compared-{ranks.rank}.json").write_text(json.dumps(seen))


def taken(engine: Any) -> dict[str, Any]:
    """Our snapshot as it would be read from its files. It leaves every parameter where it was."""
    from launcher.worker.host_memory import HostMemory

    def places() -> list[Any]:
        parameters = engine.model.parameters()
        return [(p.data_ptr(), p.shape, str(getattr(p, "ds_status", ""))) for p in parameters]

    before = places()
    files = engine.snapshot(HostMemory(copies=True))
    assert places() == before
    read = {}
    for file in files:
        written = io.BytesIO()
        file.write(written)
        written.seek(0)
        read[file.name] = torch.load(written, weights_only=False)
    return read


def of_deepspeed(training: Any, folder: Path) -> dict[str, Any]:
    """This rank's files of DeepSpeed's own save, with nothing of ours in it."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    engine = training.engine.engine
    ours = {n: engine.__dict__.pop(n) for n in ("checkpoint_engine", "module_state_dict") if n in engine.__dict__}
    engine.checkpoint_engine = TorchCheckpointEngine(engine._config)
    try:
        engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
    finally:
        engine.__dict__.update(ours)
    rank = training.ranks.rank
    found = {
        str(path.relative_to(folder)): torch.load(path, weights_only=False)
        for path in sorted((folder / "deepspeed").iterdir())
        if f"_rank_{rank}_" in path.name or (rank == 0 and path.name.startswith("mp_rank"))
    }
    training.ranks.barrier()
    return found


def same(a: Any, b: Any, where: str) -> None:
    """Raises AssertionError where two states differ by a bit, a type, an order or a name."""
    assert type(a) is type(b), (where, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), where
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{number}]")
    elif a is not None and type(a).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]  # as a loss scaler's
        same(vars(a), vars(b), where)
    else:
        assert a == b, (where, a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Run]:
    """Every case twice: saved after every step and compared, and not saved before the end."""
    from tests.conftest import make_corpus

    root = tmp_path_factory.mktemp("taken")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    source = make_wav2vec2(root / "wav2vec2")
    attempts = {(*case, saves): prepared(root, source, *case, saves) for case in CASES for saves in (True, False)}
    worlds.start(2, _rank, [str(a.root) for a in attempts.values()])
    return {key: a.run for key, a in attempts.items()}


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_snapshot_is_what_deepspeed_would_save(runs: dict[tuple[str, str, bool], Run], case: tuple[str, str]) -> None:
    """Parameters gathered or not, frozen ones changed since construction, buffers, a module by two names, moments and
    counts. What is checked is in `compare`, on the ranks."""
    files = [json.loads((runs[*case, True].root / f"compared-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(seen) for seen in files] == [MOMENTS[case[0]]] * 2
    assert all(names for names in files[0].values())


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_training_is_the_same_with_and_without_saves(
    runs: dict[tuple[str, str, bool], Run], case: tuple[str, str]
) -> None:
    """Losses and gradient norms of every step, and every bit of the last checkpoint; an evaluation came in between.

    A pretrained model was trained in the mode for use, without dropout and masks, until its first evaluation, and after
    every resume until the next.
    """
    saved, plain = runs[*case, True], runs[*case, False]
    assert saved.sealed_steps()[-1] == END and plain.sealed_steps() == [END]
    rows = [
        [(row["step"], row["loss"].hex(), row["grad_norm"].hex()) for row in read_lines(run.attempts()[0].metrics)]
        for run in (saved, plain)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == END
    folders = [run.checkpoint(END) / "deepspeed" for run in (saved, plain)]
    names = sorted(p.name for p in folders[0].iterdir())
    assert names == sorted(p.name for p in folders[1].iterdir())
    for name in names:
        a, b = (torch.load(folder / name, weights_only=False) for folder in folders)
        same(a, b, name)
