"""What is written is whole or absent, also when a disk fails or a process is killed; what was sealed is checked."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import cause, lock, report, rundir, sealing
from launcher.errors import DataError, ExitCode, SpeechctlError, StorageError, UsageError
from launcher.lock import RunLock
from launcher.node import Files
from launcher.rundir import MANIFEST, Run

# Files that are read whole --------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A real failing disk: the kernel refuses the byte after `size`, in any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_fault_in_the_middle_of_a_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    rundir.write_json(path, {"step": 1})
    with (
        file_size_limit(1000),
        pytest.raises(StorageError, match=r"cannot write .*value\.json: File too large \(.* MiB"),
    ):
        rundir.write_json(path, {"step": 2, "text": "x" * 5000})
    assert rundir.read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_file_has_its_mode_from_its_first_byte(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "secret.json", {}, mode=0o600)
    assert (tmp_path / "secret.json").stat().st_mode & 0o777 == 0o600


def test_a_reader_never_sees_half_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    code = "import sys\nfrom pathlib import Path\nfrom launcher import rundir\nn = 0\nprint('up', flush=True)\n"
    code += "while True:\n n += 1\n rundir.write_json(Path(sys.argv[1]), [n] * 20000)"
    rundir.write_json(path, [0] * 20000)
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"up\n"
        seen: set[tuple[int, ...]] = set()
        deadline = time.monotonic() + 20
        for reads in itertools.count():
            if (reads >= 60 and len(seen) > 1) or time.monotonic() > deadline:
                break
            seen.add(tuple(set(rundir.read_json(path))))
        writer.kill()
    assert all(len(value) == 1 for value in seen)
    assert len(seen) > 1, "the writer wrote nothing meanwhile"
    assert len(set(rundir.read_json(path))) == 1


def test_json_that_was_damaged_is_named(tmp_path: Path) -> None:
    assert rundir.read_json(tmp_path / "none.json") is None
    (tmp_path / "value.json").write_bytes(b'{"step": \xff')
    with pytest.raises(DataError, match=r"value\.json is not JSON"):
        rundir.read_json(tmp_path / "value.json")


# Files that grow ------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_skipped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert rundir.read_lines(path) == []
    for step in (1, 2):
        rundir.append_line(path, {"step": step, "text": "ä"})
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in rundir.read_lines(path)] == [1]
    path.write_bytes(whole[:-10] + whole)
    with pytest.raises(DataError, match=r"events\.jsonl:2 is not JSON"):
        rundir.read_lines(path)


def test_the_next_writer_goes_on_behind_half_a_line(tmp_path: Path) -> None:
    """After a power cut the next launcher appended behind half a line, and no command could read the run any more."""
    path = tmp_path / "supervisor.jsonl"
    for step in (1, 3):
        rundir.append_line(path, {"step": step})
        with path.open("ab") as file:
            file.write(b'{"step": "half of \xc3')
    assert [row["step"] for row in rundir.read_lines(path)] == [1, 3]
    with file_size_limit(path.stat().st_size + 10), pytest.raises(StorageError):
        rundir.append_line(path, {"step": 4, "text": "x" * 100})
    rundir.append_line(path, {"step": 5})
    assert [row["step"] for row in rundir.read_lines(path)] == [1, 3, 5]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """The kernel writes the part of a line that fits. The next line must not continue it."""
    path = tmp_path / "events.jsonl"
    rundir.append_line(path, {"step": 1})
    with file_size_limit(500), pytest.raises(StorageError, match=r"cannot write .*events\.jsonl"):
        rundir.append_line(path, {"step": 2, "text": "x" * 1000})
    rundir.append_line(path, {"step": 3})
    assert [row["step"] for row in rundir.read_lines(path)] == [1, 3]


# Storage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_named_with_what_it_has_left(small_disk: Path) -> None:
    path = small_disk / "value.json"
    rundir.write_json(path, "old")
    with pytest.raises(StorageError) as caught:
        rundir.write_json(path, "x" * 100_000)
    message = f"cannot write {path}: No space left on device ("
    assert caught.value.message.startswith(message)
    assert "MiB and" in caught.value.message and "inodes free" in caught.value.message
    assert caught.value.exit_code == ExitCode.STORAGE
    assert rundir.read_json(path) == "old"
    assert os.listdir(small_disk) == ["value.json"]
    with pytest.raises(StorageError):
        for step in range(10_000):
            rundir.append_line(small_disk / "metrics.jsonl", {"step": step, "text": "x" * 100})
    rows = rundir.read_lines(small_disk / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert (small_disk / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_a_seal_on_a_full_disk_publishes_nothing(small_disk: Path) -> None:
    staged = small_disk / ".staged"
    staged.mkdir()
    for n in range(15):  # 60 of 64 KiB: the manifest does not fit any more
        (staged / f"{n:02d}").write_bytes(bytes(4000))
    with pytest.raises(StorageError, match="No space left"):
        sealing.seal(staged, small_disk / "step-00000001", {"text": "x" * 10_000})
    assert os.listdir(small_disk) == [".staged"]
    assert MANIFEST not in os.listdir(staged)


# A network file system -----------------------------------------------------------------------------------------------


@pytest.fixture
def like_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that were asked for in vain stay missing until their directory is listed."""
    missing: set[str] = set()
    exists, read_bytes, listdir = Path.exists, Path.read_bytes, os.listdir

    def remembered(path: Path) -> bool:
        if str(path) not in missing and exists(path):
            return True
        missing.add(str(path))
        return False

    def read(path: Path) -> bytes:
        if not remembered(path):
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return read_bytes(path)

    def listed(path: Path) -> list[str]:
        names = listdir(path)
        missing.difference_update(f"{path}/{name}" for name in names)
        return names

    monkeypatch.setattr(Path, "exists", remembered)
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(os, "listdir", listed)


