"""Utterances -> one sealed pack for each subset. What is in a pack, and how it is read, is in `pack_reader.py`.

Importing this file is cheap: streaming, which takes five seconds to import, is imported by the processes that write
shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError, HostError, UsageError
from launcher.rundir import MANIFEST, read_json, storage_errors, sync_dir, sync_file, write_bytes, write_json
from launcher.sealing import digest_file, digest_json, manifest_of, seal
from launcher.worker.librispeech import SAMPLE_RATE_HZ, Utterance, read_subset
from launcher.worker.pack_reader import COLUMNS, FORMAT, LENGTHS, MAKE, SIDE_FILES, checked_manifest
from launcher.worker.vocabulary import min_ctc_frames

PARTITION_UTTERANCES = 2000
"""Utterances in one part, about 400 MB. Fixed, so that the shards do not depend on the number of processes."""

_BLOCK_SAMPLES = 1 << 14
"""Decoded at once: 1 s. It says where damage is, and a header that promises days cannot ask for their memory."""
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of consecutive utterances, written by one process; complete when `root` exists."""

    root: Path
    key: str
    """Of everything that decides the bytes of the whole pack: parts of another key are not reused."""
    shard_bytes: int
    utterances: list[Utterance]


def write_pack(
    corpus: Path,
    subset: str,
    target: Path,
    shard_bytes: int,
    processes: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Make the sealed pack `target` of one subset, or find it there, and return its manifest.

    Every file is decoded once and compared with its header. The bytes of the pack do not depend on `processes`. After
    a kill, complete parts are kept in `.NAME.partial` beside `target` and the next call goes on from them; after an
    error in the data nothing is left. A sealed pack whose corpus is no longer there is used as it is.

    Raises:
        DataError: the corpus is not whole or does not decode, or `target` was packed from something else.
        UsageError: another process is packing `target`, or something that is no pack is in the way.
        StorageError: the disk is full, read-only or failing; complete parts are kept.
    """
    corpus, target = Path(os.path.abspath(corpus)), Path(os.path.abspath(target))
    if (target / MANIFEST).exists():
        return _reuse(corpus, subset, target, progress)
    if not 0 < shard_bytes < 2**32:
        raise UsageError(
            f"data.shard_size is {shard_bytes} bytes; MDS counts in 32 bits, so a shard must be below 4 GiB",
            hint="leave data.shard_size at its default, 64MiB",
        )
    with storage_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _only_packer(target):
        if (target / MANIFEST).exists():
            # Sealed by another since this process looked first.
            return _reuse(corpus, subset, target, progress)
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise UsageError(
                f"{target} is in the way: it is there and is no sealed pack",
                hint=f"move {target} away, or choose another directory for data.packs",
            )
        utterances = read_subset(corpus, subset)
        with storage_errors(target.parent):
            _pack(utterances, corpus, subset, target, shard_bytes, processes, progress)
    return manifest_of(target)


def _pack(
    utterances: list[Utterance],
    corpus: Path,
    subset: str,
    target: Path,
    shard_bytes: int,
    processes: int,
    progress: Callable[[str], None],
) -> None:
    source = _source_digest(utterances)
    streaming_version = importlib.metadata.version("mosaicml-streaming")
    key = digest_json([FORMAT, source, shard_bytes, PARTITION_UTTERANCES, streaming_version])
    staging = target.with_name(f".{target.name}.partial")
    parts = [
        _Part(staging / f"part-{i:04d}", key, shard_bytes, utterances[first : first + PARTITION_UTTERANCES])
        for i, first in enumerate(range(0, len(utterances), PARTITION_UTTERANCES))
    ]
    staging.mkdir(exist_ok=True)
    todo = [p for p in parts if not _is_complete(p)]
    _remove_leftovers(staging, keep={p.root for p in parts} - {p.root for p in todo})
    if len(todo) < len(parts):
        progress(f"{subset}: {len(parts) - len(todo)} of {len(parts)} parts are there from an earlier try")

    damage: list[str] = []
    done = len(parts) - len(todo)
    for found in _write_parts(todo, processes):
        damage += found
        done += 1
        progress(f"{subset}: part {done} of {len(parts)}" + (f", {len(found)} damaged files" if found else ""))
    if damage:
        shutil.rmtree(staging)
        more = [f"and {len(damage) - _SHOWN} more"] if len(damage) > _SHOWN else []
        raise DataError(
            f"{len(damage)} of the {len(utterances)} files of {subset} do not decode to what their headers say:\n  "
            + "\n  ".join(sorted(damage)[:_SHOWN] + more),
            hint=f"unpack the archive of {subset} again, or replace these files; nothing was packed",
        )

    shards = _merge(staging, parts)
    packed = sum(s["samples"] for s in shards)
    if packed != len(utterances):
        raise RuntimeError(f"{packed} utterances are in the shards of {staging}, {len(utterances)} in the corpus")
    lengths = io.BytesIO()
    np.save(lengths, _lengths(utterances), allow_pickle=False)
    write_bytes(staging / "lengths.npy", lengths.getvalue())
    write_json(staging / "stats.json", {**_stats(utterances), **speakers_sexes(corpus, utterances)})
    write_json(staging / "index.json", {"version": 2, "shards": shards})
    # The shards were hashed from memory as they were written, and fsynced by the process that wrote them.
    files = {s["raw_data"]["basename"]: {"bytes": s["raw_data"]["bytes"], **s["raw_data"]["hashes"]} for s in shards}
    files |= {name: digest_file(staging / name) for name in SIDE_FILES}
    facts = {
        "format": FORMAT,
        "subset": subset,
        "counts": {"transcript_lines": len(utterances), "files": len(utterances), "packed": packed},
        "source": source,
        "streaming": streaming_version,
        "columns": COLUMNS,
    }
    seal(staging, target, facts, files)


def _source_digest(utterances: list[Utterance]) -> str:
    return digest_json([[u.utt_id, u.n_samples, u.pcm_md5.hex(), u.text] for u in utterances])


def _reuse(corpus: Path, subset: str, target: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """The manifest of the pack that is at `target` already, if it is the one that was asked for."""
    manifest = checked_manifest(target)
    if manifest["subset"] != subset:
        raise DataError(
            f"{target} is a pack of {manifest['subset']}, expected {subset}",
            hint="give every subset a directory of its own, or remove this one and pack again",
        )
    if not (corpus / subset).is_dir():
        progress(f"{subset}: there is no {corpus / subset}; its sealed pack {target} is used")
        return manifest
    utterances = read_subset(corpus, subset)
    if (source := _source_digest(utterances)) != manifest["source"]:
        raise DataError(
            f"{corpus / subset} is not what {target} was packed from: {len(utterances)} utterances with digest "
            f"{source}, {manifest['counts']['packed']} with digest {manifest['source']} were packed",
            hint=f"if the corpus was meant to change, remove {target} and {MAKE}; if not, correct data.corpus",
        )
    return manifest


def _write_parts(parts: list[_Part], processes: int) -> Iterator[list[str]]:
    """Write the parts, in this process or in several, and give what each found damaged, in the order they finish.

    Spawned, not forked: the caller may have threads, of torch or of a terminal, and a lock that one of them holds
    would stay held in a forked child. A child pays the import of streaming once, for all the parts that it writes.
    """
    if processes == 1 or len(parts) <= 1:
        yield from map(_write_part, parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(parts)), context, initializer=_serve_parent) as pool:
        try:
            for future in as_completed([pool.submit(_write_part, part) for part in parts]):
                yield future.result()
        except BrokenProcessPool as error:
            raise HostError(
                "a packing process was killed; most often it is the kernel that does this, for want of memory",
                hint="pack again with fewer processes; the parts that are complete are kept",
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _serve_parent() -> None:
    """Leave Ctrl-C to the parent, and go when it goes: an orphan would write into the next packer's staging."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _write_part(part: _Part) -> list[str]:
    """Write one part and rename it to `part.root`, or say what is damaged in it and leave it incomplete.

    Failures of the disk are raised as plain OSErrors: a SpeechctlError does not survive the way between processes.
    """
    from launcher.worker import shims

    shims.apply()
    from streaming.base.format import MDSWriter

    aside = part.root.with_suffix(".tmp")
    writer = MDSWriter(
        columns=COLUMNS, out=str(aside), compression=None, hashes=["xxh3_128"], size_limit=part.shard_bytes
    )
    damage: list[str] = []
    # Not `with writer:`, whose exit writes a valid index also after an exception.
    try:
        for utterance in part.utterances:
            try:
                audio = utterance.path.read_bytes()
            except OSError as error:
                damage.append(f"{utterance.path}: {error.strerror}")
                continue
            if what := _damage(utterance, audio):
                damage.append(f"{utterance.path}: {what}")
            elif not damage:
                writer.write(
                    {**{name: getattr(utterance, name) for name in COLUMNS if name != "audio"}, "audio": audio}
                )
        if damage:
            return damage
        writer.finish()
    finally:
        writer.cancel_future_jobs()
    (aside / "part.json").write_text(json.dumps({"key": part.key, "utterances": len(part.utterances)}))
    for path in aside.iterdir():
        sync_file(path)
    sync_dir(aside)
    os.rename(aside, part.root)
    return []


def _damage(utterance: Utterance, audio: bytes) -> str | None:
    """What is wrong with the sound of a whole FLAC file, compared with its header; None where nothing is."""
    import soundfile

    # It detects damage, and is what the format uses; it protects nothing.
    md5 = hashlib.md5(usedforsecurity=False)
    n_samples = 0
    try:
        with soundfile.SoundFile(io.BytesIO(audio)) as file:
            while len(block := file.read(_BLOCK_SAMPLES, dtype="int16")):
                md5.update(np.ascontiguousarray(block, "<i2").data)
                n_samples += len(block)
    except soundfile.LibsndfileError as error:
        return f"{utterance.n_samples} samples expected, {n_samples} found before decoding failed: {error.error_string}"
    if n_samples != utterance.n_samples:
        return f"{utterance.n_samples} samples expected, {n_samples} found"
    if any(utterance.pcm_md5) and md5.digest() != utterance.pcm_md5:
        return f"{n_samples} samples as expected, but their MD5 is {md5.hexdigest()}, not {utterance.pcm_md5.hex()}"
    return None


def _is_complete(part: _Part) -> bool:
    """Whether an earlier try wrote this part and nothing has been moved out of it since."""
    if not part.root.is_dir() or read_json(part.root / "part.json") != {
        "key": part.key,
        "utterances": len(part.utterances),
    }:
        return False
    files = [s["raw_data"] for s in read_json(part.root / "index.json")["shards"]]
    paths = [(part.root / f["basename"], f["bytes"]) for f in files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _remove_leftovers(staging: Path, keep: set[Path]) -> None:
    for path in set(staging.iterdir()) - keep:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _merge(staging: Path, parts: list[_Part]) -> list[dict[str, Any]]:
    """Move the shards of all parts into `staging` under consecutive names, and return their index entries.

    A kill in between leaves parts that lack shards; `_is_complete` sees that and they are written again.
    """
    shards: list[dict[str, Any]] = []
    for part in parts:
        for shard in read_json(part.root / "index.json")["shards"]:
            # MDSWriter begins with an empty shard when the first utterance alone is larger than a shard.
            if shard["samples"] == 0:
                continue
            name = f"shard.{len(shards):05d}.mds"
            os.rename(part.root / shard["raw_data"]["basename"], staging / name)
            shard["raw_data"]["basename"] = name
            shards.append(shard)
        shutil.rmtree(part.root)
    return shards


def _lengths(utterances: list[Utterance]) -> npt.NDArray[np.void]:
    return np.array([(u.n_samples, len(u.text), _ctc_frames(u.text)) for u in utterances], LENGTHS)


def _ctc_frames(text: str) -> int:
    try:
        return min_ctc_frames(text)
    except DataError:
        return -1


def _stats(utterances: list[Utterance]) -> dict[str, Any]:
    """What stats.json says. Durations in seconds, by the headers."""
    seconds = np.array([u.n_samples for u in utterances]) / SAMPLE_RATE_HZ
    samples: Counter[int] = Counter()
    for u in utterances:
        samples[u.speaker] += u.n_samples
    quantiles = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    return {
        "utterances": len(utterances),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "words": sum(len(u.text.split()) for u in utterances),
        "characters": sum(len(u.text) for u in utterances),
        "speakers": len(samples),
        "duration_s": {f"{q:g}": round(float(np.quantile(seconds, q)), 3) for q in quantiles},
        "speaker_s": {str(s): round(n / SAMPLE_RATE_HZ, 3) for s, n in sorted(samples.items())},
    }


def speakers_sexes(corpus: Path, utterances: list[Utterance]) -> dict[str, dict[str, str]]:
    """`{"speaker_sex": {speaker: "F" or "M"}}` as LibriSpeech's SPEAKERS.TXT has it, for tables of an evaluation;
    empty where the corpus has no such file."""
    try:
        text = (corpus / "SPEAKERS.TXT").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if not line.startswith(";")]
    known = {row[0]: row[1] for row in rows if len(row) > 2 and row[1] in ("F", "M")}
    speakers = sorted({u.speaker for u in utterances})
    return {"speaker_sex": {str(s): known[str(s)] for s in speakers if str(s) in known}}


@contextmanager
def _only_packer(target: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside `target`: the kernel drops the lock with its holder, and the file says who that is."""
    path = target.with_name(f".{target.name}.lock")
    while True:
        with storage_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.pread(fd, 4096, 0).decode(errors="replace") or "another process"
            os.close(fd)
            raise UsageError(
                f"{target} is being packed by {who}",
                hint=f"wait for it, then {MAKE.removeprefix('run ')} finds the pack",
            ) from error
        # The one before removes the file when it leaves: what was opened may be a file without a name by now.
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)
