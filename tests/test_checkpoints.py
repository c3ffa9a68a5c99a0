"""`speechctl checkpoint`: what a person sees of it (whole transcripts), and what it does and leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import checkpoints, rundir, sealed, sealing, why
from launcher.committer import Committer
from launcher.errors import DataError, NotFoundError, UsageError
from launcher.lock import RunLock
from launcher.retention import Rules
from launcher.rundir import Run
from tests.conftest import Golden, made_run
from tests.saving import Alone, files
from tests.test_cli import Transcript, compare, speechctl, transcript
from tests.test_retention import READER
from tests.test_rundir import held

__all__ = ["speechctl"]

IDENTITY = {"world_size": 2, "zero_stage": "2", "precision": "bf16"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Steps 1 to 6 are sealed; 2, 4 and 6 were evaluated, and 6 is the best."""
    made = made_run(tmp_path / "runs" / "stub", "finished")
    shutil.rmtree(made.checkpoints)
    made.checkpoints.mkdir()
    rundir.write_json(made.provenance, {"id": "stub"})
    committer = Committer(made.attempts()[-1], Alone(), Rules(last=9))
    for step in range(1, 7):
        assert not committer.save(step, files(step, 0), {"identity": IDENTITY}).error
    rundir.write_json(made.best, {"step": 6, "wer": 15 / 40})
    made.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": 1.0, "command": "speechctl launch"}))
    return made


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def damage(run: Run) -> None:
    """One checkpoint of each kind of damage, and one with several."""
    flip(run.checkpoint(1) / "deepspeed" / "rank-0.pt")
    os.truncate(run.checkpoint(2) / "deepspeed" / "rank-0.pt", 500)
    (run.checkpoint(2) / "rank-00000.rng.json").unlink()
    (run.checkpoint(2) / "new").touch()
    (run.checkpoint(3) / rundir.MANIFEST).unlink()
    shutil.rmtree(run.checkpoint(4))
    shutil.copytree(run.checkpoint(5), run.checkpoint(4))


