"""One cell of the table: a fault is brought about in a run of stub ranks, and what it comes to is checked.

The faults are the same on every backend; how a run is started there, and how one gets at what it is made of, is in
`places`.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import rundir
from launcher.recovery import AT_ITS_HOST
from tests.conftest import RECIPE, wait_until
from tests.faults.places import Place
from tests.faults.table import TABLE, Cell

EVERY = os.environ.get("SPEECHCTL_TEST_FAULTS") == "all"
"""Whether every cell is to be tried, and not only some of those that take hosts."""

GOLDEN = Path(__file__).parents[1] / "golden" / "torchrun"

RANKS = 2
SSH_KEEPALIVE_S, SLURMD_TIMEOUT_S = 15, 10
LAST_STEP = 40

# The faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    behaviour: str = "train"
    """Of the victim at the first attempt, the highest rank. `{cgroup}` is a memory cgroup of little memory."""
    others: str = "train"
    says: str = ""
    """torchrun's words on the head node, in place of any rank."""
    again: str = f"train {LAST_STEP}"
    """The victim's behaviour at every further attempt."""
    strike: Callable[[Place], None] | None = None
    """What is done to the run once it has sealed a checkpoint."""


def to_rank(number: int) -> Callable[[Place], None]:
    def strike(place: Place) -> None:
        attempt = place.run.attempts()[0]
        pid = rundir.read_json(attempt.rank(RANKS - 1))["pid"]
        place.send(len(place.hosts) - 1, pid, number)

    return strike


def to_agent(place: Place) -> None:
    node_rank = len(place.hosts) - 1
    place.send(node_rank, rundir.read_json(place.run.attempts()[0].node(node_rank))["pid"], signal.SIGKILL)


FAULTS = {
    "exception": Fault("raise 0.5"),
    "exit 7": Fault("exit 7"),
    "SIGKILL rank": Fault(strike=to_rank(signal.SIGKILL)),
    "SIGKILL node agent": Fault(strike=to_agent),
    "SIGKILL launcher": Fault(strike=lambda place: place.kill_launcher()),
    "SIGSTOP rank": Fault(strike=to_rank(signal.SIGSTOP)),
    "feed blocked": Fault("feed"),
    "host cut": Fault("wire", "wire", strike=lambda place: place.lose_host(power=False)),
    "host power-off": Fault("wire", "wire", strike=lambda place: place.lose_host(power=True)),
    "OOM by cgroup": Fault("hog {cgroup}/cgroup.procs"),
    "port taken": Fault(says=(GOLDEN / "port-taken.txt").read_text()),
    "crash loop": Fault("kill", again="kill"),
}
"""By their names in the table."""


def names(backend: str, short: Sequence[str] | None = None) -> list[str]:
    """The faults that this backend can have.

    Args:
        short: those that are enough where not every cell is asked for.
    """
    possible = [name for name, row in TABLE.items() if isinstance(row[backend], Cell)]
    return possible if EVERY or short is None else [name for name in possible if name in short]


@contextmanager
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
        try:
            yield group
        finally:
            wait_until(partial(_remove, group))
        return
    pytest.skip("needs a memory cgroup that can be made and limited (root, cgroup v1 or v2 with the memory controller)")


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


# The cell ----------------------------------------------------------------------------------------------------------


def play(place: Place, name: str, fault: Fault | None = None) -> None:
    """The cell with stub ranks, by the usual fault of this name or another one."""
    fault = fault or FAULTS[name]
    place.stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch(place, name)))
    with ExitStack() as stack:
        cgroup = stack.enter_context(small_cgroup()) if "{cgroup}" in fault.behaviour else None
        rest = RANKS - 1
        ranks = (*([fault.others] * rest), fault.behaviour.format(cgroup=cgroup))
        later = (*([f"train {LAST_STEP}"] * rest), fault.again)
        place.stub.behave(*ranks, says=fault.says, patience_s=1, then=later)
        follow(place, name, fault)


def launch(place: Place, name: str) -> str:
    """The recipe's `launch`. A lost host is to be known by its silence, and not by its ranks'."""
    step = f", step: {place.deadline_s:g}s" if cell_of(place, name).kind == "hang" else ""
    more = f"relaunch: {{wait: 0.1s}}, deadlines: {{start: 60s{step}, save: 60s}}"
    return f"{{{place.launch}, stop_grace: {place.stop_grace_s:g}s, {more}}}"


def cell_of(place: Place, name: str) -> Cell:
    cell = TABLE[name][place.backend]
    assert isinstance(cell, Cell), f"{name} on {place.backend} is marked as impossible"
    return cell


