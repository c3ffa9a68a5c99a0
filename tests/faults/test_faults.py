"""Every fault of the table on this machine: seen in time, named, and gone on from where that helps."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launcher import rundir
from tests.conftest import RECIPE, Stub, wait_until
from tests.faults.conftest import FAULTS, Fault, Send, failure_of, sealed
from tests.faults.table import TABLE, Cell

DEADLINE_S = 5.0
"""Of a step, so that a hang is one soon."""

RANKS = 2


def local(_: int, pid: int, number: int) -> None:
    os.kill(pid, number)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if isinstance(row["local"], Cell)])
def test_local(name: str, stub: Stub, request: pytest.FixtureRequest) -> None:
    fault, cell = FAULTS[name], TABLE[name]["local"]
    assert isinstance(cell, Cell)
    deadlines = f"deadlines: {{start: 60s, step: {DEADLINE_S:g}s, save: 60s}}"
    stub.recipe.write_text(
        RECIPE.replace("stop_grace: 2s}", f"stop_grace: 2s, relaunch: {{wait: 0.1s}}, {deadlines}}}")
    )
    cgroup = request.getfixturevalue("small_cgroup") if "{cgroup}" in fault.behaviour else None
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        run_with(stub, fault, cgroup, local)
        check(stub, cell, fault, f"rank {RANKS - 1} on localhost", "node 0 on localhost")
        assert bystander.poll() is None, "a foreign process was touched"
    finally:
        bystander.kill()
        bystander.wait()


def run_with(stub: Stub, fault: Fault, cgroup: Path | None, send: Send) -> None:
    """Launch, bring the fault about, and follow the run to its end; by `resume` where the launcher itself is the
    victim. The end must be what the verdict of the first attempt says."""
    victim = fault.behaviour.format(cgroup=cgroup)
    others = [fault.others] * (RANKS - 1)
    later = (*(["train 40"] * (RANKS - 1)), fault.again)
    stub.behave(*others, victim, says=fault.says, patience_s=1, then=later)
    with stub.start(*stub.command, "launch", "stub.yaml") as process:
        if fault.strike is not None or fault.launcher:
            wait_until(lambda: sealed(stub))
        if fault.strike is not None:
            fault.strike(stub, send)
        if fault.launcher:
            process.kill()
        _, stderr = process.communicate(timeout=60)
    returncode = process.returncode
    if fault.launcher:
        done = stub.speechctl("resume", str(stub.run.root))
        returncode, stderr = done.returncode, done.stderr
    if failure_of(stub)["verdict"] == "again" and fault.again != "kill":
        assert (returncode, sealed(stub)[-1]) == (0, 40), stderr
    else:
        last = failure_of(stub, -1)
        assert returncode == last["code"], stderr
        assert f"error: {last['message']}" in stderr and "hint: " in stderr


def check(stub: Stub, cell: Cell, fault: Fault, rank: str, node: str) -> None:
    failure = failure_of(stub, -1 if cell.kind == "no progress" else 0)
    assert (failure["kind"], failure["code"], failure["verdict"]) == (cell.kind, cell.code, cell.verdict), failure
    named = {"rank": rank, "node": node, "launcher": "the launcher of attempt 1", "run": str(stub.run.root)}
    assert named[cell.culprit] in failure["message"], failure
    if cell.kind == "host memory":
        assert "of the 0.20 GiB that its cgroup may use" in failure["message"], "its own cgroup's counter is certain"
    attempts = stub.run.attempts()
    assert len(attempts) == (3 if cell.kind == "no progress" else 2 if cell.verdict == "again" else 1)
    if not fault.launcher and (rows := rundir.read_lines(attempts[0].metrics)):
        (over,) = [row["time"] for row in rundir.read_lines(attempts[0].supervisor) if row["event"] == "ended"]
        allowed = cell.seen_within_s + (DEADLINE_S if cell.kind == "hang" else 0)
        assert over - rows[-1]["time"] < allowed, "it was to be seen sooner"
    wait_until(lambda: not processes(stub), timeout_s=10)


def processes(stub: Stub) -> list[psutil.Process]:
    """Whatever of the run is still there."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(str(stub.run.root) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_stop_that_is_asked_for_is_followed_by_no_other_attempt(stub: Stub) -> None:
    """A rank dies while the others seal for a stop: the run had been asked to end, so it ends."""
    stub.behave("deaf", "deaf", patience_s=0.5)
    with stub.start(*stub.command, "launch", "stub.yaml") as process:
        stub.wait_for_ranks()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        os.kill(rundir.read_json(stub.run.attempts()[0].rank(1))["pid"], signal.SIGKILL)
        process.communicate(timeout=30)
    (attempt,) = stub.run.attempts()
    failure = rundir.read_json(attempt.failure)
    assert process.returncode == failure["code"] == 76
