"""Saves by real processes, without torch: all ranks together or none, by the newest attempt alone.

SPEECHCTL_TEST_COUNT: so many orphans, races and flipped bits instead of a few.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import committer as committing
from launcher import rundir, sealed, sealing
from launcher.committer import Committer
from launcher.errors import DataError, InfrastructureError
from launcher.retention import Rules
from launcher.rundir import Run
from tests.conftest import count, seed
from tests.saving import Alone, Job, Report, Server, alone, files, good, new_run, server, stopped

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")


@pytest.fixture(scope="module")
def saver() -> Iterator[Server]:
    with server() as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "run")


def job(run: Run, *steps: int, **more: object) -> Job:
    return Job(str(run.root), 1, list(steps), str(run.root / "report"), **more)  # type: ignore[arg-type]


def report(saver: Server, wanted: Job) -> Report:
    assert saver.wait(saver.start(wanted)) == 0
    return Report.read(Path(wanted.report))


def test_three_ranks_save_and_retention_follows(saver: Server, run: Run) -> None:
    said = report(saver, job(run, 1, 2, 3, 4, world_size=3))
    assert [o.error for o in said.outcomes] == [""] * 4
    assert said.outcomes[0].bytes == 3 * 20_003
    assert good(run) == [3, 4]
    assert not list(run.checkpoints.glob(".*"))
    manifest = sealing.manifest_of(run.checkpoint(4))
    assert (manifest["step"], manifest["run"], manifest["attempt"]) == (4, "run", 1)


def test_one_rank_of_three_fails_the_save_on_all_and_the_next_is_sealed(saver: Server, run: Run) -> None:
    said = report(saver, job(run, 1, 2, 3, world_size=3, fails=[2, 2]))
    assert [o.error for o in said.outcomes] == ["", "rank 2: ValueError: no such thing", ""]
    assert good(run) == [1, 3]
    assert not list(run.checkpoints.glob(".*"))


def test_a_rank_that_does_not_vote_costs_the_deadline_and_no_more(saver: Server, run: Run) -> None:
    """Rank 1 stops in step 2: the vote has a deadline of its own, and rank 0 goes on to its end by itself."""
    wanted = job(run, 1, 2, world_size=2, mute=[1, 2], timeout_s=1.0)
    pid = saver.start(wanted)
    children = Path(f"/proc/{pid}/task/{pid}/children")
    rank_1 = 0
    try:
        deadline = time.monotonic() + 20
        while not rank_1:
            assert time.monotonic() < deadline
            rank_1 = next((int(p) for p in children.read_text().split()), 0)
        stopped(rank_1)
        while len(Report.read(Path(wanted.report)).outcomes) < 1 or list(run.checkpoints.glob(".attempt-*")):
            assert time.monotonic() < deadline, "rank 0 waits for ever"
            time.sleep(0.05)
    finally:
        for one in filter(None, (rank_1, pid)):  # 0 would be ourselves, and all beside us
            os.kill(one, signal.SIGKILL)
        saver.wait(pid)
    assert good(run) == [1]


def test_a_rename_that_may_not_last_is_taken_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory could not be fsynced: the save was reported as failed and stood there nevertheless, in the way of
    every further try to save that step."""
    committer = alone(run, 1)
    sync = rundir.sync_dir

    def fails(path: Path) -> None:
        if path == run.checkpoints:
            raise OSError(5, "Input/output error")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "sync_dir", fails)
        outcome = committer.settle(committer.save(2, files(2, 0), {"world_size": 1}), Alone())
    assert "Input/output error" in outcome.error
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000001"]
    alone(run, 2)