def follow(place: Place, name: str, fault: Fault) -> None:
    """Launch, bring the fault about, follow the run to its end, and hold what came of it against the table."""
    cell = cell_of(place, name)
    with place.bystanders() as gone, place.launched():
        struck = None
        if fault.strike is not None:
            wait_until(place.run.sealed_steps, timeout_s=120)
            assert locked([place.run.lock]), "a run holds its lock"
            struck = time.time()
            fault.strike(place)
        code, said = place.end()
        check_failure(place, cell, on_head=bool(fault.says))
        check_time(place, cell, struck)
        check_end(place, cell, code, said)
        check_nothing_left(place)
        assert gone() == ([place.hosts[-1]] if name == "host power-off" else []), "a foreign process was touched"


def failure_of(place: Place, attempt: int = 0) -> dict[str, Any]:
    value: dict[str, Any] = rundir.read_json(place.run.attempts()[attempt].failure)
    return value


def check_failure(place: Place, cell: Cell, *, on_head: bool) -> None:
    failure = failure_of(place, -1 if cell.kind == "no progress" else 0)
    assert (failure["kind"], failure["code"], failure["verdict"]) == (cell.kind, cell.code, cell.verdict), failure
    node_rank = 0 if on_head else len(place.hosts) - 1
    culprits: dict[str, tuple[str, dict[str, Any]]] = {
        "rank": (f"rank {RANKS - 1} on {place.hosts[-1]}", {"rank": RANKS - 1, "host": place.hosts[-1]}),
        "node": (f"node {node_rank} on {place.hosts[node_rank]}", {"node_rank": node_rank}),
        "host": (place.hosts[-1], {"node_rank": node_rank, "host": place.hosts[-1]}),
        "launcher": ("the launcher of attempt 1", {}),
        "run": (str(place.run.root), {}),
    }
    named, fields = culprits[cell.culprit]
    assert named in failure["message"] and fields.items() <= failure.items(), failure
    if cell.kind == "host memory":
        assert "of the 0.20 GiB that its cgroup may use" in failure["message"], "its own cgroup's counter is certain"


def check_time(place: Place, cell: Cell, struck: float | None) -> None:
    """From the fault to the end of the attempt; where nothing was done from outside, from the last step. Nobody is
    left to see that a launcher dies, but the nodes, and each says when it ended its ranks."""
    attempt = place.run.attempts()[0]
    if cell.kind == "launcher lost":
        records = [rundir.read_json(attempt.node(k)) for k in range(len(place.hosts))]
        ends = [record["time"] for record in records if record["returncode"] is not None]
        assert len(ends) == len(place.hosts), f"not every node has said how it ended: {records}"
    else:
        ends = [row["time"] for row in rundir.read_lines(attempt.supervisor) if row["event"] == "ended"]
    rows = rundir.read_lines(attempt.metrics)
    if struck is None and not rows:
        return  # it never trained
    allowed = cell.seen_within_s
    if cell.kind == "hang":
        allowed += place.deadline_s
    if cell.culprit == "host":
        allowed += max(SSH_KEEPALIVE_S, SLURMD_TIMEOUT_S)
    took = max(ends) - (struck or rows[-1]["time"])
    print(f"seen and ended after {took:.1f} s of {allowed:g} s")
    assert took < allowed, "it was to be seen sooner"


def check_end(place: Place, cell: Cell, code: int, said: str) -> None:
    """What the verdict promised."""
    attempts = place.run.attempts()
    if cell.verdict == "again":
        assert code == 0 and place.run.sealed_steps()[-1] >= LAST_STEP, said
        assert len(attempts) >= 2, "it took another attempt"
        moved = place.spare is not None and cell.kind in AT_ITS_HOST
        hosts = [*place.hosts[:-1], place.spare if moved else place.hosts[-1]]
        assert [host["name"] for host in rundir.read_json(attempts[-1].hosts)] == hosts
    else:
        last = failure_of(place, -1)
        assert code == last["code"], said
        assert f"error: {last['message']}" in said and "hint: " in said
        assert len(attempts) == (3 if cell.kind == "no progress" else 1)


def check_nothing_left(place: Place) -> None:
    wait_until(lambda: not place.processes(), timeout_s=20)
    assert not locked(place.run.root.rglob("*")), "a lock of the run is still held"
    assert place.segments() == [], "the run has left shared memory"


def locked(files: Iterable[Path]) -> set[int]:
    """The inodes of those on which any process of any host has a lock."""
    inodes = {path.lstat().st_ino for path in files}
    return inodes & set(map(int, re.findall(r"(?m):(\d+) \d+ \w+$", Path("/proc/locks").read_text())))
