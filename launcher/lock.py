"""One writer per run: the lock, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from launcher.errors import StorageError, UsageError
from launcher.rundir import Run, storage_errors, write_over


class RunLock:
    """One writer per run: an flock that the kernel drops with its holder, and a file that names the holder.

    What was asked of the holder before, through `control/`, is not asked of this one and is removed.

    Args:
        visits: it only keeps others out for a while. What was asked stays asked, and the file names the last launcher
            again in the end.

    Raises:
        UsageError: on entry, when another process holds it; the message names host, pid, command and since when.
        StorageError: on entry, where nothing can be locked or written.
    """

    PATIENCE_S = 1.0
    """Those who only ask for the holder take the lock for a moment, too."""

    def __init__(self, run: Run, command: str, *, visits: bool = False) -> None:
        self.run = run
        self.command = command
        self.visits = visits
        self.before = b""
        self.fd = -1

    def __enter__(self) -> RunLock:
        with storage_errors(self.run.lock):
            self.fd = os.open(self.run.lock, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self.PATIENCE_S
        while not self._try():
            if time.monotonic() > deadline:
                os.close(self.fd)
                raise in_use(self.run)
            time.sleep(0.05)
        if self.visits:
            self.before = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        else:
            for request in (self.run.stop_request, self.run.save_request):
                request.unlink(missing_ok=True)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "command": self.command}
        who |= {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        try:
            self._write(json.dumps(who).encode())
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def _write(self, data: bytes) -> None:
        with storage_errors(self.run.lock):
            write_over(self.fd, data)
            os.fsync(self.fd)  # it stays open: over NFS others would see it half a minute later

    def _try(self) -> bool:
        try:
            _flock(self.fd, fcntl.LOCK_EX, self.run.lock)
        except BlockingIOError:
            return False
        except BaseException:
            os.close(self.fd)
            raise
        return True

    def __exit__(self, *_: object) -> None:
        if self.before:
            self._write(self.before)
        os.close(self.fd)


def _flock(fd: int, how: int, path: Path) -> None:
    """Take a lock at once.

    Raises:
        BlockingIOError: another process holds it.
        StorageError: this file system has no locks.
    """
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # ENOSYS of Lustre without -o flock, ENOLCK of NFS 3 without lockd
        raise StorageError(
            f"cannot lock {path}: {error.strerror}",
            hint="have that file system mounted with locks (Lustre: -o flock; NFS: version 4), or run_dir=… elsewhere",
        ) from error


def holder(run: Run) -> dict[str, Any] | None:
    """Who holds the run now, or None where nobody does.

    Raises:
        StorageError: this file system has no locks.
    """
    try:
        fd = os.open(run.lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        _flock(fd, fcntl.LOCK_SH, run.lock)
        return None
    except BlockingIOError:
        return _named_by(fd)
    finally:
        os.close(fd)


def last_holder(run: Run) -> dict[str, Any]:
    """Who holds the run now, or did so last; empty where the lock does not say."""
    try:
        fd = os.open(run.lock, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        return _named_by(fd)
    finally:
        os.close(fd)


def _named_by(fd: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(fd, os.fstat(fd).st_size, 0)))
    except (ValueError, TypeError):  # it has the lock and has not written who it is yet
        return {}


def in_use(run: Run) -> UsageError:
    who = holder(run)
    by = "another process"
    if who:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        by = f"`{who['command']}` (pid {who['pid']} on {who['host']}) since {since}"
    return UsageError(
        f"{run.root} is in use by {by}",
        hint=f"watch it with `speechctl status {run.root}`, end it with `speechctl stop {run.root}`",
    )
