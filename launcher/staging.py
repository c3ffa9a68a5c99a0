"""A directory that comes into being whole: filled beside its name, then sealed under it; or nothing is there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import rundir
from launcher.errors import UsageError


class Busy(UsageError):
    """Another process is filling the directory."""


@contextmanager
def staged(target: Path, need: int = 0) -> Iterator[Path]:
    """An empty directory beside `target`, for the caller to fill and `sealing.seal`; it is gone at the end if that did
    not come to pass. What a process that was killed left there goes first. One process at a time.

    Args:
        need: bytes that it will take; the disk is asked for them first.

    Raises:
        Busy: another process is filling it.
        StorageError: there is no room, or a write failed in the body; also one that a library made something else of.
    """
    aside = target.with_name(f".{target.name}.partial")
    with rundir.storage_errors(aside, need or None):
        _make(target.parent)
        fd = _claim(aside)
        try:
            stat = os.statvfs(aside)
            if stat.f_blocks and stat.f_bavail * stat.f_frsize < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield aside
        except Exception as error:
            if (number := _number_in(error)) is not None:
                raise OSError(number, os.strerror(number)) from error
            raise
        finally:
            if _is_at(aside, fd):  # sealed, it has another name, and this one may be somebody else's
                shutil.rmtree(aside, ignore_errors=True)
            os.close(fd)


def _make(folder: Path) -> None:
    """With its parents, each durable."""
    for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        missing.mkdir(exist_ok=True)
        rundir.sync_dir(missing.parent)


def _claim(aside: Path) -> int:
    """An open directory of this name, locked and empty."""
    while True:
        aside.mkdir(exist_ok=True)
        fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Busy(f"another process is writing {aside}", hint="wait for it, or name another directory") from None
        except OSError:  # a file system without locks: then nobody is kept from it
            pass
        if not _is_at(aside, fd):  # its last owner was just done
            os.close(fd)
            continue
        for leftover in aside.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        return fd


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except OSError:
        return False


def _number_in(error: Exception) -> int | None:
    """The errno that a library of Rust has in its text alone."""
    found = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