@contextmanager
def reader(folder: Path) -> Iterator[None]:
    """Another process that reads a checkpoint."""
    command = [sys.executable, "-c", READER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        try:
            yield
        finally:
            process.kill()


# Transcripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("checkpoint-ls", "checkpoint ls runs/stub", 0),
        ("checkpoint-ls-json", "checkpoint ls runs/stub --json", 0),
        ("checkpoint-verify", "checkpoint verify runs/stub", 0),
        ("checkpoint-verify-steps", "checkpoint verify runs/stub best 3", 0),
        ("checkpoint-verify-json", "checkpoint verify runs/stub last --json", 0),
        ("checkpoint-verify-no-step", "checkpoint verify runs/stub 3 7", 6),
        ("checkpoint-prune-dry-run", "checkpoint prune runs/stub --dry-run", 0),
        ("checkpoint-prune-json", "checkpoint prune runs/stub --dry-run --json", 0),
        ("checkpoint-pin-no-step", "checkpoint pin runs/stub 7", 6),
        ("checkpoint-unpin-not-pinned", "checkpoint unpin runs/stub 4", 2),
        ("checkpoint-no-run", "checkpoint ls nowhere", 6),
    ],
)
def test_commands(
    name: str, arguments: str, code: int, run: Run, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    sealed.pin(run, 2)
    compare(name, arguments, code, speechctl, tmp_path, golden)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("checkpoint-ls-damaged", "checkpoint ls runs/stub", 0),
        ("checkpoint-ls-verify", "checkpoint ls runs/stub --verify", 0),
        ("checkpoint-verify-damaged", "checkpoint verify runs/stub", 5),
        ("checkpoint-prune-damaged", "checkpoint prune runs/stub --dry-run", 0),
    ],
)
def test_damaged_ones(
    name: str, arguments: str, code: int, run: Run, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    damage(run)
    compare(name, arguments, code, speechctl, tmp_path, golden)


def test_nothing_sealed(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    made_run(tmp_path / "runs" / "stub", "created")
    compare("checkpoint-ls-none", "checkpoint ls runs/stub", 0, speechctl, tmp_path, golden)
    assert speechctl("checkpoint", "verify", "runs/stub").returncode == 0
    assert speechctl("checkpoint", "prune", "runs/stub").stdout == "0 checkpoints removed; 0 kept\n"


def test_one_that_is_read_is_listed_so_and_stays(
    run: Run, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    with reader(run.checkpoint(3)):
        compare("checkpoint-ls-in-use", "checkpoint ls runs/stub", 0, speechctl, tmp_path, golden)
        compare("checkpoint-prune-in-use", "checkpoint prune runs/stub --dry-run", 0, speechctl, tmp_path, golden)
        done = speechctl("checkpoint", "prune", "runs/stub")
        assert done.returncode == 0, done.stderr
        golden("cli/checkpoint-prune.txt", transcript(done, tmp_path))
        assert run.sealed_steps() == [3, 5, 6]
    assert json.loads(speechctl("checkpoint", "prune", "runs/stub", "--json").stdout)["goes"].keys() == {"3"}
    assert run.sealed_steps() == [5, 6]


def test_a_run_that_a_launcher_has_is_not_pruned(
    run: Run, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    with held(run, "speechctl launch stub.yaml"):
        compare("checkpoint-prune-held", "checkpoint prune runs/stub", 2, speechctl, tmp_path, golden)
    assert run.sealed_steps() == [1, 2, 3, 4, 5, 6]


def test_pinned_and_left_to_the_rules_again(run: Run, speechctl: Transcript) -> None:
    done = speechctl("checkpoint", "pin", "runs/stub", "1")
    assert (done.returncode, done.stdout) == (0, f"{run.checkpoint(1)} stays until it is unpinned\n")
    assert speechctl("checkpoint", "prune", "runs/stub").returncode == 0
    assert run.sealed_steps() == [1, 5, 6]
    done = speechctl("checkpoint", "unpin", "runs/stub", "1")
    assert (done.returncode, done.stdout) == (0, f"{run.checkpoint(1)} is left to the rules again\n")
    assert speechctl("checkpoint", "prune", "runs/stub").returncode == 0
    assert run.sealed_steps() == [5, 6]


# What lies behind them ------------------------------------------------------------------------------------------------


def test_pruning_leaves_no_trace_but_what_it_removed(run: Run) -> None:
    """The lock names the last launcher again, which `why` reads, and what was asked of one stays asked."""
    before = run.lock.read_bytes()
    run.stop_request.touch()
    checkpoints.prune(run, "speechctl checkpoint prune", dry_run=False)
    assert run.lock.read_bytes() == before and run.stop_request.exists()
    with pytest.raises(UsageError, match="in use by `visitor`"), RunLock(run, "visitor", visits=True):
        RunLock(run, "launch").__enter__()


def test_two_that_verify_stay_also_where_newer_ones_are_damaged(run: Run) -> None:
    for step in (4, 6):
        flip(run.checkpoint(step) / "deepspeed" / "rank-0.pt")
    done = checkpoints.prune(run, "prune", dry_run=False)
    assert run.sealed_steps() == [3, 4, 5, 6] and list(done.goes) == [1, 2]
    assert done.stays[6] == done.stays[4] == ["damaged: not counted"]
    assert done.stays[5] == ["newest 2"] and done.stays[3] == ["newest 2", "best WER"]


def test_one_that_is_removed_while_it_is_looked_for_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the list and the look, before the lease, and under it, as by a launcher that begins anew."""
    sealed.remove(run, 1)
    assert checkpoints.look(run, 1).state == checkpoints.verify(run, 1).state == "gone"
    lease = sealed.lease

    def late(folder: Path):  # type: ignore[no-untyped-def]
        assert sealed.remove(run, 2)
        return lease(folder)

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "lease", late)
        assert checkpoints.verify(run, 2).state == "gone"
    digest = sealing.digest_file

    def fresh(path: Path, each: object = None) -> dict[str, object]:
        if run.checkpoint(3).exists():
            sealed.rename_aside(run.checkpoint(3), "before-fresh")
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "digest_file", fresh)
        assert checkpoints.verify(run, 3).state == "gone"
    assert [row.condition.step for row in checkpoints.rows(run, [checkpoints.look(run, s) for s in (1, 3, 4)])] == [4]


def test_asking_who_reads_keeps_nobody_from_reading(run: Run) -> None:
    """`leased` has the lock for a moment. A reader who met it was told that the checkpoint was gone, and a resume would
    have put it aside."""
    fd = os.open(run.checkpoint(4) / rundir.MANIFEST, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    with sealed.lease(run.checkpoint(4)):
        assert timer.finished.is_set()
    timer.join()
    assert not sealed.leased(run.checkpoint(4))


def test_what_cannot_be_asked_is_not_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume puts aside what is gone or damaged; a file server that fails for a moment makes nothing of the kind."""

    def fails(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os.path, "samestat", fails)
    with pytest.raises(OSError, match="Input/output error"), sealed.lease(run.checkpoint(4)):
        pass


def test_how_far_it_has_come_and_a_file_that_cannot_be_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []
    seen = checkpoints.verify(run, 4, lambda *row: told.append(row))
    assert (seen.state, seen.files, seen.bytes) == ("verified", 3, 20_003)
    assert told[-1] == (4, 20_003, 20_003)

    def broken(path: Path, each: object = None) -> dict[str, object]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sealing, "digest_file", broken)
    assert checkpoints.verify(run, 4).problems == [
        f"{run.checkpoint(4)}/{name} cannot be read: Input/output error"
        for name in ("deepspeed/deep/er/rank-0.pt", "deepspeed/rank-0.pt", "rank-00000.rng.json")
    ]


def test_ctrl_c_ends_all_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    to_the_end = []

    def long(path: Path, each: Callable[[int], None]) -> dict[str, object]:
        for _ in range(300):
            time.sleep(0.01)
            each(1)
        to_the_end.append(path)
        return {}

    def interrupted(step: int, done: int, total: int) -> None:
        if done == 9:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sealing, "digest_file", long)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.verify(run, 4, interrupted)
    assert to_the_end == []


def test_the_words_for_steps(run: Run) -> None:
    assert checkpoints.chosen(run, []) == [1, 2, 3, 4, 5, 6]
    assert checkpoints.chosen(run, ["best", "last", "2", "02", "6"]) == [2, 6]
    for word in ("7", "newest", "-1", "²"):
        with pytest.raises(NotFoundError, match=f"no checkpoint {word}"):
            checkpoints.chosen(run, ["2", word])
    (run.checkpoint(2) / rundir.MANIFEST).unlink()
    assert checkpoints.chosen(run, ["2"]) == [2]  # what was lost of it is the problem
    with pytest.raises(DataError, match=r"step 2: .*has no MANIFEST.json"):
        checkpoints.refuse_damaged(run, [checkpoints.verify(run, 2)])


def test_why_still_names_the_launcher_after_a_prune(run: Run) -> None:
    run.attempts()[-1].exit.unlink()
    before = why.diagnose(run, None).message
    checkpoints.prune(run, "speechctl checkpoint prune", dry_run=False)
    assert "pid 1 on elsewhere" in before and why.diagnose(run, None).message.startswith(before.partition(";")[0])
