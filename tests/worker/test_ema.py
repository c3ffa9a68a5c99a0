"""The moving average of the weights: what it is, after any resume and by any number of ranks, and who scores it.

Two real ranks train a small model with a step that is left out and parts that are frozen for a while, and save after
every step. The reference is computed from what they saved: from the weights alone, in float64.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher import recipe as schema
from launcher import recipe_file, rundir, sealing
from launcher.errors import UsageError
from launcher.rundir import Run, read_json, read_lines
from launcher.worker import adamw, learning, verbs
from launcher.worker.backbone import SpeechModel
from launcher.worker.learning import part_of
from launcher.worker.models import build, load_export
from launcher.worker.pack import write_pack
from launcher.worker.shards import Shards
from launcher.worker.weights import ema_of, restored, weights_of
from tests.conftest import count, make_corpus, wait_until
from tests.worker import backbones, worlds
from tests.worker.harm import Harm
from tests.worker.runs import events, state_digest

DECAY = 0.3
"""So little that the rule reaches it, at the third update."""

STEPS = 8
BAD = 2
"""The step at which rank 1 gets a NaN."""
UNFROZEN, FROZEN_AGAIN, GOES_ON = 3, 5, 7
"""When the layers begin to learn, and when the head does not for a while."""
CUT = 4

TINY = schema.TinyCtc(kind="tiny-ctc", hidden=16, layers=1, dropout=0.1, spec_augment=False)

RECIPE: dict[str, Any] = {
    "max_steps": STEPS,
    "batch": {"step_seconds": 8, "max_rank_seconds": 2},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "layer_decay": 0.9, "ema": DECAY},
    "schedule": {"kind": "cosine", "warmup": 2, "init_scale": 0.1},
    "freeze": [
        {"parts": ["feature_encoder"]},
        {"parts": ["layer.*"], "until_steps": UNFROZEN},
        {"parts": ["head"], "after_steps": FROZEN_AGAIN, "until_steps": GOES_ON},
    ],
}

WAYS: dict[str, dict[str, Any]] = {
    "off": {},
    "0": {},
    "0 bf16": {"precision": "bf16"},
    "1": {},
    "2 rank0": {"offload": {"optimizer": True}, "evaluate": {"mode": "rank0"}},
    "3": {},
    "3 rank0": {"offload": {"optimizer": True, "parameters": True}, "precision": "bf16", "evaluate": {"mode": "rank0"}},
}
"""By ZeRO stage: `off` first, and 3 last. Accelerate and DeepSpeed's stage 3 change a process for good, and in one that
was changed in another way gradients differ in their last bits."""

ALL = bool(os.environ.get("SPEECHCTL_TEST_STAGES"))
"""Cut and shrink every way, where the suite has some of them."""

RESUMED = tuple(WAYS) if ALL else ("off", "0 bf16", "2 rank0", "3 rank0")
KILLED = "3 rank0"
"""The last of those that are cut: its ranks are killed a step behind a save. The others are asked to stop there."""

SHRUNK = tuple(way for way in WAYS if way[0] in "123") if ALL else ("2 rank0", "3 rank0")
"""What goes on with one rank."""


def prepared(root: Path, name: str, way: str, evaluate: bool, **more: Any) -> Run:
    changes = {"precision": "fp32", **WAYS[way], **more}
    cadence = {"subsets": ["dev-clean"], "batch_seconds": 3, "at_end": evaluate, **changes.pop("evaluate", {})}
    cadence |= {"every_steps": 3} if evaluate else {}
    checkpoint = {"every_steps": 1, "keep_last": STEPS} if evaluate else {"every_steps": CUT}
    made = {**RECIPE, **changes, "evaluate": cadence, "checkpoint": checkpoint}
    return worlds.prepare(root / name, root, TINY, way.split()[0], made.pop("precision"), **made)


class Story(Harm):
    """A NaN on rank 1; and that rank's end behind a step and the seal of the one before, where there is to be one."""

    def __init__(self, dies_behind: int = 0) -> None:
        super().__init__(step=dies_behind)

    def plan(self, training: Any) -> None:
        whole, one_step = training.engine.backward, training.one_step

        def backward(tensors: dict[str, torch.Tensor], factor: float, last: bool) -> torch.Tensor:
            if training.ranks.rank == 1 and not last and training.progress.step + 1 == BAD:
                tensors["inputs"][0] = math.nan
            result: torch.Tensor = whole(tensors, factor, last)
            return result

        def mortal(*arguments: Any) -> bool:
            stop: bool = one_step(*arguments)
            if training.ranks.rank == 1 and training.progress.step == self.step:
                wait_until(lambda: CUT in training.run.sealed_steps())
                os.kill(os.getpid(), signal.SIGKILL)
            return stop

        training.engine.backward, training.one_step = backward, mortal