def test_the_disk_begins_before_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte was still in memory when fsync came, which then took a third of the time. What the disk was told to
    begin with is fsynced and hashed all the same, and so is the rest."""
    piece = committing.PIECE
    monkeypatch.setattr(committing, "WINDOW", 2 * piece)
    said: list[tuple[str, int, int]] = []
    sync = os.fsync
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: said.append(("begin", at, size)))

    def fsync(fd: int) -> None:
        said.append(("fsync", 0, os.fstat(fd).st_size))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    data = bytes(range(256)) * (piece // 256)
    path = tmp_path / "x"
    digest = committing.write_hashed(path, lambda sink: [sink.write(part) for part in (data * 3, data[:5], data * 2)])
    assert said == [
        ("begin", 0, 2 * piece),
        ("begin", 2 * piece, 2 * piece + 5),
        ("fsync", 0, 5 * piece + 5),
    ]
    assert path.read_bytes() == data * 3 + data[:5] + data * 2
    assert digest == sealing.digest_file(path)


def test_who_has_the_run_is_asked_at_every_save(run: Run) -> None:
    """The launcher is killed and `resume` typed while its ranks finish a long step: their save comes after the fence.

    It was sealed under a step that the new attempt had yet to reach, whose own seal of that step then failed.
    """
    orphan = alone(run, 1)
    run.new_attempt()
    alone(run).fence()
    outcome = orphan.save(7, files(7, 0), {})
    assert outcome.superseded
    with pytest.raises(InfrastructureError, match="attempt 2 has taken over"):
        orphan.settle(outcome, Alone())
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000001"]


def test_no_two_saves_are_written_under_one_name(run: Run) -> None:
    """An NFS client takes a name for the directory that had it, for up to a minute: another node's rank would have
    written into the checkpoint that was sealed just before. What a save left there is gone with the next."""
    committer = alone(run, 1)
    first = committer.staging
    first.mkdir()
    assert not committer.save(2, files(2, 0), {"world_size": 1}).error
    assert committer.staging != first and not list(run.checkpoints.glob(".*"))
    assert good(run) == [1, 2]


def test_a_fence_between_the_mkdir_and_the_files_is_not_jumped(run: Run) -> None:
    """On its way to `deepspeed/…` a rank made all missing parents, the fenced staging directory among them: the orphan
    then found every file it had written there, and sealed them."""
    orphan = Committer(run.attempts()[-1], Alone(), Rules())
    stage = orphan._stage

    def stage_then_fence(need: int) -> None:
        stage(need)
        run.new_attempt()
        alone(run).fence()

    orphan._stage = stage_then_fence  # type: ignore[method-assign]
    assert orphan.save(7, files(7, 0), {}).error
    assert not list(run.checkpoints.iterdir())


def test_an_orphan_woken_before_its_rename_is_never_accepted(saver: Server, tmp_path: Path) -> None:
    """It is stopped with all votes in and the manifest written; it wakes when the next attempt has fenced, or has
    sealed the very same step."""
    n = int(TRIALS or 12)
    for trial in range(n):
        run = new_run(tmp_path / f"run-{trial}")
        wanted = job(run, 4, stop_before_rename=True)
        pid = saver.start(wanted)
        assert stopped(pid)
        assert list(run.checkpoints.glob(".attempt-*/MANIFEST.json")), "stopped too early"
        run.new_attempt()
        alone(run).fence()
        if trial % 2:
            alone(run, 4)
        os.kill(pid, signal.SIGCONT)
        assert saver.wait(pid) == 0
        assert Report.read(Path(wanted.report)).ended or Report.read(Path(wanted.report)).outcomes[0].error
        assert good(run) == [4] * (trial % 2)
        if trial % 2:
            assert sealing.manifest_of(run.checkpoint(4))["attempt"] == 2
        shutil.rmtree(run.root)
    count("orphans", n)


def test_of_many_launchers_one_writes(saver: Server, tmp_path: Path) -> None:
    """They race for the lock; whoever has it makes an attempt, fences and saves. The others say who it is."""
    n = int(TRIALS or 10)
    for trial in range(n):
        run = new_run(tmp_path / f"run-{trial}")
        jobs = [
            Job(str(run.root), 0, [1, 2], str(run.root / f"report-{k}"), lock=True, fence=True, waits=True)
            for k in range(3)
        ]
        pids = [saver.start(one) for one in jobs]
        assert all(stopped(pid) for pid in pids)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        for pid in pids:
            assert saver.wait(pid) == 0
        reports = [Report.read(Path(one.report)) for one in jobs]
        # A lock is waited for, for a second: the second launcher may get it when the first is done. Its steps are
        # sealed by then, and it says so.
        won = [r for r in reports if r.outcomes and not r.outcomes[0].error]
        assert len(won) == 1, reports
        for r in reports:
            assert r is won[0] or "exists already" in r.outcomes[0].error if r.outcomes else "in use by" in r.ended, r
        assert good(run) == [1, 2]
        attempt = sealing.manifest_of(run.checkpoint(1))["attempt"]
        assert sealing.manifest_of(run.checkpoint(2))["attempt"] == attempt
        shutil.rmtree(run.root)
    count("races for the lock", n)


# Damage ---------------------------------------------------------------------------------------------------------------


def flips(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_is_found(run: Run) -> None:
    """In any file of a checkpoint, its manifest too, at any place."""
    alone(run, 1, 2)
    folder = run.checkpoint(2)
    paths = [p for p in (*sealing.files_under(folder), folder / rundir.MANIFEST) if p.stat().st_size]
    dice = random.Random(seed(3))
    n = int(TRIALS or 100)
    for _ in range(n):
        path = dice.choice(paths)
        whole = path.read_bytes()
        bit = dice.randrange(8 * len(whole))
        path.write_bytes(flips(whole, bit))
        with pytest.raises(DataError):
            sealed.verify(run, 2)
        path.write_bytes(whole)
    assert good(run) == [1, 2]
    count("flipped bits", n)


def test_every_truncation_is_found(run: Run) -> None:
    alone(run, 1)
    folder = run.checkpoint(1)
    tried = 0
    for path in (*sealing.files_under(folder), folder / rundir.MANIFEST):
        whole = path.read_bytes()
        cuts = {0, 1, len(whole) // 2, len(whole) - 1, len(whole) - 4096, len(whole) // 4096 * 4096, len(whole) - 2}
        # The last byte of a manifest is its newline, without which it says the same.
        for at in sorted(c for c in cuts if 0 <= c < len(whole) - (path.name == rundir.MANIFEST)):
            path.write_bytes(whole[:at])
            with pytest.raises(DataError):
                sealed.verify(run, 1)
            tried += 1
        path.write_bytes(whole + b"\0")
        with pytest.raises(DataError):
            sealed.verify(run, 1)
        path.write_bytes(whole)
    assert good(run) == [1]
    count("truncations", tried)


SHARD, OTHER = "deepspeed/rank-0.pt", "deepspeed/rank-1.pt"


def missing(run: Run, other: Run) -> None:
    (run.checkpoint(2) / SHARD).unlink()


def extra(run: Run, other: Run) -> None:
    (run.checkpoint(2) / "deepspeed" / "stray.pt").write_bytes(b"")


def swapped(run: Run, other: Run) -> None:
    a, b = run.checkpoint(2) / SHARD, run.checkpoint(2) / OTHER
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def of_another_step(run: Run, other: Run) -> None:
    shutil.copy(run.checkpoint(1) / SHARD, run.checkpoint(2) / SHARD)


def manifest_of_another_step(run: Run, other: Run) -> None:
    shutil.copy(run.checkpoint(1) / rundir.MANIFEST, run.checkpoint(2) / rundir.MANIFEST)


def another_step_under_this_name(run: Run, other: Run) -> None:
    shutil.rmtree(run.checkpoint(2))
    shutil.copytree(run.checkpoint(1), run.checkpoint(2))


def another_run(run: Run, other: Run) -> None:
    shutil.rmtree(run.checkpoint(2))
    shutil.copytree(other.checkpoint(2), run.checkpoint(2))


def edited(run: Run, other: Run) -> None:
    path = run.checkpoint(2) / rundir.MANIFEST
    path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 2'))


def edited_and_sealed_anew(run: Run, other: Run) -> None:
    """A name that leads out of the checkpoint, under a digest that fits."""
    path = run.checkpoint(2) / rundir.MANIFEST
    manifest = rundir.read_json(path)
    manifest["files"]["../../outside"] = manifest["files"].pop(SHARD)
    del manifest["digest"]
    rundir.write_json(path, {**manifest, "digest": sealing.digest_json(manifest)})
    shutil.move(run.checkpoint(2) / SHARD, run.root / "outside")


def no_manifest(run: Run, other: Run) -> None:
    (run.checkpoint(2) / rundir.MANIFEST).unlink()


@pytest.mark.parametrize(
    "harm",
    [
        missing,
        extra,
        swapped,
        of_another_step,
        manifest_of_another_step,
        another_step_under_this_name,
        another_run,
        edited,
        edited_and_sealed_anew,
        no_manifest,
    ],
)
def test_harm_is_found_before_use(saver: Server, tmp_path: Path, harm: object) -> None:
    run, other = new_run(tmp_path / "run"), new_run(tmp_path / "other")
    for one in (run, other):
        assert [o.error for o in report(saver, job(one, 1, 2, world_size=2)).outcomes] == ["", ""]
    assert good(run) == [1, 2]
    assert callable(harm)
    harm(run, other)
    with pytest.raises(DataError):
        sealed.verify(run, 2)
    assert sealed.verify(run, 1)["step"] == 1


def test_a_directory_that_cannot_be_listed_is_told_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at what all ranks have written was the one call whose failure said neither need nor room."""
    run = new_run(tmp_path / "run")
    committer = Committer(run.attempts()[-1], Alone(), Rules(last=9))

    def files_under(root: Path) -> list[Path]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(root))

    with monkeypatch.context() as patched:
        patched.setattr(sealing, "files_under", files_under)
        outcome = committer.settle(committer.save(1, files(1, 0), {"world_size": 1}), Alone())
    assert f"{run.checkpoints}/.attempt-0001.1: Input/output error (" in outcome.error and "MiB needed" in outcome.error
    assert not committer.settle(committer.save(2, files(2, 0), {"world_size": 1}), Alone()).error
