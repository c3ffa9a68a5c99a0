"""Lines of a training run over a disk that has no room for a while."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from launcher import rundir
from launcher.errors import StorageError
from launcher.lines import Lines
from tests.disks import filled, mounted, only_root, read_only


@only_root
@pytest.mark.parametrize(
    ("fault", "stays_open_s"),
    [
        (filled, 0.0),
        (read_only, 0.0),
        (filled, math.inf),
    ],  # the kernel lets no disk become read-only under an open file
    ids=["full", "read-only", "full, stays open"],
)
def test_a_disk_that_takes_none_for_a_while_costs_none(
    tmp_path: Path, fault: Callable[[Path], AbstractContextManager[None]], stays_open_s: float
) -> None:
    """Training ended with the first line that a full disk did not take, with checkpoints to spare."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        lines = Lines(disk / "lines", stays_open_s=stays_open_s)
        lines.sync()
        wanted = [{"k": k, "text": "x" * 1000} for k in range(12)]
        for row in wanted[:3]:
            lines.append(row)
        with fault(disk):
            for row in wanted[3:9]:
                lines.append(row)
            with pytest.raises(StorageError, match=f"cannot write {lines.path}: "):
                lines.sync()
            there = rundir.read_lines(lines.path)
            assert there == wanted[: len(there)] and len(there) < 9
        lines.sync()
        assert rundir.read_lines(lines.path) == wanted[:9]
        for row in wanted[9:]:
            lines.append(row)
        assert rundir.read_lines(lines.path) == wanted
        lines.close()


@only_root
@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EUCLEAN, errno.ENXIO])
def test_a_file_system_that_is_gone_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Lustre that evicted this client, FUSE whose server died, ext4 that found itself damaged: what a rank says of its
    steps waits, as on a full disk, where it was taken for an error of the training code."""

    def gone(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    said = Lines(tmp_path / "lines", stays_open_s=math.inf)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", gone)
        said.append({"step": 1})
        with pytest.raises(StorageError, match=os.strerror(number)):
            said.sync()
    said.sync()
    assert rundir.read_lines(said.path) == [{"step": 1}]


def test_half_a_line_of_a_killed_writer_is_passed_over(tmp_path: Path) -> None:
    """Whoever opens the file next closes it; and only then, not before each of its own lines."""
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n{"st')
    said = Lines(path, stays_open_s=math.inf)
    for step in (2, 3):
        said.append({"step": step})
    said.close()
    assert rundir.read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_bytes().count(rundir.TORN) == 1


def test_a_file_stays_open_while_lines_follow_on_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS only what is closed is seen at once: a line that comes alone is; each is in the file when `append` is
    done."""
    said, now = Lines(tmp_path / "lines", stays_open_s=0.2), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def is_open() -> bool:
        return str(said.path) in {file.path for file in psutil.Process().open_files()}

    for step, wait_s, stays in ((1, 0.0, False), (2, 0.0, True), (3, 0.0, True), (4, 0.3, False)):
        now[0] += wait_s
        said.append({"step": step})
        assert is_open() == stays, step
        assert rundir.read_lines(said.path)[-1] == {"step": step}
    said.append({"step": 5})
    said.close()
    assert not is_open() and len(rundir.read_lines(said.path)) == 5


def test_what_is_written_over_needs_no_room(tmp_path: Path) -> None:
    """An agent emptied its file before it wrote the next beat: on a full disk it was silent, and its node taken for
    lost."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        path = disk / "beat"
        with path.open("wb", buffering=0) as file:
            file.write(b"0123456")
            with filled(disk):
                with pytest.raises(OSError, match="No space"):
                    (disk / "other").write_bytes(b"1")
                for data in (b"12345", b"678"):
                    rundir.write_over(file.fileno(), data)
                    assert path.read_bytes() == data