def train(world_size: int, runs: Iterable[Run], stop_at: int = 0, harms: Sequence[Harm] | None = None) -> None:
    worlds.start(world_size, ranks, [str(run.new_attempt().root) for run in runs], stop_at, harms)


def ranks(attempts: list[str], stop_at: int, harms: Sequence[Harm] | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # Accelerate takes it for all that comes after, too
    worlds.train_attempts(attempts, stop_at, harms)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ema")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    return root


@pytest.fixture(scope="module")
def whole(packed: Path) -> dict[str, Run]:
    """Each way in one go, with evaluations, saved after every step."""
    made = {way: prepared(packed, f"whole-{way}", way, evaluate=True) for way in WAYS}
    train(2, made.values(), harms=[Story()] * len(made))
    return made


@pytest.fixture(scope="module")
def cut(packed: Path) -> dict[str, Run]:
    """Each way without evaluations, by two process groups one after the other."""
    made = {way: prepared(packed, f"cut-{way}", way, evaluate=False) for way in RESUMED}
    attempts = [str(run.new_attempt().root) for run in made.values()]
    harms = [Story(dies_behind=CUT + 1 if way == KILLED else 0) for way in made]
    assert worlds.until_killed(2, ranks, attempts, CUT + 1, harms)
    train(2, made.values())
    return made


# What it is ----------------------------------------------------------------------------------------------------------


def learns(part: str, step: int) -> bool:
    """Whether a step moves it."""
    if step == BAD or part == "feature_encoder":
        return False
    return step > UNFROZEN if part == "layer.0" else not FROZEN_AGAIN < step <= GOES_ON


def as_trained(run: Run) -> SpeechModel:
    recipe = recipe_file.load(run.resolved)
    return learning.prepare(build(recipe.backbone, seed=recipe.seed), recipe)


def updated(run: Run, step: int, way: str) -> dict[str, torch.Tensor]:
    """The fp32 weights that the optimizer updates."""
    weights = weights_of(run, step)
    if way == "0 bf16":  # they are the optimizer's alone there
        saved = torch.load(run.checkpoint(step) / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)
        of_optimizer = [p.detach() for group in saved["optimizer"]["fp32_groups"] for p in group]
        model = as_trained(run)
        names = {id(p): name for name, p in model.named_parameters()}
        in_order = [p for group in learning.groups(model, recipe_file.load(run.resolved)) for p in group.parameters]
        for parameter, tensor in zip(in_order, of_optimizer, strict=True):
            assert torch.equal(tensor.bfloat16().float(), weights[names[id(parameter)]])
            weights[names[id(parameter)]] = tensor
    return weights


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_follows_from_the_weights(whole: dict[str, Run], way: str) -> None:
    """After each of the steps, to 1e-6: it follows what has learned, also while that is frozen; a step that is left out
    does not move it; what never learns is the weights, bit for bit."""
    run = whole[way]
    model = as_trained(run)
    part = part_of(model)
    assert [row["step"] for row in read_lines(run.attempts()[0].metrics) if row.get("left_out")] == [BAD]
    computes_in = torch.bfloat16 if recipe_file.load(run.resolved).precision == "bf16" else torch.float32
    average = {name: tensor.to(computes_in).double() for name, tensor in model.state_dict().items()}
    updates = dict.fromkeys(average, 0)
    moved: dict[str, list[int]] = {}
    for step in range(1, STEPS + 1):
        weights, found = updated(run, step, way), ema_of(run, step, model)
        assert found.keys() == weights.keys() == average.keys()
        for name, tensor in average.items():
            if step != BAD:
                updates[name] += learns(part[name], step)
                decay = min(DECAY, (1 + updates[name]) / (10 + updates[name]))
                average[name] = decay * tensor + (1 - decay) * weights[name].double()
            torch.testing.assert_close(found[name].double(), average[name], rtol=1e-6, atol=1e-6)
            if not updates[name]:
                assert torch.equal(found[name], weights[name])
            elif (found[name] - weights[name]).abs().max() > 1e-4:
                moved.setdefault(part[name], []).append(step)
    assert set(moved["head"]) >= {1, 3, 4, 5} and set(moved["layer.0"]) >= {4, 5, 6, 7, 8}, "it proves something"
    before, after = (ema_of(run, step, model) for step in (BAD - 1, BAD))
    assert all(torch.equal(before[name], after[name]) for name in before)
    count("averages", STEPS)


def test_how_much_of_it_stays() -> None:
    """By hand; TensorFlow's rule."""
    assert [adamw.decay(0.999, n) for n in (1, 8, 90)] == [2 / 11, 0.5, 0.91]
    assert adamw.decay(0.999, 10**5) == 0.999 and adamw.decay(0.1, 1) == 0.1


def test_a_run_without_it_keeps_nothing(packed: Path) -> None:
    recipe = recipe_file.load(
        prepared(packed, "without", "off", evaluate=False, optimizer={"learning_rate": 1e-2}).resolved
    )
    optimizer = learning.optimizer_for(learning.groups(model := build(TINY, seed=1), recipe), recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(UsageError, match="keeps no moving average"):
        ema_of(Run(packed / "without"), 1, model)


# A resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", RESUMED)
def test_evaluations_and_resumes_leave_no_trace(whole: dict[str, Run], cut: dict[str, Run], way: str) -> None:
    """One run scored its average every few steps, in the place of the weights; the other did not, and came back from a
    stop or a kill: every loss and the last state, weights, moments and average, are the same bits."""
    one, other = whole[way], cut[way]
    assert [e["step"] for e in events(one.attempts()[0], "evaluated")] == [3, 6, 8] and not other.evaluations.exists()
    assert [e["step"] for a in other.attempts() for e in events(a, "started")] == [0, CUT + (way != KILLED)]
    losses = [
        {row["step"]: (row["loss"], row["grad_norm"]) for a in run.attempts() for row in read_lines(a.metrics)}
        for run in (one, other)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert state_digest(one.checkpoint(STEPS)) == state_digest(other.checkpoint(STEPS))


def went_on(source: Run, target: Path) -> Run:
    """A run as if it had been killed behind `CUT`, elsewhere."""
    shutil.copytree(source.root, target)
    run = Run(target)
    for step in range(CUT + 1, STEPS + 1):
        shutil.rmtree(run.checkpoint(step))
    shutil.rmtree(run.evaluations, ignore_errors=True)
    recipe = recipe_file.load(run.resolved).model_copy(update={"run_dir": target})
    rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
    return run


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_another_number_of_ranks_has_the_same_average(packed: Path, whole: dict[str, Run]) -> None:
    """2 ranks become 1, and 1 becomes 2: every element is what it was, bit for bit, and goes on to what it would have
    become. The layers have been updated once by then, at bf16 and offloaded too."""
    runs = {way: went_on(whole[way], packed / f"shrunk-{way}") for way in SHRUNK}
    alone = prepared(packed, "alone", "3", evaluate=False)
    train(1, runs.values())
    train(1, [alone], CUT)
    train(2, [alone])
    for run, before, after in [*((run, 2, 1) for run in runs.values()), (alone, 1, 2)]:
        stage = int(recipe_file.load(run.resolved).zero_stage)
        old = Shards(run.checkpoint(CUT) / "deepspeed", stage, before)
        new = Shards(run.root / "again" / "deepspeed", stage, after)
        for name, size in old.sizes().items():
            assert torch.equal(old.read(adamw.EMA, name, 0, size), new.read(adamw.EMA, name, 0, size)), name
        assert any(
            not torch.equal(old.read(adamw.EMA, name, 0, size), old.read("fp32", name, 0, size))
            for name, size in old.sizes().items()
        )
    for way, run in runs.items():
        model = as_trained(run)
        ended, expected = (ema_of(r, STEPS, model) for r in (run, whole[way]))
        for name, tensor in expected.items():
            # Dropout is drawn anew by another number of ranks.
            torch.testing.assert_close(ended[name], tensor, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("change", [None, 0.5])
def test_a_checkpoint_without_an_average_is_no_start_for_one(packed: Path, change: float | None) -> None:
    """What is kept decides. The decay itself is like a learning rate, of which a checkpoint says nothing."""
    recipe = recipe_file.load(prepared(packed, f"other-{change}", "off", evaluate=False).resolved)
    other = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"ema": change})})
    same = learning.identity(recipe, "letters") == learning.identity(other, "letters")
    assert same == (change is not None)


