"""A directory that is sealed or absent: killed at any system call, on a full disk, and with two at it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launcher import rundir, sealing, staging
from launcher.errors import StorageError, UsageError
from tests.conftest import count, seed
from tests.disks import mounted
from tests.saving import traced
from tests.test_commit_kills import CALLS, points

TRIALS = os.environ.get("SPEECHCTL_TEST_COUNT")


def make(target: Path) -> None:
    with staging.staged(target, 1000) as folder:
        (folder / "weights").write_bytes(b"w" * 50_000)
        (folder / "deep").mkdir()
        (folder / "deep" / "config").write_text("{}")
        sealing.seal(folder, target, {"format": "test"})


def making(target: Path, *options: str) -> int:
    """In a process of its own, under strace. Returns how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            make(target)
            os._exit(0)
        finally:
            os._exit(1)
    with traced(pid, *options):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_killed_at_any_call_it_is_whole_or_absent_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    assert making(tmp_path / "counted" / "x", "-e", f"trace={CALLS}", "-o", str(tmp_path / "calls")) == 0
    calls = Counter(re.findall(r"(?m)^(?:\d+ +)?(\w+)\(", (tmp_path / "calls").read_text()))
    assert calls["rename"] >= 2 and calls["fsync"] >= 6
    there = Counter[bool]()
    for number, (name, k) in enumerate(points(calls, int(TRIALS or 12), 21)):
        target = tmp_path / f"{number}" / "x"
        code = making(target, "-e", f"inject={name}:signal=KILL:when={k}", "-o", os.devnull)
        assert code in (-signal.SIGKILL, 0), (name, k)
        there[target.exists()] += 1
        if target.exists():
            assert sealing.verify(target)["format"] == "test"
            with pytest.raises(UsageError, match="exists already"):
                make(target)
        else:
            make(target)
        sealing.verify(target)
        assert left(target.parent) == ["x"], (name, k)
    assert there[False]
    count("kills of a process that seals a directory", sum(there.values()))


HOLDER = """
import sys
from pathlib import Path
from launcher import staging
with staging.staged(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("fills", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    """Two exports of one name removed each other's files."""
    target = tmp_path / "x"
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "fills\n"
        with pytest.raises(UsageError, match=r"another process is writing .*/\.x\.partial"):
            make(target)
        assert left(tmp_path) == [".x.partial"] and left(tmp_path / ".x.partial") == ["half"]
        holder.kill()
    assert left(tmp_path) == [".x.partial"]
    make(target)
    assert left(tmp_path) == ["x"] and left(target) == [rundir.MANIFEST, "deep", "weights"]


def test_what_is_sealed_meanwhile_by_somebody_else_stays(tmp_path: Path) -> None:
    with staging.staged(tmp_path / "x") as folder:
        sealing.seal(folder, tmp_path / "x", {})
        folder.mkdir()  # the next one has come
    assert left(tmp_path) == [".x.partial", "x"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_leaves_nothing_and_says_what_was_needed(tmp_path: Path) -> None:
    dice = random.Random(seed(22))
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        said = r"No space left on device \(4\.0 MiB needed, 1\.0 MiB and"
        with pytest.raises(StorageError, match=said), staging.staged(disk / "x", 4 << 20):
            raise AssertionError("was not asked first")
        for _ in range(5):
            (disk / "ballast").write_bytes(bytes((1 << 20) - dice.randrange(1 << 15)))
            with pytest.raises(StorageError, match="No space left on device"):
                make(disk / "x")
            assert left(disk) == ["ballast"]
        (disk / "ballast").unlink()
        make(disk / "x")
        sealing.verify(disk / "x")


def test_what_a_library_made_of_an_error_is_understood(tmp_path: Path) -> None:
    said = r"cannot write .*/\.x\.partial: Input/output error"
    with pytest.raises(StorageError, match=said), staging.staged(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: Input/output error (os error 5)")
    with pytest.raises(RuntimeError, match="a bug"), staging.staged(tmp_path / "x"):
        raise RuntimeError("a bug")
    assert left(tmp_path) == []
