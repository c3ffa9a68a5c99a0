"""Directories of results that are whole or not there: sealed by a manifest with the hash of every file, and a rename.

A checkpoint, a pack, a vocabulary and an export are such directories. Whose they are, and who may remove them, belongs
to those who write them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from launcher import rundir
from launcher.errors import DataError, StorageError, UsageError
from launcher.rundir import MANIFEST


def digest_file(path: Path, each: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """`{"bytes", "xxh3_128"}` of one file, read in 4 MiB pieces.

    Args:
        each: called with the length of each piece; may raise to have an end.
    """
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            hasher.update(piece)
            size += len(piece)
            each(len(piece))
    return {"bytes": size, "xxh3_128": hasher.hexdigest()}


def digest_json(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def files_under(root: Path) -> list[Path]:
    """Every file below `root` but the manifest, sorted by name."""
    return sorted(p for p in root.rglob("*") if p.is_file() and p.relative_to(root) != Path(MANIFEST))


def seal(staged: Path, target: Path, facts: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> None:
    """Publish the directory `staged` as `target`: manifest, fsync, rename, fsync of the parent.

    The rename is the commit point; before it nothing called `target` exists. Both must be on one file system.

    Args:
        facts: what the manifest says besides the list of files.
        files: digests by relative name where whoever wrote the files has already hashed and fsynced them;
            otherwise every file is hashed and fsynced here.

    Raises:
        StorageError: a write failed; `target` does not exist.
        UsageError: `target` exists and is not empty; both directories keep their files.
    """
    with rundir.storage_errors(staged):
        if files is None:
            digests = {}
            for path in files_under(staged):
                rundir.sync_file(path)
                digests[str(path.relative_to(staged))] = digest_file(path)
            files = digests
        manifest: dict[str, Any] = {**facts, "files": dict(files)}
        manifest["digest"] = digest_json(manifest)
        rundir.write_json(staged / MANIFEST, manifest)
        for folder in [p for p in staged.rglob("*") if p.is_dir()]:
            rundir.sync_dir(folder)
        rundir.sync_dir(staged)
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(f"{target} exists already", hint=f"remove {target} or choose another name") from error
            raise
        try:
            rundir.sync_dir(target.parent)
        except OSError:  # it may not outlive a power cut: take it back
            with suppress(OSError):
                os.rename(target, staged)
            raise


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest of a sealed directory, its own digest checked; the files are not looked at.

    Raises:
        DataError: there is no manifest, or it was changed after it was written.
    """
    manifest: dict[str, Any] | None = rundir.read_json(root / MANIFEST)
    if manifest is None:
        raise DataError(f"{root} has no {MANIFEST}", hint="it was never sealed; it cannot be used")
    body = {k: v for k, v in manifest.items() if k != "digest"} if isinstance(manifest, dict) else None
    if body is None or manifest.get("digest") != digest_json(body) or not isinstance(body.get("files"), dict):
        raise DataError(f"{root / MANIFEST} is not what was sealed: its digest differs", hint="restore it from a copy")
    return manifest


def verify(root: Path, share: slice = slice(None)) -> dict[str, Any]:
    """The manifest of a sealed directory after each of its files was read and hashed.

    Args:
        share: which of the sorted files to hash, so that ranks can divide the work; sizes, missing and extra files
            are checked for all.

    Raises:
        DataError: names the first file that is missing, extra, of another size or of another content.
        StorageError: one cannot be read just now, which says nothing of its content.
    """
    manifest = manifest_of(root)
    for problem in misfits(root, manifest).values():
        raise DataError(problem, hint=DAMAGED)
    for name, digest in sorted(manifest["files"].items())[share]:
        try:
            whole = digest_file(root / name) == digest
        except FileNotFoundError as error:
            raise DataError(f"{root / name} is missing", hint=DAMAGED) from error
        except OSError as error:
            raise StorageError(
                f"{root / name} cannot be read: {error.strerror}", hint="mend the file system, then try again"
            ) from error
        if not whole:
            raise DataError(_changed(root / name), hint=DAMAGED)
    return manifest


DAMAGED = "do not use it; restore it from a copy, or go back to an older one"


def misfits(root: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What can be seen without reading, by file: those that are missing, extra or of another size than was sealed."""
    wanted = manifest["files"]
    found = {str(p.relative_to(root)): p.stat().st_size for p in files_under(root)}
    problems = {
        name: f"{root / name} is {'missing' if name in wanted else 'not in the manifest'}"
        for name in sorted(wanted.keys() ^ found.keys())
    }
    for name in sorted(wanted.keys() & found.keys()):
        if found[name] != wanted[name]["bytes"]:
            problems[name] = f"{root / name} has {found[name]} bytes, {wanted[name]['bytes']} were sealed"
    return problems


def damage(path: Path, digest: Mapping[str, Any], each: Callable[[int], object] = lambda _: None) -> str:
    """What is wrong with the content of a sealed file, empty where nothing is. Reads all of it.

    Args:
        each: as of `digest_file`.
    """
    try:
        found = digest_file(path, each)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if found == digest else _changed(path)


def _changed(path: Path) -> str:
    return f"{path} has changed since it was sealed (xxh3-128 differs)"
