"""Ranks of any number train or resume many prepared attempts, one after the other, in one process group.

A server that has imported everything once forks them: ten process groups cost what one costs otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.rundir import Attempt

LIMIT_S = 3600
HEAVY = [
    "launcher.worker.train",
    "launcher.worker.engine_deepspeed",
    "deepspeed.utils.zero_to_fp32",
    "transformers.models.wav2vec2.modeling_wav2vec2",
]


def train(world_size: int, attempts: list[Attempt], stop_at: int = 0) -> None:
    """
    Args:
        stop_at: the step at which they stop; 0: the last one.
    """
    start(world_size, _rank, [str(a.root) for a in attempts], stop_at)


def start(world_size: int, body: Callable[..., object], *arguments: Any) -> None:
    """Start that many ranks, each of which calls `body`, and wait for them. Raises AssertionError with what went wrong
    where one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    where |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    errors = context.Queue()
    ranks = [
        context.Process(target=rank, args=({**where, "RANK": str(r), "LOCAL_RANK": str(r)}, errors, body, arguments))
        for r in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        said = [errors.get(timeout=LIMIT_S) for _ in ranks]
        assert not any(said), "\n".join(said)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
        errors.close()


def rank(environment: dict[str, str], errors: Any, body: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        body(*arguments)
    except BaseException:
        errors.put(f"rank {environment['RANK']}: {traceback.format_exc()}")
        raise
    errors.put("")


def _rank(attempts: list[str], stop_at: int) -> None:
    """Each attempt to its end. A rank that has resumed first saves what it has taken back, unsealed, into `again`."""
    import torch

    from launcher.committer import write_hashed
    from launcher.worker.host_memory import HostMemory
    from launcher.worker.ranks import Ranks
    from launcher.worker.train import Training

    torch.set_num_threads(1)

    class Stopping(Training):
        def one_step(self, *arguments: Any) -> bool:
            return super().one_step(*arguments) or self.progress.step == stop_at

    close, Ranks.close = Ranks.close, Ranks.barrier  # type: ignore[method-assign]
    for attempt in attempts:
        training = Stopping(Attempt(Path(attempt)), [False], fresh=False)
        if training.progress.step:
            again = training.run.root / "again"
            again.mkdir(exist_ok=True)
            for file in training.engine.snapshot(HostMemory(copies=False)):
                (again / file.name).parent.mkdir(exist_ok=True)
                write_hashed(again / file.name, file.write)
        elif training.recipe.zero_stage in (1, 2, 3):
            training.engine.engine.optimizer.loss_scaler.carried = "from the first ranks"  # type: ignore[attr-defined]
        training.go()
    close(training.ranks)
