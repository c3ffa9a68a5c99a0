"""Checkpoints of one rank with a stand-in engine: sealed or absent, newest that verifies, kept by rule."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher import retention, rundir, sealed, sealing
from launcher.committer import File, Sink
from launcher.errors import DataError, StorageError, UsageError
from launcher.recipe import Checkpoint
from launcher.retention import Rules
from launcher.rundir import Attempt, Run
from launcher.worker.checkpoint import Checkpoints, Identity, Progress, rng_state, set_rng_state
from launcher.worker.data import Tensors
from launcher.worker.engine import Engine
from launcher.worker.host_memory import HostMemory
from launcher.worker.ranks import Ranks
from launcher.worker.sampler import Cursor, Segment
from tests.disks import mounted, only_root, read_only

IDENTITY = Identity(world_size=1, zero_stage="2", precision="fp32", backbone="b", packs="p", evaluation="e", order="o")


class OneNumber(Engine):
    """An engine whose whole state is one number in one file."""

    def __init__(self) -> None:
        self.value = 0
        self.fails = False

    def backward(self, tensors: Tensors, factor: float, last: bool) -> torch.Tensor:
        raise AssertionError("not trained here")

    def step(self, learning_rate: float) -> float:
        raise AssertionError("not trained here")

    def snapshot(self, memory: HostMemory) -> list[File]:
        value = json.dumps(self.value).encode()

        def write(sink: Sink) -> None:
            sink.write(value)
            if self.fails:
                raise OSError(28, "No space left on device")

        return [File("state.json", len(value), write)]

    def load(self, folder: Path) -> None:
        self.value = json.loads((folder / "state.json").read_text())


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    run = Run(tmp_path / "run")
    run.root.mkdir()
    run.checkpoints.mkdir()
    return run.new_attempt()


def checkpoints(
    attempt: Attempt,
    engine: Engine | None = None,
    identity: Identity = IDENTITY,
    asynchronous: bool = True,
    keep: int = 9,
) -> Checkpoints:
    options = Checkpoint(every_steps=1, keep_last=keep, asynchronous=asynchronous)
    return Checkpoints(attempt, engine or OneNumber(), Ranks(), identity, options)


def save(them: Checkpoints, progress: Progress) -> str:
    """The error; empty where it was sealed."""
    them.begin(progress)
    return them.settle().error


def saved(attempt: Attempt, *steps: int) -> Checkpoints:
    """A run with these steps sealed; the engine's state is the step."""
    engine = OneNumber()
    them = checkpoints(attempt, engine)
    for step in steps:
        engine.value = step
        assert not save(them, Progress(step=step, cursor=Cursor(0, [Segment(1, 1, step)])))
        rundir.append_line(attempt.events, {"event": "sealed", "step": step})
    return them


def test_what_is_sealed_comes_back(attempt: Attempt) -> None:
    saved(attempt, 5, 10)
    engine = OneNumber()
    progress, put_aside = checkpoints(attempt, engine).restore(fresh=False)
    assert progress is not None
    assert (engine.value, progress.step, put_aside) == (10, 10, [])
    assert progress.cursor.history == [Segment(1, 1, 10)]
    assert not list(attempt.run.checkpoints.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "extra", "manifest"])
def test_a_damaged_newest_is_put_aside_and_the_one_before_is_taken(attempt: Attempt, damage: str) -> None:
    saved(attempt, 5, 10)
    folder = attempt.run.checkpoint(10)
    state = folder / "state.json"
    if damage == "flip":
        state.write_bytes(b"1\xb0"[:1] + bytes([state.read_bytes()[1] ^ 1]))
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "missing":
        state.unlink()
    elif damage == "extra":
        (folder / "stray.pt").write_bytes(b"x")
    else:
        manifest = folder / rundir.MANIFEST
        manifest.write_text(manifest.read_text().replace('"step": 10', '"step": 11'))
    engine = OneNumber()
    progress, put_aside = checkpoints(attempt, engine).restore(fresh=False)
    assert progress is not None
    assert (engine.value, progress.step) == (5, 5)
    assert len(put_aside) == 1 and str(folder) in put_aside[0]
    assert [p.name for p in attempt.run.checkpoints.glob(".bad-*")] == [".bad-step-00000010"]


