"""A sealed pack -> any of its utterances, by position, and the lengths of all; and what a sealed pack is.

A pack is `index.json` and `shard.00000.mds` … as mosaicml-streaming's stock StreamingDataset reads them, `lengths.npy`
for planning an epoch without touching the sound, `stats.json` for people, and the manifest that seals them. `pack.py`
writes it.

Importing this file and opening a pack are cheap: streaming, which takes long to import, waits for the first sound.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError
from launcher.rundir import MANIFEST, read_json, sync_dir, sync_file
from launcher.sealing import damage, manifest_of, verify
from launcher.worker.shard_cache import ShardCache, fetch

FORMAT = "speechctl.pack/1"
COLUMNS = {
    "audio": "bytes",
    "chapter": "int",
    "n_samples": "int",
    "sample_rate_hz": "int",
    "speaker": "int",
    "subset": "str",
    "text": "str",
    "utt_id": "str",
}
"""MDS columns. `audio` is the original FLAC file, byte for byte."""

LENGTHS = np.dtype([("n_samples", "<i8"), ("n_chars", "<i4"), ("ctc_frames", "<i4")])
"""One row of lengths.npy. `ctc_frames`: frames that CTC needs at least, -1 where the text has no CTC spelling."""

SIDE_FILES = ("index.json", "lengths.npy", "stats.json")
MAKE = "run `speechctl pack RECIPE`"
_BASENAME = re.compile(r"[A-Za-z0-9._-]+")


class Pack:
    """A sealed pack, opened: any utterance by its position. Made by `open_pack`.

    It reads through streaming's own MDS readers and makes no StreamingDataset: that one keeps its state in /dev/shm,
    in segments that outlive a killed rank. The readers keep no state and open the shard at each read, so any number
    of threads may call `sample`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], cache: ShardCache | None = None) -> None:
        self._shards = _shards(path, manifest)
        self._cache = cache
        self.path = path
        self.manifest = manifest
        self.lengths = _mapped_lengths(path, manifest)
        """Memory-mapped, in pack order; fields as in `LENGTHS`."""
        self._starts: list[int] = list(accumulate((s["samples"] for s in self._shards), initial=0))

    @cached_property
    def _readers(self) -> list[Any]:
        """Made at the first read: a rank starts its model while a thread imports streaming, and a plan does without."""
        from launcher.worker import shims

        shims.apply()
        from streaming.base.format import reader_from_json

        folder = self.path if self._cache is None else self._cache.folder
        return [reader_from_json(str(folder), None, shard) for shard in self._shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, i: int) -> dict[str, Any]:
        """The columns of the utterance at position `i`, which counts from 0 and never from the end.

        Raises:
            IndexError: there is no such position.
            DataError: its shard is not there, or not what was sealed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} utterances, position {i} is not among them")
        shard = bisect_right(self._starts, i) - 1
        if self._cache is not None:
            self._cache.need(self.shard_of(i))
        try:
            return dict(self._readers[shard].get_item(i - self._starts[shard]))
        except (OSError, LookupError, ValueError, struct.error) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            raise self.damaged(i, f"{type(error).__name__}: {error}") from error

    def shard_of(self, i: int) -> str:
        """The file name of the shard that has the utterance at position `i`."""
        return str(self._shards[bisect_right(self._starts, i) - 1]["raw_data"]["basename"])

    @property
    def shards(self) -> list[str]:
        """The file names of all shards."""
        return [str(shard["raw_data"]["basename"]) for shard in self._shards]

    def damaged(self, i: int, what: str) -> DataError:
        """Of the utterance at position `i`: `what` is wrong with it. Says what became of its shard, which is read."""
        shard = self.shard_of(i)
        found = (self.path if self._cache is None else self._cache.folder) / shard
        why = damage(found, self.manifest["files"][shard]) or f"{found} is as it was sealed"
        return DataError(f"utterance {i} of {self.path}, in shard {shard}: {what}; {why}", hint=_again(self.path))

    def check(self, shard: str) -> None:
        """Read and hash one shard. One that was fetched has been checked before it was used.

        Raises:
            DataError: it is not what was sealed.
        """
        if self._cache is None and (why := damage(self.path / shard, self.manifest["files"][shard])):
            raise DataError(f"shard {shard} of {self.path} was damaged: {why}", hint=_again(self.path))


def open_pack(path: Path, *, check: bool = False, remote: str | None = None, cache: Path | None = None) -> Pack:
    """Open a sealed pack. The manifest, the side files and the size of every shard are checked each time.

    Args:
        check: also read and hash every shard.
        remote: where its shards are, where they are not at `path`: an absolute path, or a URL.
        cache: with `remote`, where the shards of this process go as it needs them.

    Raises:
        DataError: there is no pack, or it is not what was sealed.
    """
    manifest = checked_manifest(path, check, shards=remote is None)
    if remote is None:
        return Pack(path, manifest)
    assert cache is not None
    return Pack(path, manifest, ShardCache(remote, cache / path.name, manifest["files"]))


def bring(remote: str, path: Path) -> dict[str, Any]:
    """Have at `path` all of a sealed pack but its shards, which stay where they are. Returns its manifest.

    Raises:
        DataError: there is none, it is not what was sealed, or another one is at `path` already.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        for name in (MANIFEST, *SIDE_FILES):
            fetch(f"{remote}/{name}", aside / name)
        manifest = checked_manifest(aside, shards=False)
        if not path.exists():
            for name in (MANIFEST, *SIDE_FILES):
                sync_file(aside / name)
            aside.rename(path)
            sync_dir(path.parent)
        elif manifest_of(path) != manifest:
            raise DataError(
                f"{path} is another pack than {remote}", hint=f"remove {path}, or set data.packs to another"
            )
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def lengths_of(path: Path) -> npt.NDArray[np.void]:
    """The lengths of a sealed pack, memory-mapped, in pack order; fields as in `LENGTHS`. Imports neither streaming
    nor torch.

    Raises:
        DataError: as `open_pack`.
    """
    return _mapped_lengths(path, checked_manifest(path))


