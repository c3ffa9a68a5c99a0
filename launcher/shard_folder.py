"""Where a node keeps the shards of an attempt, and its end. The ranks make it; the node's agent removes it.

The name of the directory follows from a file of the attempt, which says where it is: whoever finds that file can tidy
up, also after both were killed, and nothing else is ever removed.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from launcher import rundir
from launcher.errors import StorageError
from launcher.rundir import Attempt

VARIABLE = "SPEECHCTL_SHARDS"
"""In the environment of a rank: the file of its attempt and node."""


def record(attempt: Attempt, node_rank: int) -> Path:
    return attempt.root / f"shards-{node_rank:03d}"


def make(file: Path, root: Path) -> Path:
    """The directory, below `root`; the same for all ranks of a node. It is written down before it is made.

    Raises:
        StorageError: it cannot be made, or what has its name is somebody else's.
    """
    folder = root / _name(file)
    rundir.write_bytes(file, os.fsencode(folder))
    with rundir.storage_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StorageError(
            f"{folder} is not a directory that only its owner, user {os.geteuid()}, can write into",
            hint="remove it, or set feed.cache to a directory of your own on each node",
        )
    return folder


def remove(file: Path) -> None:
    """The directory that `file` tells of, if it is here."""
    with suppress(OSError):
        folder = Path(os.fsdecode(file.read_bytes()))
        if folder.name == _name(file):
            shutil.rmtree(folder)


def remove_older(attempt: Attempt) -> None:
    """Those that earlier attempts of the run left here when their node's agent was killed."""
    for other in attempt.run.attempts():
        if other.number < attempt.number:
            for file in other.root.glob("shards-*"):
                remove(file)


def _name(file: Path) -> str:
    return f"speechctl-shards-{xxhash.xxh3_64_hexdigest(os.fsencode(os.path.abspath(file)))}"