# Who scores it -------------------------------------------------------------------------------------------------------


def scored(run: Run, step: int, capsys: pytest.CaptureFixture[str], *, ema: bool) -> dict[str, Any]:
    """By `evaluate`, in this process and in fp32."""
    target = run.root / "here.json"
    options = {"run": run.root, "step": [step], "ema": ema, "subset": [], "lm": None, "target": target}
    assert verbs.evaluate(argparse.Namespace(**options)) == 0
    capsys.readouterr()
    value: dict[str, Any] = read_json(target)
    return value


@pytest.mark.ranks
@pytest.mark.parametrize("way", WAYS)
def test_every_mode_scores_the_average(whole: dict[str, Run], way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All ranks or rank 0 alone in training; a sidecar, from the checkpoint; `evaluate`, in fp32: the same losses, and
    others than those of the weights themselves. Each result says which it is of."""
    run, step = whole[way], 6
    trained = read_json(run.evaluation(step))
    assert trained["weights"] == "ema" and trained["mode"] == ("rank0" if "rank0" in way else "collective")
    mixed = recipe_file.load(run.resolved).precision != "fp32"
    averaged, themselves = (scored(run, step, capsys, ema=ema) for ema in (True, False))
    assert (averaged["weights"], averaged["source"]["weights"]) == ("ema", "ema")
    assert (themselves["weights"], themselves["source"]["weights"]) == ("trained", "trained")
    off = abs(averaged["loss"] - themselves["loss"]) / themselves["loss"]
    assert off > 1e-3, "it proves something"
    assert averaged["loss"] == pytest.approx(trained["loss"], rel=off / 4 if mixed else 1e-5)
    verbs.sidecar(argparse.Namespace(attempt=run.attempts()[0].root, step=step))
    beside = read_json(run.evaluation(step))
    # In bf16 the linear layers that DeepSpeed has at stage 3 round in another place.
    assert beside["weights"] == "ema"
    assert beside["loss"] == pytest.approx(trained["loss"], rel=off / 4 if way == "3 rank0" else 1e-5)
    assert beside["criterion"] == trained["criterion"]


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["off", "3"])
def test_an_export_has_the_average(whole: dict[str, Run], way: str, tmp_path: Path) -> None:
    """It hears what a model with the reference's weights hears, token by token, and says whose weights it has."""
    run = whole[way]
    step = 1  # soon it would hear nothing at all
    options = {"run": run.root, "step": [step], "ema": True, "target": tmp_path / "x"}
    assert verbs.export(argparse.Namespace(**options)) == 0
    assert sealing.verify(tmp_path / "x")["source"]["weights"] == "ema"
    exported, reference = load_export(tmp_path / "x"), as_trained(run).eval()
    reference.load_state_dict(ema_of(run, step, reference))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    noise = [np.random.default_rng(7).standard_normal(n).astype(np.float32) for n in (32_000, 16_000, 9_000)]
    batch = reference.collate(noise, ["HELLO", "A", "B"])
    (_, mine), (_, theirs) = (model(batch, transcribe=True) for model in (exported, reference))
    assert mine == theirs and any(mine)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", ["off", "2", "3"])
def test_tied_weights_have_their_average(packed: Path, stage: str, tmp_path: Path) -> None:
    """Whisper's embeddings are its output projection, and a checkpoint has them under both names. A model of the
    average had those of the last step."""
    backbone = backbones.whisper(backbones.make_whisper(tmp_path / "whisper", seconds=3))
    batch = {"step_seconds": 60, "max_rank_seconds": 60}
    changes = {"max_steps": 2, "batch": batch, "checkpoint": {"every_steps": 2}}
    optimizer = {"learning_rate": 0.1, "ema": 0.9}
    run = worlds.prepare(tmp_path / "run", packed, backbone, stage, "fp32", optimizer=optimizer, **changes)
    worlds.train(1, [run.new_attempt()])
    average, trained = ema_of(run, 2, as_trained(run)), weights_of(run, 2)
    loaded = restored(run, 2, backbone, 1, ema=True).state_dict()
    embeddings = [name for name in loaded if name.endswith(("embed_tokens.weight", "proj_out.weight"))]
    assert len(embeddings) == 2
    assert not any(torch.equal(average[name], trained[name]) for name in embeddings)
    assert all(torch.equal(loaded[name], average[embeddings[0]]) for name in embeddings)