def checked_manifest(path: Path, check: bool = False, *, shards: bool = True) -> dict[str, Any]:
    """The manifest of a pack whose files are all there with their sizes, and whose side files have their hashes.

    Args:
        shards: they are to be there, too.
    """
    if not (path / MANIFEST).exists():
        what = "is there but was never sealed" if path.is_dir() else "does not exist"
        raise DataError(f"the pack {path} {what}", hint=f"{MAKE} to make it")
    try:
        # An empty slice of files to hash: names and sizes only.
        manifest = verify(path, slice(None) if check else slice(0, 0)) if shards else manifest_of(path)
    except DataError as error:
        raise DataError(error.message, hint=_again(path)) from error
    if manifest.get("format") != FORMAT or manifest.get("columns") != COLUMNS:
        raise DataError(
            f"{path} has format {manifest.get('format')!r} and columns {manifest.get('columns')}, "
            f"expected {FORMAT!r} and {COLUMNS}",
            hint="another version of speechctl made it; " + _again(path),
        )
    for name in SIDE_FILES:
        if name not in manifest["files"] or damage(path / name, manifest["files"][name]):
            raise DataError(f"{path / name} has changed since it was sealed (xxh3-128 differs)", hint=_again(path))
    return manifest


def _again(path: Path) -> str:
    return f"remove {path} and {MAKE} to make it again, or restore it from a copy"


def _shards(path: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The index entries of all shards. A seal proves no origin, so what streaming would trust is checked here: a
    basename that leads out of the pack, or a column that runs code when it is decoded.
    """
    index = read_json(path / "index.json")
    shards: list[dict[str, Any]] = index["shards"]
    for shard in shards:
        name = shard["raw_data"]["basename"]
        if not _BASENAME.fullmatch(name) or name not in manifest["files"]:
            raise DataError(f"{path / 'index.json'} names the shard {name!r}, which is not of it", hint=_again(path))
        columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        if columns != COLUMNS or (shard["version"], shard["format"], shard["compression"]) != (2, "mds", None):
            raise DataError(
                f"shard {name} of {path} has columns {columns} in {shard['format']} version {shard['version']}, "
                f"compression {shard['compression']}; expected {COLUMNS} in mds version 2, uncompressed",
                hint=_again(path),
            )
    packed = sum(s["samples"] for s in shards)
    if packed != manifest["counts"]["packed"]:
        raise DataError(
            f"{path / 'index.json'} counts {packed} utterances, {manifest['counts']['packed']} were sealed",
            hint=_again(path),
        )
    return shards


def _mapped_lengths(path: Path, manifest: dict[str, Any]) -> npt.NDArray[np.void]:
    lengths: npt.NDArray[np.void] = np.load(path / "lengths.npy", mmap_mode="r", allow_pickle=False)
    if lengths.dtype != LENGTHS or lengths.shape != (manifest["counts"]["packed"],):
        raise DataError(
            f"{path / 'lengths.npy'} is an array of {lengths.shape} x {lengths.dtype}, "
            f"expected {manifest['counts']['packed']} x {LENGTHS}",
            hint=_again(path),
        )
    return lengths