def test_what_another_machine_has_just_written_is_found(tmp_path: Path, like_nfs: None) -> None:
    """Over NFS a run that had finished was told as failed, and a request to stop was not seen for a minute, because
    somebody had looked a moment too early."""
    run = Run(tmp_path / "run")
    for folder in (run.root, run.stop_request.parent):
        folder.mkdir()
    attempts = [run.new_attempt(), run.new_attempt()]
    written = [run.stop_request, *(attempt.exit for attempt in attempts)]
    for path in written:
        assert not path.exists() and not rundir.there(path)
    for path in written:
        path.write_text('{"code": 0}')
        assert not path.exists(), "as NFS has it"
    assert report.start_of(attempts[0], None, False).state == "finished"
    assert cause.conclude(attempts[1], [0]) == ExitCode.FINISHED
    files = Files(attempts[0])
    files.follow()
    deadline = time.monotonic() + 20
    while not files.stop_requested:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not rundir.there(tmp_path / "no folder" / "x")


# Seals ----------------------------------------------------------------------------------------------------------------


def stage(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    sealing.seal(stage(tmp_path / ".staged", a=b"abc" * 100, deep__b=b"", c=b"x"), tmp_path / "sealed", {"step": 7})
    assert os.listdir(tmp_path) == ["sealed"]
    return tmp_path / "sealed"


def test_a_seal_says_what_it_holds(sealed: Path) -> None:
    manifest = sealing.verify(sealed)
    assert manifest["step"] == 7
    assert sorted(manifest["files"]) == ["a", "c", "deep/b"]
    assert manifest["files"]["deep/b"] == {"bytes": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}  # of no bytes


def flip(root: Path) -> None:
    content = bytearray((root / "a").read_bytes())
    content[150] ^= 1
    (root / "a").write_bytes(bytes(content))


def edit(root: Path) -> None:
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace('"step": 7', '"step": 8'))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip, "/a has changed since it was sealed (xxh3-128 differs)"),
        (lambda root: os.truncate(root / "a", 299), "/a has 299 bytes, 300 were sealed"),
        (lambda root: (root / "deep" / "b").unlink(), "/deep/b is missing"),
        (lambda root: (root / "deep" / "new").touch(), "/deep/new is not in the manifest"),
        (edit, f"/{MANIFEST} is not what was sealed: its digest differs"),
        (lambda root: (root / MANIFEST).write_text("[]"), f"/{MANIFEST} is not what was sealed"),
        (lambda root: os.truncate(root / MANIFEST, 20), f"/{MANIFEST} is not JSON"),
        (lambda root: (root / MANIFEST).unlink(), f"sealed has no {MANIFEST}"),
    ],
)
def test_damage_is_found_and_named(sealed: Path, damage: Any, complaint: str) -> None:
    sealing.verify(sealed)
    damage(sealed)
    with pytest.raises(DataError) as caught:
        sealing.verify(sealed)
    assert complaint in caught.value.message


def test_shares_of_a_verification_make_the_whole(sealed: Path) -> None:
    flip(sealed)  # file 0 of 3
    sealing.verify(sealed, slice(1, None, 2))
    with pytest.raises(DataError, match="/a has changed"):
        sealing.verify(sealed, slice(0, None, 2))


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_seal_refuses_a_target_that_is_there(tmp_path: Path, kind: str) -> None:
    staged, target = stage(tmp_path / ".staged", a=b"new"), tmp_path / "target"
    if kind == "directory":
        stage(target, a=b"old")
    else:
        target.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists already"):
        sealing.seal(staged, target, {})
    assert (staged / "a").read_bytes() == b"new"
    assert (target / "a" if kind == "directory" else target).read_bytes() == b"old"


