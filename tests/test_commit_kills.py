"""SIGKILL and failing system calls at every point of a save, by strace, on real processes that commit.

SPEECHCTL_TEST_COUNT: so many points instead of a few; more than there are means all. Which they are is drawn with
SPEECHCTL_TEST_SEED.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.rundir import Run
from tests.conftest import count, seed
from tests.saving import Job, Report, Server, alone, good, new_run, server, traced

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")

CALLS = "%file,%desc"
"""What strace calls the system calls that take a path or a descriptor."""


@pytest.fixture(scope="module")
def saver() -> Iterator[Server]:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    with server() as made:
        yield made


@pytest.fixture
def before(tmp_path: Path) -> Run:
    """Steps 1, 2 and 3 are sealed; the save of step 4 will remove 1 and 2."""
    run = new_run(tmp_path / "before")
    alone(run, 1, 2, 3)
    return run


def job_for(run: Run, step: int = 4, world_size: int = 1) -> Job:
    return Job(
        str(run.root),
        run.attempts()[-1].number,
        [step],
        str(run.root / "report"),
        world_size=world_size,
        waits=True,
    )


def calls_of_a_save(saver: Server, before: Run, tmp_path: Path, world_size: int = 1, step: int = 4) -> Counter[str]:
    """How often each system call is made, by name."""
    run = Run(shutil.copytree(before.root, tmp_path / "counted"))
    pid = saver.start(job_for(run, step, world_size))
    log = tmp_path / "calls"
    with traced(pid, "-e", f"trace={CALLS}", "-o", str(log)):
        assert saver.wait(pid) == 0
    assert good(run)[-1] == step
    names = re.findall(r"(?m)^\d+ +(\w+)\(", log.read_text()) or re.findall(r"(?m)^(\w+)\(", log.read_text())
    return Counter(names)


def points(calls: Counter[str], n: int, own_seed: int) -> list[tuple[str, int]]:
    """`n` of all the calls, or all; drawn by name first, so that the few that change the disk are not lost among those
    that look at it."""
    every = [(name, k) for name, n in sorted(calls.items()) for k in range(1, n + 1)]
    dice = random.Random(seed(own_seed))
    if n >= len(every):
        return every
    drawn: set[tuple[str, int]] = set()
    while len(drawn) < n:
        name = dice.choice(sorted(calls))
        drawn.add((name, dice.randint(1, calls[name])))
    return sorted(drawn)


def goes_on(run: Run) -> None:
    """The next attempt finds nothing in its way."""
    run.new_attempt()
    committer = alone(run)
    committer.fence()
    alone(run, 9)
    left = [p.name for p in run.checkpoints.iterdir() if not p.name.startswith("step-")]
    assert left == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_at_any_call_leaves_two_that_verify_and_nothing_torn(
    saver: Server, before: Run, tmp_path: Path, world_size: int
) -> None:
    """The save makes a checkpoint and removes two older ones; whatever is there afterwards is whole."""
    calls = calls_of_a_save(saver, before, tmp_path, world_size)
    n = int(TRIALS or (14 if world_size == 1 else 5))
    count("kills in a save", kill_at(points(calls, n, 1), saver, before, tmp_path / "run", world_size))


@pytest.mark.parametrize("rotten", [0, 4])
def test_a_kill_at_any_delete_of_retention_leaves_two_that_verify(
    saver: Server, before: Run, tmp_path: Path, rotten: int
) -> None:
    """Two checkpoints are renamed away and deleted, file by file; also where the newest before has a flipped bit, and
    counts for nothing."""
    if rotten:
        alone(before, rotten)
        path = before.checkpoint(rotten) / "deepspeed" / "rank-0.pt"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    calls = calls_of_a_save(saver, before, tmp_path, step=rotten + 1 if rotten else 4)
    deletes = Counter({name: calls[name] for name in ("rename", "unlink", "unlinkat", "rmdir") if calls[name]})
    assert sum(deletes.values()) > 10, deletes
    every = points(deletes, int(TRIALS or 6), 7)
    count("kills in retention", kill_at(every, saver, before, tmp_path / "run", rotten=rotten))


def kill_at(
    every: list[tuple[str, int]], saver: Server, before: Run, where: Path, world_size: int = 1, rotten: int = 0
) -> int:
    """Kill a save at each of these calls, and look at what is there; returns how often it came to that."""
    killed = 0
    step = rotten + 1 if rotten else 4
    for name, k in every:
        run = Run(shutil.copytree(before.root, where))
        job = job_for(run, step, world_size)
        pid = saver.start(job)
        with traced(pid, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={k}"):
            killed += saver.wait(pid) == -9
        published, whole = run.sealed_steps(), good(run)
        assert set(published) - set(whole) <= {rotten}, f"{name} {k}: torn among {published}"
        assert len(whole) >= 2, f"{name} {k}: {published}"
        outcomes = Report.read(Path(job.report)).outcomes
        assert step in whole or not any(o.error == "" for o in outcomes), f"{name} {k}: said sealed, and is not there"
        goes_on(run)
        shutil.rmtree(run.root)
    assert killed, "nothing was killed"
    return killed


ERRORS = [
    ("write", "ENOSPC"),
    ("write", "EIO"),
    ("write", "EDQUOT"),
    ("fsync", "EIO"),
    ("fsync", "ENOSPC"),
    ("openat", "EROFS"),
    ("mkdir", "EROFS"),
    ("mkdir", "ENOSPC"),
    ("rename", "EIO"),
    ("close", "EIO"),
]


def test_a_call_that_fails_costs_one_save_and_no_checkpoint(saver: Server, before: Run, tmp_path: Path) -> None:
    """The disk is full, read-only or failing at one call of the save of step 4; then step 5 is saved, and is sealed.

    A file whose fsync failed is never fsynced again: the next save writes new ones.
    """
    calls = calls_of_a_save(saver, before, tmp_path)
    dice = random.Random(seed(2))
    failed = 0
    for trial in range(int(TRIALS or 10)):
        name, error = ERRORS[trial % len(ERRORS)]
        k = dice.randint(1, calls[name])
        run = Run(shutil.copytree(before.root, tmp_path / "run"))
        job = job_for(run)
        job.steps = [4, 5]
        pid = saver.start(job)
        with traced(pid, "-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={k}"):
            assert saver.wait(pid) == 0
        report = Report.read(Path(job.report))
        assert report.whole and report.ended == "", report
        first, second = report.outcomes
        published, whole = run.sealed_steps(), good(run)
        assert whole == published and len(whole) >= 2, f"{name} {k} {error}: {published}, whole {whole}"
        assert 5 in whole and second.error == "", f"{name} {k} {error}: {report}"
        assert (4 in whole) == (first.error == ""), f"{name} {k} {error}: {report}"
        if first.error:
            failed += 1
            says = os.strerror(getattr(errno, error))
            assert f"({says}" in first.error or f": {says} (" in first.error, first.error
            assert str(run.checkpoints) in first.error
            assert "needed" in first.error and "MiB and" in first.error, first.error
        shutil.rmtree(run.root)
    assert failed, "no save failed"
    count("failing calls in a save", failed)


def test_three_failures_in_a_row_end_the_run(saver: Server, before: Run) -> None:
    job = job_for(before)
    job.steps = [4, 5, 6, 7]
    pid = saver.start(job)
    with traced(pid, "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"):
        assert saver.wait(pid) == 0
    report = Report.read(Path(job.report))
    assert [o.step for o in report.outcomes] == [4, 5]
    assert report.ended.startswith("StorageError: three checkpoints in a row could not be sealed"), report.ended
    assert good(before) == [1, 2, 3]
    assert not list(before.checkpoints.glob(".*"))


def test_strace_is_what_we_think() -> None:
    """`when` counts the calls of one name."""
    done = subprocess.run(
        ["strace", "-q", "-e", "trace=chdir", "-e", "inject=chdir:error=EIO:when=2", "sh", "-c", "cd / && cd /"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "EIO" in done.stderr
