"""How a fault is brought about, apart from where: the table says what each must come to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import rundir
from tests.conftest import Stub, wait_until

Send = Callable[[int, int, int], None]
"""(node rank, pid, signal): to a process there, whatever way a backend has to that node."""

GOLDEN = Path(__file__).parents[1] / "golden" / "torchrun"


@dataclass(frozen=True)
class Fault:
    behaviour: str = "train"
    """Of the victim at the first attempt, the highest rank. `{cgroup}` is a memory cgroup of little memory."""
    others: str = "train"
    says: str = ""
    """torchrun's words on the head node, in place of any rank."""
    again: str = "train 40"
    """The victim's behaviour at every further attempt."""
    strike: Callable[[Stub, Send], None] | None = None
    """What is done to the run once it has sealed a checkpoint."""
    launcher: bool = False
    """The launcher itself is killed, once it has sealed a checkpoint."""


def rank(number: int) -> Callable[[Stub, Send], None]:
    def strike(stub: Stub, send: Send) -> None:
        attempt = stub.run.attempts()[0]
        victim = sorted(attempt.ranks.glob("rank-*.json"))[-1]
        node_rank = len(rundir.read_json(attempt.hosts)) - 1
        send(node_rank, rundir.read_json(victim)["pid"], number)

    return strike


def agent(stub: Stub, send: Send) -> None:
    node = rundir.read_json(sorted(stub.run.attempts()[0].root.glob("node-*.json"))[-1])
    send(node["node_rank"], node["pid"], signal.SIGKILL)


FAULTS = {
    "exception": Fault("raise 0.5"),
    "exit 7": Fault("exit 7"),
    "SIGKILL rank": Fault(strike=rank(signal.SIGKILL)),
    "SIGKILL node agent": Fault(strike=agent),
    "SIGKILL launcher": Fault(launcher=True),
    "SIGSTOP rank": Fault(strike=rank(signal.SIGSTOP)),
    "feed blocked": Fault("feed"),
    "OOM by cgroup": Fault("hog {cgroup}/cgroup.procs"),
    "port taken": Fault(says=(GOLDEN / "port-taken.txt").read_text()),
    "crash loop": Fault("kill", again="kill"),
}
"""By their names in the table. Cutting a host off and powering it off belong to those who have several."""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup in which 200 MiB are too much."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"speechctl-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(200 * 2**20))
        except OSError:
            group.rmdir()
            continue
        yield group
        wait_until(partial(_remove, group))
        return
    pytest.skip("needs a memory cgroup that can be made and limited (root, cgroup v1 or v2 with the memory controller)")


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def sealed(stub: Stub) -> list[int]:
    return stub.run.sealed_steps()


def failure_of(stub: Stub, attempt: int = 0) -> dict[str, Any]:
    value: dict[str, Any] = rundir.read_json(stub.run.attempts()[attempt].failure)
    return value
