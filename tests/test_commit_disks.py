"""Saves on file systems made for it: full, read-only, and after a power cut (needs root, loop devices and ext4).

SPEECHCTL_TEST_COUNT: so many power cuts and full disks instead of a few. In the short form ext4 commits its journal
every second instead of every five, so that what a cut 7 s later loses is lost after 2 s.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.committer import Committer
from launcher.rundir import Run
from tests.conftest import count, seed
from tests.disks import cut, filled, mounted, new_image, only_root, read_only
from tests.saving import Alone, Job, Report, Server, alone, files, good, new_run, server, traced
from tests.test_commit_kills import calls_of_a_save, points

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")

pytestmark = only_root


@pytest.fixture(scope="module")
def saver() -> Iterator[Server]:
    with server() as made:
        yield made


# Full and read-only ---------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_saves_and_no_checkpoint(saver: Server, tmp_path: Path) -> None:
    """Somebody else fills the disk, to a random byte; once there is room again, the next save is sealed."""
    dice = random.Random(seed(4))
    n = int(TRIALS or 8)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        for trial in range(n):
            run = new_run(disk / f"run-{trial}")
            committer = alone(run, 1, 2)
            with filled(disk, dice.randrange(12_000)), pytest.MonkeyPatch.context() as patch:
                if trial % 2:  # the room is there when it is asked for, and gone when it is needed
                    patch.setattr(Committer, "_stage", lambda self, need: self.staging.mkdir())
                outcome = committer.settle(committer.save(3, files(3, 0), {"world_size": 1}), Alone())
            assert str(run.checkpoints / ".attempt-0001") in outcome.error
            assert "No space left on device (0.0 MiB needed, " in outcome.error and "inodes free)" in outcome.error
            assert good(run) == run.sealed_steps() == [1, 2]
            assert not list(run.checkpoints.glob(".*"))
            alone(run, 3)
            assert good(run) == [1, 2, 3]
            shutil.rmtree(run.root)
    count("full disks", n)


def test_a_disk_that_turns_read_only_costs_saves_and_no_checkpoint(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        run = new_run(disk / "run")
        committer = alone(run, 1, 2)
        with read_only(disk):
            outcome = committer.settle(committer.save(3, files(3, 0), {"world_size": 1}), Alone())
        assert f"cannot write {run.checkpoints / '.attempt-0001.3'}: Read-only file system (" in outcome.error
        assert good(run) == [1, 2]
        assert committer.save(3, files(3, 0), {"world_size": 1}).error == ""
        assert good(run) == [1, 2, 3]


# Power cuts -----------------------------------------------------------------------------------------------------------


LANES = 5
"""Disks that are cut at the same time: most of a trial is waiting. Odd, so that each has cuts at once and later."""


def after_a_cut(saver: Server, blank: Path, disk: Path, call: str, k: int, wait_s: float) -> tuple[bool, list[int]]:
    """A save of step 3 that is killed at this call, and the power cut after so long.

    Returns:
        whether the save had said that step 3 is sealed, and the steps that are accepted when the power is back.
    """
    path = Path(shutil.copy(blank, disk.with_name(f"{disk.name}-image")))
    with mounted(disk, "-o", f"loop,commit={1 if wait_s < 7 else 5}", str(path)):
        run = new_run(disk / "run")
        alone(run, 1, 2)
        job = Job(str(run.root), 1, [3], str(disk.with_name(f"{disk.name}-report")), waits=True, keep_last=9)
        pid = saver.start(job)
        with traced(pid, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={k}"):
            saver.wait(pid)
        said = Report.read(Path(job.report)).outcomes
        time.sleep(wait_s)
        after = cut(disk, path)
    with mounted(disk, "-o", "loop", str(after)):
        run = Run(disk / "run")
        accepted = good(run)
        for torn in set(run.sealed_steps()) - set(accepted):
            raise AssertionError(f"step {torn} has a manifest and does not verify")
        run.new_attempt()
        alone(run).fence()
        alone(run, 4)
        assert 4 in good(run)
    path.unlink()
    after.unlink()
    return bool(said and not said[0].error), accepted


def test_a_power_cut_loses_nothing_that_was_sealed(saver: Server, tmp_path: Path) -> None:
    """At every stage of the commit, at once and after the journal had time to write the names of what is not there."""
    before = new_run(tmp_path / "before")
    alone(before, 1, 2, 3)
    calls = calls_of_a_save(saver, before, tmp_path)
    # What changes the disk, and what the save does after its last such call.
    stages = {name: calls[name] for name in ("mkdir", "write", "fsync", "rename", "close")}
    # The last is never called: that save comes to its end.
    every = [*points(Counter(stages), int(TRIALS or 12) // 2, 5), ("kexec_load", 1)]
    later_s = 2.0 if TRIALS is None else 7.0
    trials = [(call, k, wait_s) for call, k in every for wait_s in (0.0, later_s)]
    blank = new_image(tmp_path / "blank")

    def some(lane: int) -> int:
        """Those of one lane, one after the other; how many saves had said that they sealed."""
        sealed = 0
        with server() as own:
            for call, k, wait_s in trials[lane::LANES]:
                said, accepted = after_a_cut(own, blank, tmp_path / f"disk-{lane}", call, k, wait_s)
                assert accepted[:2] == [1, 2], f"{call} {k} after {wait_s} s: {accepted}"
                assert not said or 3 in accepted, f"{call} {k} after {wait_s} s: step 3 was sealed and is lost"
                sealed += said
        return sealed

    with ThreadPoolExecutor(LANES) as lanes:
        assert sum(lanes.map(some, range(LANES))) >= 2
    count("power cuts", len(trials))


def test_without_fsync_a_power_cut_is_noticed(saver: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can tell: a writer that fsyncs nothing is caught."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = new_image(tmp_path / "image")
    with mounted(tmp_path / "disk", "-o", "loop,commit=1", str(path)) as disk:
        run = new_run(disk / "run")
        subprocess.run(["sync", "-f", str(disk)], check=True)
        alone(run, 1)
        time.sleep(2)
        after = cut(disk, path)
    with mounted(tmp_path / "disk", "-o", "loop", str(after)):
        run = Run(disk / "run")
        assert run.sealed_steps() == [1] or run.checkpoint(1).exists()
        assert good(run) == []