def test_a_seal_takes_the_digests_of_whoever_wrote_the_files(tmp_path: Path) -> None:
    staged = stage(tmp_path / ".staged", a=b"abc")
    sealing.seal(staged, tmp_path / "sealed", {}, files={"a": {"bytes": 3, "xxh3_128": "0" * 32}})
    with pytest.raises(DataError, match="/a has changed"):
        sealing.verify(tmp_path / "sealed")


# The run --------------------------------------------------------------------------------------------------------------


def test_attempts_are_numbered_and_each_number_is_given_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.attempts() == []
    assert [run.new_attempt().number for _ in range(3)] == [1, 2, 3]
    (run.attempts_dir / "notes.txt").touch()
    (run.attempts_dir / "9999").mkdir()
    newest = run.new_attempt()
    assert newest.root.name == "10000"
    assert [a.number for a in run.attempts()] == [1, 2, 3, 9999, 10000]
    assert newest.run.root == tmp_path
    assert {p.name for p in newest.root.iterdir()} == {"logs", "failures", "ranks", "ledger", "stacks", "progress"}


def test_only_what_has_a_manifest_is_sealed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.sealed_steps() == []
    for name in ("step-00000200", "step-00000100", "step-00000300.bak", ".attempt-0001"):
        stage(run.checkpoints / name, **{MANIFEST: b"{}"})
    stage(run.checkpoints / "step-00000400", weights=b"")
    assert run.sealed_steps() == [100, 200]


# The lock -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from launcher.lock import RunLock
from launcher.rundir import Run
with RunLock(Run(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(run: Run, command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock; it is killed at the end."""
    argv = [sys.executable, "-c", HOLD, str(run.root), command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert lock.holder(run) is None
    long = "speechctl launch recipes/x.yaml " + "--set a=b " * 1000
    with held(run, long) as process:
        with pytest.raises(UsageError) as caught, RunLock(run, "second"):
            pass
        message = caught.value.message
        assert f"{run.root} is in use by `{long}` (pid {process.pid} on {os.uname().nodename}) since 2" in message
        assert f"speechctl stop {run.root}" in caught.value.hint
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert lock.holder(run) is None
        with RunLock(run, "third"):
            who = lock.holder(run)
            assert who is not None and (who["pid"], who["command"]) == (os.getpid(), "third")
    assert lock.holder(run) is None


def test_looking_for_the_holder_keeps_nobody_out(tmp_path: Path) -> None:
    """`status` takes the lock for a moment to see whether it is free; a launch at that moment was refused once."""
    run = Run(tmp_path)
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with RunLock(run, "launch"):
            timer.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On Lustre without `-o flock` every command ended with a traceback, and with the code of a bug of ours."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = Run(tmp_path)
    with pytest.raises(StorageError, match=r"cannot lock .*/lock: ") as caught, RunLock(run, "launch"):
        pass
    assert "-o flock" in caught.value.hint
    with pytest.raises(StorageError, match=r"cannot lock .*/lock: "):
        lock.holder(run)
    assert str(run.lock) not in {file.path for file in psutil.Process().open_files()}


def test_a_lock_on_a_full_disk(small_disk: Path) -> None:
    """There was a traceback, and the name of the holder before was gone too."""
    run, other = (Run(small_disk / name) for name in ("run", "other"))
    for made in (run, other):
        made.root.mkdir()
    with RunLock(run, "launch"):
        pass
    with (
        pytest.raises(StorageError),
        (small_disk / "fill").open("wb", buffering=0) as file,
        rundir.storage_errors(run.root),
    ):
        while True:
            file.write(bytes(4096))
    with RunLock(run, "resume"):
        assert lock.last_holder(run)["command"] == "resume"
    with pytest.raises(StorageError, match="No space left"), RunLock(other, "launch"):
        pass
    assert lock.holder(other) is None


def test_a_request_to_the_holder_before_is_not_for_this_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stop_request.parent.mkdir()
    run.stop_request.write_text("{}")
    with RunLock(run, "launch"):
        assert not run.stop_request.exists()


def test_an_error_says_what_to_do_and_drives_no_terminal() -> None:
    error = SpeechctlError("no file \x1b[31m\u202ered", hint="look\nagain")
    assert error.render() == "error: no file \\x1b[31m\\u202ered\n\nhint: look\nagain"
    assert json.dumps({"code": ExitCode.STOPPED}) == '{"code": 75}'
