"""Sealed checkpoints of a run as others find them: verified, leased while they are read, pinned, or taken away.

A lease is a lock on the checkpoint's manifest, which the kernel drops with the process that has it: nothing to renew,
and nothing left behind by one that dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import rundir, sealing
from launcher.errors import DataError, NotFoundError
from launcher.rundir import Run

FORMAT = "speechctl.checkpoint/1"

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What flock says on a file system that has none. Leases are not to be had there, and nobody is kept from reading."""


PATIENCE_S = 1.0
"""Who only asks whether a checkpoint is leased, and who finds it pinned, has its lock for a moment. Whoever removes it
renames it at once."""


def run_id(run: Run) -> str:
    """What tells this run from every other, wherever it lies; empty where nobody gave it one."""
    return str((rundir.read_json(run.provenance) or {}).get("id", ""))


def marks(run: Run, step: int) -> dict[str, Any]:
    """What the manifest of every checkpoint says of where it belongs."""
    return {"format": FORMAT, "run": run_id(run), "step": step}


def verify(run: Run, step: int, share: slice = slice(None)) -> dict[str, Any]:
    """The manifest of a checkpoint of this run, after its files were read and hashed; nothing was unpickled.

    Args:
        share: which files to hash, as of `sealing.verify`.

    Raises:
        DataError: it is damaged, or is not what this run sealed at this step.
    """
    manifest = sealing.verify(run.checkpoint(step), share)
    if problem := foreign(run, step, manifest):
        raise DataError(
            problem,
            hint="it was put there from elsewhere; restore this run's own from a copy, or go back to an older one",
        )
    return manifest


def foreign(run: Run, step: int, manifest: Mapping[str, Any]) -> str:
    """How a manifest is not what this run sealed at this step; empty where it is."""
    for name, wanted in marks(run, step).items():
        if manifest.get(name) != wanted:
            return f"{run.checkpoint(step)} has {name} {manifest.get(name)!r}, expected {wanted!r}"
    return ""


def newest_said(run: Run) -> int:
    """The step at which the run was sealed last since it last started over; -1: it never was. Who went on from one
    says so too: a kill, or a power cut, may come between a seal and its event."""
    newest = -1
    for event in (e for a in run.attempts() for e in rundir.read_lines(a.events)):
        if event["event"] == "fresh":
            newest = -1
        elif event["event"] == "sealed" or (event["event"] == "started" and event["step"] > 0):
            newest = event["step"]
    return newest


@contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Keep a sealed checkpoint from being removed while it is read. Needs no more than the right to read it.

    Raises:
        NotFoundError: it is gone, or about to be.
    """
    manifest = folder / rundir.MANIFEST
    gone = NotFoundError(f"{folder} is gone", hint="it was removed by the rules of `checkpoint`; take a newer one")
    try:
        fd = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise gone from None
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (locked := _lock(fd, fcntl.LOCK_SH)) and _is_at(manifest, fd) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not locked or not _is_at(manifest, fd):
            raise gone
        yield
    finally:
        os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file still has this name; renamed away, the name is of nothing, or of another one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:  # and nothing else: of what cannot be asked nobody may say that it is gone
        return False


def leased(folder: Path) -> bool:
    """Whether somebody reads a checkpoint just now, as far as this user may ask."""
    try:
        fd = os.open(folder / rundir.MANIFEST, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def remove(run: Run, step: int, still: Callable[[], bool] = lambda: True) -> bool:
    """Take a sealed checkpoint away. Returns whether it went: one that is leased or pinned stays.

    Args:
        still: whether it is to go, asked when nobody has a lease on it any more.
    """
    folder = run.checkpoint(step)
    try:
        # To write: over NFS a lock of one's own needs that.
        fd = os.open(folder / rundir.MANIFEST, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not _lock(fd, fcntl.LOCK_EX) or step in pinned(run) or not still():
            return False
        trash(folder)
        return True
    finally:
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


# Pins ----------------------------------------------------------------------------------------------------------------


def pin(run: Run, step: int) -> None:
    """Have a sealed checkpoint stay whatever the rules say.

    Raises:
        NotFoundError: there is none.
    """
    with lease(run.checkpoint(step)):
        rundir.write_bytes(run.pin(step), b"")


def unpin(run: Run, step: int) -> None:
    run.pin(step).unlink(missing_ok=True)


def pinned(run: Run) -> set[int]:
    names = [p.name.removeprefix("step-").removesuffix(".pinned") for p in run.checkpoints.glob("step-*.pinned")]
    return {int(name) for name in names if name.isdecimal()}


# Out of the way ------------------------------------------------------------------------------------------------------


def rename_aside(folder: Path, word: str) -> Path:
    """Rename `step-…` to `.WORD-step-…`, or to `….1`, … where that is taken; durable when this returns."""
    target = candidate = folder.with_name(f".{word}-{folder.name.lstrip('.')}")
    number = 0
    while candidate.exists():
        number += 1
        candidate = target.with_name(f"{target.name}.{number}")
    os.rename(folder, candidate)
    rundir.sync_dir(folder.parent)
    return candidate


def trash(folder: Path) -> None:
    """Rename away first, so that no reader ever finds half of it under its name. What cannot be deleted then waits for
    `empty_trash`."""
    shutil.rmtree(rename_aside(folder, "trash"), ignore_errors=True)


def empty_trash(run: Run) -> None:
    for leftover in run.checkpoints.glob(".trash-*"):
        shutil.rmtree(leftover, ignore_errors=True)
