"""Ranks of any number train or resume many prepared attempts, one after the other, in one process group.

A server that has imported everything once forks them: ten process groups cost what one costs otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launcher import plan, recipe_file, rundir
from launcher import recipe as schema
from launcher.rundir import Attempt, Run
from tests.conftest import own_port
from tests.worker.harm import Harm

LIMIT_S = 3600
HEAVY = [
    "launcher.worker.train",
    "launcher.worker.engine_deepspeed",
    "deepspeed.utils.zero_to_fp32",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles at import, and with that imports 600 modules
    "transformers.models.wav2vec2.modeling_wav2vec2",
]


def prepare(where: Path, root: Path, backbone: schema.Backbone, stage: str, precision: str, **more: Any) -> Run:
    """A run directory as `launch` leaves it.

    Args:
        root: has `packs`.
        more: of the recipe.
    """
    recipe = schema.Recipe.model_validate(
        {
            "name": "moved",
            "run_dir": where,
            "data": {"corpus": root, "packs": root / "packs", "train": ["train-clean-100"]},
            "backbone": backbone.model_dump(),
            "zero_stage": stage if stage == "off" else int(stage),
            "precision": precision,
            "batch": {"step_seconds": 8, "max_rank_seconds": 4},
            "optimizer": {"learning_rate": 1e-3},
            "evaluate": {"subsets": ["dev-clean"], "at_end": False, "every_steps": 100},
            **more,
        }
    )
    run = Run(recipe.run_path)
    for folder in (run.root, run.checkpoints, run.stop_request.parent):
        folder.mkdir()
    rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
    rundir.write_json(run.plan, {"name": recipe.name, "max_steps": recipe.max_steps})
    if stage != "off":
        rundir.write_json(run.deepspeed, plan.deepspeed_config(recipe, 1, 10**6))
    return run


@contextmanager
def under_way(world_size: int, work: Callable[..., object], *arguments: Any) -> Iterator[tuple[list[BaseProcess], Any]]:
    """That many ranks that do `work`, and the queue in which each says what went wrong, or nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    errors = context.Queue()
    with own_port() as port:
        where = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        where |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        each = [{**where, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
        ranks: list[BaseProcess] = [context.Process(target=rank, args=(e, errors, work, *arguments)) for e in each]
        try:
            for process in ranks:
                process.start()
            yield ranks, errors
        finally:
            for process in ranks:
                process.join(10 if process.exitcode is None and not errors.empty() else 0)
                process.kill()
                process.join()
            errors.close()


def start(world_size: int, work: Callable[..., object], *arguments: Any) -> None:
    """Have that many ranks do `work`, and wait for them. Raises AssertionError with what went wrong where one fails."""
    with under_way(world_size, work, *arguments) as (ranks, errors):
        said = [errors.get(timeout=LIMIT_S) for _ in ranks]
        assert not any(said), "\n".join(said)
        for process in ranks:
            process.join(10)


def train(
    world_size: int, attempts: list[Attempt], stop_at: int = 0, harms: Sequence[Harm | None] | None = None
) -> None:
    """Start that many ranks and wait for them. Raises AssertionError with what went wrong where one fails.

    Args:
        stop_at: the step at which they stop; 0: the last one.
        harms: for each attempt, what befalls a save of it.
    """
    start(world_size, train_attempts, [str(a.root) for a in attempts], stop_at, harms)


def train_until_killed(world_size: int, attempt: Attempt, harm: Harm, stop_at: int) -> bool:
    """The same, for a harm that kills. Returns whether it came."""
    return until_killed(world_size, train_attempts, [str(attempt.root)], stop_at, [harm])


def until_killed(world_size: int, work: Callable[..., object], *arguments: Any) -> bool:
    """Have that many ranks do `work`, of which one is killed on the way, and then all, as torchrun does. Returns
    whether it came to that."""
    with under_way(world_size, work, *arguments) as (ranks, errors):
        while running := [process for process in ranks if process.exitcode is None]:
            wait([process.sentinel for process in running])
            codes = [process.exitcode for process in ranks]
            if -9 in codes:
                return True
            if any(codes):
                for process in ranks:  # the end of the peer of one that was killed may be heard of first
                    process.join(10)
                if -9 in [process.exitcode for process in ranks]:
                    return True
                raise AssertionError("\n".join(errors.get(timeout=10) for code in codes if code))
        return False


def rank(environment: dict[str, str], errors: Any, work: Callable[..., object], *arguments: Any) -> None:
    os.environ.update(environment)
    try:
        work(*arguments)
    except BaseException:
        errors.put(f"rank {environment['RANK']}: {traceback.format_exc()}")
        raise
    errors.put("")


def train_attempts(attempts: list[str], stop_at: int, harms: Sequence[Harm | None] | None) -> None:
    """Each attempt to its end. A rank that has resumed first saves what it has taken back, unsealed, into `again`, and
    says in `loaded-RANK` what it has had unpickled."""
    import torch

    from launcher.committer import write_hashed
    from launcher.worker.host_memory import HostMemory
    from launcher.worker.ranks import Ranks
    from launcher.worker.train import Training

    torch.set_num_threads(1)
    loaded: list[str] = []
    load = torch.load

    def watched_load(file: Any, *rest: Any, **more: Any) -> Any:
        loaded.append(str(file))
        return load(file, *rest, **more)

    torch.load = watched_load  # type: ignore[assignment]

    class Stopping(Training):
        def one_step(self, *arguments: Any) -> bool:
            return super().one_step(*arguments) or self.progress.step == stop_at

    close, Ranks.close = Ranks.close, Ranks.barrier  # type: ignore[method-assign]
    for attempt, harm in zip(attempts, harms or [None] * len(attempts), strict=True):
        loaded.clear()
        training = Stopping(Attempt(Path(attempt)), [False], fresh=False)
        if harm is not None:
            harm.plan(training)
        elif training.progress.step:
            again = training.run.root / "again"
            again.mkdir(exist_ok=True)
            for file in training.engine.snapshot(HostMemory(copies=False)):
                (again / file.name).parent.mkdir(exist_ok=True)
                write_hashed(again / file.name, file.write)
            (training.run.root / f"loaded-{training.ranks.rank}").write_text("\n".join(loaded))
        elif training.recipe.zero_stage in (1, 2, 3):
            training.engine.engine.optimizer.loss_scaler.carried = "from the first ranks"  # type: ignore[attr-defined]
        training.go()
    close(training.ranks)