def test_a_run_that_sealed_and_finds_nothing_refuses(attempt: Attempt) -> None:
    """DeepSpeed starts from step 0 with exit 0 when its `latest` is missing; here that takes the word --fresh."""
    them = saved(attempt, 5)
    for path in attempt.run.checkpoint(5).iterdir():
        path.unlink()
    attempt.run.checkpoint(5).rmdir()
    with pytest.raises(DataError, match="has sealed checkpoints before") as caught:
        them.restore(fresh=False)
    assert "--fresh" in caught.value.hint
    assert them.restore(fresh=True) == (None, [])


def test_a_run_that_started_over_may_start_again_before_it_has_sealed(attempt: Attempt) -> None:
    """An attempt with --fresh that was killed before its first seal could not be resumed, nor come back by itself: the
    run had sealed checkpoints before, of the time before it."""
    saved(attempt, 5)
    assert checkpoints(attempt.run.new_attempt()).restore(fresh=True) == (None, [])
    again = attempt.run.new_attempt()
    assert checkpoints(again).restore(fresh=False) == (None, [])
    saved(again, 3)
    sealed.rename_aside(attempt.run.checkpoint(3), "gone")
    with pytest.raises(DataError, match="has sealed checkpoints before"):
        checkpoints(attempt.run.new_attempt()).restore(fresh=False)


def test_who_went_on_from_a_checkpoint_says_that_there_was_one(attempt: Attempt) -> None:
    """A kill, or a power cut, may come between a seal and the line that tells of it."""
    rundir.append_line(attempt.events, {"event": "started", "step": 5})
    with pytest.raises(DataError, match="has sealed checkpoints before"):
        checkpoints(attempt.run.new_attempt()).restore(fresh=False)


def test_one_that_was_put_aside_says_that_there_was_one(attempt: Attempt) -> None:
    """The first resume refused, and put the only checkpoint aside; the second began at step 0 without a word."""
    saved(attempt, 5)
    attempt.events.unlink()
    (attempt.run.checkpoint(5) / "state.json").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(DataError, match="has sealed checkpoints before"):
            checkpoints(attempt.run.new_attempt()).restore(fresh=False)
    assert checkpoints(attempt.run.new_attempt()).restore(fresh=True) == (None, [])
    assert checkpoints(attempt.run.new_attempt()).restore(fresh=False) == (None, [])
    assert [p.name for p in attempt.run.checkpoints.iterdir()] == [".before-fresh-bad-step-00000005"]


