"""Shards that are somewhere else -> files on this node, each fetched once, verified, and gone when the attempt is over.

All ranks of a node share one directory. Whoever needs a shard first fetches it beside its name, under a lock, compares
it with the pack's manifest, and renames it: under its own name a shard is whole and as it was sealed. Where the
directory is, and who removes it, is said in `launcher/shard_folder.py`.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from launcher import sealing, shard_folder
from launcher.errors import DataError, InfrastructureError, SpeechctlError, UsageError
from launcher.rundir import storage_errors

TRIES = 3
"""To fetch a shard. A transfer that was cut short, or a server that was busy, is no damaged shard."""

TIMEOUT_S = 600.0
"""Of one transfer; mosaicml-streaming's own is 60 s."""


class ShardCache:
    """The shards of one remote pack on this node.

    Args:
        remote: the pack's directory: an absolute path, or a URL.
        folder: where its shards are kept here; made with the first.
        files: what the manifest of the pack says of each.
    """

    def __init__(self, remote: str, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.remote = remote
        self.folder = folder
        self.files = files
        self._here: set[str] = set()

    def need(self, name: str) -> None:
        """Have a shard in `folder`. Safe from several threads and processes: one fetches, the others wait for it.

        Raises:
            DataError: it is not there, or not what was sealed.
            InfrastructureError: it cannot be fetched.
            StorageError: it cannot be written here.
        """
        if name in self._here:
            return
        target = self.folder / name
        with storage_errors(target, self.files[name]["bytes"]):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Of the process that opened it, so that threads exclude each other, too.
            with (self.folder / f".{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    self._fetch(name, target)
        self._here.add(name)

    def _fetch(self, name: str, target: Path) -> None:
        aside = target.with_name(f".{name}.part")
        problem = ""
        for attempt in range(TRIES):
            aside.unlink(missing_ok=True)
            fetch(f"{self.remote}/{name}", aside, again=attempt + 1 < TRIES)
            if aside.exists():
                found = sealing.digest_file(aside)
                if found == self.files[name]:
                    aside.rename(target)
                    return
                problem = f"{found['bytes']} bytes with xxh3-128 {found['xxh3_128']}, " + (
                    f"sealed were {self.files[name]['bytes']} with {self.files[name]['xxh3_128']}"
                )
                aside.unlink()
        raise DataError(
            f"shard {self.remote}/{name} is not what was sealed: {problem}",
            hint="copy the pack to data.remote again; it was damaged there, or replaced by another",
        )


def fetch(remote: str, target: Path, *, again: bool = False) -> None:
    """One file from a path or a URL into `target`.

    Args:
        again: a failure may pass: wait a second and return without the file.
    """
    scheme = urlparse(remote).scheme
    try:
        if scheme in ("", "file"):
            path = Path(unquote(urlparse(remote).path) if scheme else remote)
            if not path.exists():
                raise DataError(
                    f"{remote} does not exist",
                    hint="copy the whole pack to data.remote, or mount the file system that it is on",
                )
            shutil.copyfile(path, target)
            return
        from launcher.worker import shims

        shims.apply()
        from streaming.base.storage.download import CloudDownloader

        CloudDownloader.direct_download(remote, str(target), TIMEOUT_S)
    except ValueError as error:
        raise UsageError(
            f"data.remote: nothing downloads from {remote}: {error}",
            hint="give an absolute path, or a URL that mosaicml-streaming knows: file, s3, gs, oci, azure, hf, sftp",
        ) from error
    except SpeechctlError:
        raise
    except Exception as error:  # each of streaming's downloaders has exceptions of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        if not again:
            raise InfrastructureError(
                f"{remote} could not be fetched in {TRIES} tries: {type(error).__name__}: {error}",
                hint="look at the connection and at the credentials that the ranks have, then `speechctl resume`",
            ) from error
        time.sleep(1)


@cache
def folder(root: Path | None) -> Path:
    """The directory of all shards of this process. A rank shares that of its node's attempt; any other process has its
    own, which is gone with it.

    Args:
        root: where to make it; None: the system's directory for temporary files.
    """
    if file := os.environ.get(shard_folder.VARIABLE):
        return shard_folder.make(Path(file), root or Path(tempfile.gettempdir()))
    if root is not None:
        root.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix="speechctl-shards-", dir=root)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
