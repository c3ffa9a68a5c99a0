"""File systems made for a test: full, read-only, and after a power cut. They need root, loop devices and ext4."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SHUTDOWN = 0x8004587D
"""_IOR('X', 125, uint32): ext4 stops at once. With 2 nothing is flushed any more, not even the journal."""

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(where)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this machine mounts no such thing: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    for _ in range(200):  # not while somebody has a file open to write
        if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode == 0:
            break
        time.sleep(0.01)
    else:
        raise AssertionError(f"{disk} is written to all the time")
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextmanager
def filled(disk: Path, leave: int = 0) -> Iterator[None]:
    """Somebody else has what room there is, but for so many bytes."""
    ballast = disk / "ballast"
    stat = os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - leave)))
    try:
        yield
    finally:
        ballast.unlink()


def new_image(path: Path, mebibytes: int = 16) -> Path:
    """A file with an empty ext4 in it."""
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
    return path


def cut(disk: Path, image: Path) -> Path:
    """The image as a power cut leaves it. A copy: somebody else's mount namespace may keep the old file system alive,
    and a mount of the same image would find that one, dead as it is."""
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, b"\2\0\0\0")
    finally:
        os.close(fd)
    return Path(shutil.copy(image, image.with_suffix(".after")))