@only_root
def test_a_disk_that_is_read_only_is_named_for_what_it_is(tmp_path: Path) -> None:
    """What is in the way of a resume cannot be put aside there: that was told as an error of the training code."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        run = Run(disk / "run")
        run.root.mkdir()
        run.checkpoints.mkdir()
        saved(run.new_attempt(), 5, 10)
        (run.checkpoint(10) / "state.json").write_bytes(b"?")
        (run.checkpoints / ".attempt-0001").mkdir()
        them = checkpoints(run.new_attempt())
        with read_only(disk):
            for work in (them.fence, lambda: them.restore(fresh=False), lambda: them.restore(fresh=True)):
                with pytest.raises(StorageError, match=f"cannot write {run.checkpoints}: Read-only file system"):
                    work()
        them.fence()
        progress, _ = them.restore(fresh=False)
        assert progress is not None and progress.step == 5


def test_fresh_keeps_what_was_sealed(attempt: Attempt) -> None:
    saved(attempt, 5).restore(fresh=True)
    assert [p.name for p in attempt.run.checkpoints.iterdir()] == [".before-fresh-step-00000005"]


def test_after_fresh_no_step_is_judged_by_what_an_older_one_was(attempt: Attempt) -> None:
    """Retention kept the second step 5 for the WER of the first."""
    run = attempt.run
    saved(attempt, 5)
    run.evaluations.mkdir()
    rundir.write_json(run.evaluation(5), {"wer": 0.1})
    again = run.new_attempt()
    checkpoints(again).restore(fresh=True)
    saved(again, 5, 6, 7)
    assert retention.surplus(run, Rules(), {5, 6, 7}) == [5]
    assert (run.root / ".before-fresh-evaluations" / run.evaluation(5).name).exists()


def test_a_run_that_never_sealed_starts_at_step_0(attempt: Attempt) -> None:
    assert checkpoints(attempt).restore(fresh=False) == (None, [])


def test_the_steps_that_are_lost_are_counted_also_where_their_checkpoint_is_gone(attempt: Attempt) -> None:
    saved(attempt, 5, 10)
    them = checkpoints(attempt.run.new_attempt())
    assert them.restore(fresh=False)[0] is not None and them.lost == 0
    sealed.rename_aside(attempt.run.checkpoint(10), "gone")
    assert them.restore(fresh=False)[0] is not None and them.lost == 5
    # What went on from step 5 has lost them; the next one loses nothing more.
    rundir.append_line(them.committer.attempt.events, {"event": "started", "step": 5})
    again = checkpoints(attempt.run.new_attempt())
    assert again.restore(fresh=False)[0] is not None and again.lost == 0
    assert again.restore(fresh=True) == (None, []) and again.lost == 0


@pytest.mark.parametrize("field", ["zero_stage", "precision", "backbone", "packs", "evaluation", "order"])
def test_a_run_of_another_shape_is_refused_and_nothing_is_put_aside(attempt: Attempt, field: str) -> None:
    saved(attempt, 5)
    other = Identity(**{**vars(IDENTITY), field: "other"})
    with pytest.raises(UsageError, match=field):
        checkpoints(attempt, identity=other).restore(fresh=False)
    assert attempt.run.sealed_steps() == [5]


def test_a_failed_save_leaves_nothing_and_the_third_in_a_row_ends_the_run(attempt: Attempt) -> None:
    engine = OneNumber()
    them = checkpoints(attempt, engine)
    engine.fails = True
    for step in (1, 2):
        assert "No space left" in save(them, Progress(step=step))
        assert not list(attempt.run.checkpoints.iterdir())
    engine.fails = False
    assert not save(them, Progress(step=3))
    engine.fails = True
    assert save(them, Progress(step=4)) and save(them, Progress(step=5))
    with pytest.raises(StorageError, match="three checkpoints in a row"):
        save(them, Progress(step=6))
    assert attempt.run.sealed_steps() == [3]


@pytest.mark.parametrize(("where", "name"), [(rundir, "read_json"), (sealing, "digest_file")])
def test_what_cannot_be_read_is_not_put_aside(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    """A stale handle or an I/O error on one rank says nothing about a checkpoint; one after the other was renamed."""
    them = saved(attempt, 5)

    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(where, name, stale)
    with pytest.raises(StorageError, match="Stale file handle"):
        them.restore(fresh=False)
    assert attempt.run.sealed_steps() == [5]


def test_a_step_without_a_manifest_is_out_of_the_way(attempt: Attempt) -> None:
    """A partial copy had no manifest: nobody saw it, and the seal of that step failed for ever."""
    saved(attempt, 5, 10)
    (attempt.run.checkpoint(10) / rundir.MANIFEST).unlink()
    them = checkpoints(attempt.run.new_attempt())
    them.fence()
    progress, put_aside = them.restore(fresh=False)
    assert progress is not None and progress.step == 5
    assert put_aside == [f"{attempt.run.checkpoint(10)} has no MANIFEST.json"] and them.lost == 5
    assert not save(them, Progress(step=10))
    assert [p.name for p in attempt.run.checkpoints.glob(".bad-*")] == [".bad-step-00000010"]


def test_random_numbers_go_on_where_they_stopped() -> None:
    def draw() -> tuple[float, float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), float(np.random.randn()), random.random()

    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = [draw() for _ in range(3)]
    set_rng_state(state)
    assert [draw() for _ in range(3)] == expected


def test_progress_survives_json() -> None:
    for progress in (Progress(), Progress(9, Cursor(2, [Segment(2, 1, 4)]), 6, True, 0.25, 6)):
        assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
