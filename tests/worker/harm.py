"""What befalls a save of real training: a system call kills its rank or fails, or the disk does. Used in a rank."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.disks import filled, read_only

if TYPE_CHECKING:
    from launcher.worker.train import Training

CALLS = "%file,%desc"
"""What strace calls the system calls that take a path or a descriptor."""


@dataclass(frozen=True)
class Harm:
    """To one rank, in the save of one step, while its committer works."""

    step: int
    """The step that is saved."""
    rank: int = 0
    strace: tuple[str, ...] = ()
    """Options of an strace of the thread that saves."""
    full: str = ""
    """Or: a disk that has no room meanwhile, by where it is mounted."""
    read_only: str = ""
    """Or: a disk that is read-only meanwhile."""
    log: str = ""
    """Or, on every rank: what system calls that thread makes, in a file of this name with the rank behind it."""

    def plan(self, training: Training) -> None:
        """Have it happen, if it is this rank's. A disk is not mended before training has made a step more."""
        committer, rank = training.checkpoints.committer, training.ranks.rank
        save = committer.save
        if self.read_only:  # a mount under a file that is open to write cannot be made so
            training.record.ledger.stays_open_s = training.record.metrics.stays_open_s = 0.0

        def harmed(step: int, *rest: Any, **more: Any) -> Any:
            with self.befalls(rank) if step == self.step else nullcontext():
                outcome = save(step, *rest, **more)
                if step == self.step and rank == self.rank and (self.full or self.read_only):
                    while training.progress.step == step:
                        time.sleep(0.005)
                    time.sleep(0.1)  # until its lines are written, or are not
                return outcome

        committer.save = harmed  # type: ignore[method-assign]

    @contextmanager
    def befalls(self, rank: int) -> Iterator[None]:
        if self.log:
            with traced_here(*log_calls(Path(f"{self.log}-{rank}"))):
                yield
        elif rank != self.rank:
            yield
        elif self.full:
            with filled(Path(self.full)):
                yield
        elif self.read_only:
            with read_only(Path(self.read_only)):
                yield
        else:
            with traced_here(*self.strace):
                yield


def log_calls(path: Path) -> tuple[str, ...]:
    """Options of strace for all that takes a path or a descriptor."""
    return ("-e", f"trace={CALLS}", "-o", str(path))


def inject(call: str, what: str, k: int) -> tuple[str, ...]:
    """Options of strace for the k-th call of that name."""
    return ("-e", f"trace={call}", "-e", f"inject={call}:{what}:when={k}")


@contextmanager
def traced_here(*options: str) -> Iterator[None]:
    """strace on the calling thread alone; what its process does beside it is not counted."""
    tid = threading.get_native_id()
    tracer = subprocess.Popen(
        ["strace", "-q", "-p", str(tid), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    attached = threading.Event()

    def look() -> None:
        status = Path(f"/proc/{os.getpid()}/task/{tid}/status")
        while f"TracerPid:\t{tracer.pid}" not in status.read_text() and tracer.poll() is None:
            time.sleep(0.002)
        time.sleep(0.02)  # it has its hands full yet
        attached.set()

    threading.Thread(target=look, daemon=True).start()  # not here: what is looked at here would be counted
    attached.wait()
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()
