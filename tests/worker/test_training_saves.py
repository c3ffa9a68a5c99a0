"""Two real ranks under DeepSpeed, and a save of theirs that is killed, that fails, or that is damaged later.

SPEECHCTL_TEST_COUNT: so many of each, over ZeRO 1, 2 and 3, instead of a few at one of them. What befalls which call is
drawn with SPEECHCTL_TEST_SEED. The same on the committer alone, many times: tests/test_commit_kills.py.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from launcher.rundir import MANIFEST, Run
from launcher.sealing import files_under
from tests.conftest import count, seed
from tests.disks import mounted, only_root
from tests.test_commit_kills import points
from tests.worker import worlds
from tests.worker.harm import Harm, inject
from tests.worker.runs import events
from tests.worker.undisturbed import EVERY, Undisturbed, assert_same, said, whole

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")
STAGES = ["1", "2", "3"]

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
    pytest.mark.timeout(3600 if TRIALS else 600),
]


STEPS = EVERY * (4 + -(-int(TRIALS or 9) // 3))
"""Of each run: as many saves as are killed at one stage, and some."""


def share(stage: str) -> int:
    """How many of the trials are at this stage."""
    return len(range(STAGES.index(stage), int(TRIALS or 9), len(STAGES)))


FAULTS = [
    ("full", "No space left on device"),
    ("read-only", "Read-only file system"),
    ("write", "EIO"),
    ("fsync", "EIO"),
    ("write", "ENOSPC"),
]


def at(own_seed: int) -> list[str]:
    """The stages to try."""
    return STAGES if TRIALS else [random.Random(seed(own_seed)).choice(STAGES)]


def copied(run: Run, undisturbed: Run) -> Run:
    """As after its one attempt, from which it goes on."""
    shutil.copytree(undisturbed.attempts_dir, run.attempts_dir)
    shutil.copytree(undisturbed.checkpoints, run.checkpoints, dirs_exist_ok=True)
    return run


@pytest.mark.parametrize("stage", at(0))
def test_a_rank_killed_at_any_call_of_a_save_costs_that_save_at_most(
    undisturbed: Undisturbed, tmp_path: Path, stage: str
) -> None:
    """One run, killed in one save after the other, goes on from the newest each time and ends as the undisturbed."""
    n = share(stage)
    dice = random.Random(seed(1))
    by_rank = {rank: points(undisturbed.calls(stage, STEPS, rank), 2 * n, 10 + rank) for rank in (0, 1)}
    run = undisturbed.prepare(tmp_path / "run", stage, STEPS)
    killed = 0
    for _ in range(2 * n):
        rank = int(dice.random() < 0.3)
        call, k = by_rank[rank].pop(dice.randrange(len(by_rank[rank])))
        before = run.sealed_steps()
        target = EVERY * (max(before, default=EVERY) // EVERY + 1)
        harm = Harm(target, rank, inject(call, "signal=KILL", k))
        killed += worlds.train_until_killed(2, run.new_attempt(), harm, target + 1)
        published = whole(run)
        assert len(published) >= min(2, max(1, len(before))), f"{call} {k} of rank {rank}: {before}, {published}"
        assert target in published or target not in said(run), f"{call} {k} of rank {rank}: said sealed, and is not"
        if killed == n:
            break
    assert killed == n
    worlds.train(2, [run.new_attempt()])
    assert_same(run, undisturbed.run(stage, STEPS))
    count("kills in a save of two real ranks", killed)


@pytest.mark.parametrize("stage", at(1))
def test_a_flipped_bit_is_found_by_all_ranks_before_anything_is_unpickled(
    undisturbed: Undisturbed, tmp_path: Path, stage: str
) -> None:
    """One bit of the newest, and in every third run one of the second newest too: all ranks go back to the one before
    together, have none of the damaged files unpickled, and end as the undisturbed run."""
    complete = undisturbed.run(stage, STEPS)
    dice = random.Random(seed(2))
    trials = []
    for trial in range(share(stage)):
        run = copied(undisturbed.prepare(tmp_path / f"run-{trial}", stage, STEPS), complete)
        *_, good, newer, newest = run.sealed_steps()
        damaged = {newest, newer} if trial % 3 == 2 else {newest}
        for step in damaged:
            path = dice.choice([*files_under(run.checkpoint(step)), run.checkpoint(step) / MANIFEST])
            data = bytearray(path.read_bytes())
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
        trials.append((run, good if newer in damaged else newer, damaged))
    worlds.train(2, [run.new_attempt() for run, _, _ in trials])
    for run, taken, damaged in trials:
        attempt = run.attempts()[-1]
        assert [e["step"] for e in events(attempt, "started")] == [taken]
        problems = [e["problem"] for e in events(attempt, "put_aside")]
        for step, problem in zip(sorted(damaged)[::-1], problems, strict=True):
            assert str(run.checkpoint(step)) in problem
        assert {p.name for p in run.checkpoints.glob(".bad-*")} == {f".bad-step-{step:08d}" for step in damaged}
        for rank in (0, 1):
            loaded = (run.root / f"loaded-{rank}").read_text().splitlines()
            assert loaded and all(Path(name).is_relative_to(run.checkpoint(taken)) for name in loaded), loaded
        assert_same(run, complete)
    count("flipped bits under two real ranks", len(trials))


@only_root
@pytest.mark.parametrize("stage", at(2))
def test_a_disk_that_fails_costs_one_save_and_no_step(undisturbed: Undisturbed, tmp_path: Path, stage: str) -> None:
    """Full, read-only, or failing at one call, while a checkpoint is saved and training goes on beside it: that save
    says what it needed, where, and what was free; all others are sealed, and no line of what was done is missing."""
    complete = undisturbed.run(stage, STEPS)
    dice = random.Random(seed(3))
    n = int(TRIALS or len(FAULTS))
    faults = dice.sample([FAULTS[k % len(FAULTS)] for k in range(n)], n)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=32m", "tmpfs") as disk:
        trials: list[tuple[Run, Harm, str]] = []
        for fault, error in faults[STAGES.index(stage) :: len(STAGES)] if TRIALS else faults:
            step = EVERY * dice.randrange(3, STEPS // EVERY)
            rank = 0 if fault in ("full", "read-only") else dice.randrange(2)
            if fault == "full":
                harm = Harm(step, full=str(disk))
            elif fault == "read-only":
                harm = Harm(step, read_only=str(disk))
            else:
                calls = undisturbed.calls(stage, STEPS, rank)
                harm = Harm(step, rank, inject(fault, f"error={error}", dice.randint(1, calls[fault])))
            run = undisturbed.prepare(disk / f"run-{len(trials)}", stage, STEPS)
            trials.append((run, harm, error if " " in error else os.strerror(getattr(errno, error))))
        worlds.train(2, [run.new_attempt() for run, _, _ in trials], harms=[harm for _, harm, _ in trials])
        costly = 0
        for run, harm, error in trials:
            (attempt,) = run.attempts()
            failed = events(attempt, "save_failed")
            assert [e["step"] for e in failed] in ([], [harm.step]), failed
            for said_ in (e["error"] for e in failed):
                assert str(run.root) in said_ and error in said_, said_
                assert " MiB needed, " in said_ and " inodes free)" in said_, said_
            wanted = set(range(EVERY, STEPS + 1, EVERY)) - {e["step"] for e in failed}
            assert {e["step"] for e in events(attempt, "sealed")} == wanted, harm
            assert whole(run) == sorted(wanted)[-3:], harm
            assert not list(run.checkpoints.glob(".*"))
            assert_same(run, complete)
            costly += len(failed)
        assert costly >= sum(bool(harm.full or harm.read_only) for _, harm, _ in trials)
    count("failing disks under two real ranks", len(trials))
