"""Corpus -> utterances: the LibriSpeech tree read, matched and checked, without decoding any sound.

The tree is SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac, with one SPEAKER-CHAPTER.trans.txt in each chapter.
That the sound decodes to what its header says is checked in `pack.py`, which reads every byte anyway.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import DataError

SAMPLE_RATE_HZ = 16000
HEADER_BYTES = 42
"""`fLaC`, the head of the first metadata block, and STREAMINFO, which is always that first block."""

_UTT_ID = re.compile(r"([0-9]+)-([0-9]+)-[0-9]+")
_SHOWN = 10
"""Problems listed in one error; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One transcript line and the one file it belongs to."""

    utt_id: str
    subset: str
    speaker: int
    chapter: int
    text: str
    path: Path
    n_samples: int
    """As the header promises."""
    sample_rate_hz: int
    pcm_md5: bytes
    """16 bytes: MD5 of the samples as little-endian int16, from the header. All zero where the encoder left it out."""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a FLAC file says of itself in its header."""

    sample_rate_hz: int
    channels: int
    bits: int
    n_samples: int
    pcm_md5: bytes


@dataclass(frozen=True, slots=True)
class _Line:
    path: Path
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def read_subset(corpus: Path, subset: str) -> list[Utterance]:
    """Every utterance of `subset`, sorted by id: each transcript line has its file, and each file its line.

    Raises:
        DataError: the subset is not there, it is empty, or anything in it is not as expected; all that is wrong is
            counted and the first ten places are listed.
    """
    root = corpus / subset
    if not root.is_dir():
        raise _missing(corpus, subset)
    problems: list[str] = []
    listing = _list(root, problems)
    lines, n_lines = _read_lines([p for p in listing if p.name.endswith(".trans.txt")], problems)
    audio = [p for p in listing if p.suffix == ".flac"]
    files = _place(audio, problems)

    problems += [f"{lines[i]}: no audio, {i}.flac is not beside it" for i in sorted(lines.keys() - files.keys())]
    problems += [
        f"{files[i]}: no transcript, {i} has no line in {_chapter(files[i])}.trans.txt"
        for i in sorted(files.keys() - lines.keys())
    ]
    matched = sorted(lines.keys() & files.keys())
    utterances = []
    for utt_id in matched:
        try:
            utterances.append(_utterance(utt_id, subset, lines[utt_id].text, files[utt_id]))
        except (ValueError, OSError) as error:
            problems.append(f"{files[utt_id]}: {error}")

    counts = f"{n_lines} transcript lines, {len(audio)} audio files, {len(matched)} matched"
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(
            f"{root} is not whole: {counts}, {len(problems)} problems:\n  " + "\n  ".join(problems[:_SHOWN] + more),
            hint=f"unpack the archive of {subset} again, or mend these places; every line needs its file and every "
            "file its line",
        )
    if not utterances:
        raise DataError(
            f"{root} has no utterances: {counts} in SPEAKER/CHAPTER/ below it",
            hint="data.corpus is the directory that holds train-clean-100 and its like, as the archives unpack it",
        )
    return utterances


def stream_info(head: bytes) -> StreamInfo:
    """STREAMINFO from the first 42 bytes of a FLAC file.

    Raises:
        ValueError: these are not the first bytes of a FLAC file.
    """
    if len(head) < HEADER_BYTES or head[:4] != b"fLaC" or head[4] & 0x7F != 0 or head[5:8] != b"\x00\x00\x22":
        start = f"it starts with {head[:4]!r}" if head else "it is empty"
        raise ValueError(f"not a FLAC file: expected `fLaC` and a header of {HEADER_BYTES} bytes, {start}")
    # 20 bits of rate, 3 of channels - 1, 5 of bits - 1, 36 of samples; behind 10 bytes of block and frame sizes.
    (packed,) = struct.unpack(">Q", head[18:26])
    return StreamInfo(
        sample_rate_hz=packed >> 44,
        channels=(packed >> 41 & 0x7) + 1,
        bits=(packed >> 36 & 0x1F) + 1,
        n_samples=packed & (1 << 36) - 1,
        pcm_md5=head[26:42],
    )


def _list(root: Path, problems: list[str]) -> list[Path]:
    """All files at most two directories down, sorted. Links are followed; the depth bounds a loop of them."""
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        if len(Path(folder).relative_to(root).parts) == 2:
            folders.clear()
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _chapter(path: Path) -> str:
    """`SPEAKER-CHAPTER`, by the directories a file lies in."""
    return f"{path.parent.parent.name}-{path.parent.name}"


def _read_lines(transcripts: list[Path], problems: list[str]) -> tuple[dict[str, _Line], int]:
    """Good lines by id, and the number of all lines that are not blank."""
    lines: dict[str, _Line] = {}
    count = 0
    for path in transcripts:
        try:
            raw_lines = path.read_bytes().split(b"\n")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        for number, raw in enumerate(raw_lines, start=1):
            if not raw.strip():
                continue
            count += 1
            try:
                utt_id, text = _parse(raw)
                if not utt_id.startswith(_chapter(path) + "-"):
                    raise ValueError(f"{utt_id} does not belong to {_chapter(path)}, where its transcript lies")
                if utt_id in lines:
                    raise ValueError(f"{utt_id} was here before, at {lines[utt_id]}")
                lines[utt_id] = _Line(path, number, text)
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    return lines, count


def _parse(raw: bytes) -> tuple[str, str]:
    """Id and text of one transcript line. A carriage return at its end is dropped."""
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} in column {error.start + 1}") from error
    utt_id, _, text = line.partition(" ")
    text = text.strip()
    # A byte-order mark, a NUL or a zero-width space would go into the pack unseen.
    if not _UTT_ID.fullmatch(utt_id) or not text.isprintable():
        raise ValueError(f"expected `SPEAKER-CHAPTER-NUMBER TEXT` in printable characters, found {line[:60]!r}")
    if not text:
        raise ValueError(f"{utt_id} has no text")
    return utt_id, text


def _place(audio: list[Path], problems: list[str]) -> dict[str, Path]:
    """Files by id. One whose name does not say the directories it lies in is a problem."""
    files: dict[str, Path] = {}
    for path in audio:
        if _UTT_ID.fullmatch(path.stem) and path.stem.startswith(_chapter(path) + "-"):
            files[path.stem] = path
        else:
            problems.append(f"{path}: expected the name {_chapter(path)}-NUMBER.flac here")
    return files


def _utterance(utt_id: str, subset: str, text: str, path: Path) -> Utterance:
    with path.open("rb") as file:
        info = stream_info(file.read(HEADER_BYTES))
    if (info.sample_rate_hz, info.channels, info.bits) != (SAMPLE_RATE_HZ, 1, 16):
        raise ValueError(
            f"expected {SAMPLE_RATE_HZ} Hz, 1 channel, 16 bits; found {info.sample_rate_hz} Hz, "
            f"{info.channels} channels, {info.bits} bits"
        )
    if info.n_samples == 0:
        raise ValueError("its header says that it has no samples")
    speaker, chapter, _ = utt_id.split("-")
    return Utterance(
        utt_id, subset, int(speaker), int(chapter), text, path, info.n_samples, info.sample_rate_hz, info.pcm_md5
    )


def _missing(corpus: Path, subset: str) -> DataError:
    """The error for a subset that is not there; it finds a path that is one directory too high or too low."""
    corpus = Path(os.path.abspath(corpus))
    if not corpus.is_dir():
        return DataError(
            f"there is no corpus at {corpus}",
            hint=f"set data.corpus to the directory that holds {subset}; LibriSpeech's archives name it LibriSpeech",
        )
    below = corpus / "LibriSpeech"
    for right, where in [(below, "above"), (corpus.parent, "below"), (corpus.parent.parent, "below")]:
        if (right / subset).is_dir():
            return DataError(
                f"{corpus} has no {subset}: it lies {where} the corpus, which is {right}",
                hint=f"set data.corpus to {right}",
            )
    there = sorted(p.name for p in corpus.iterdir() if next(p.glob("*/*/*.trans.txt"), None))
    return DataError(
        f"{corpus} has no {subset}; it has {', '.join(there) or 'no subset at all'}",
        hint=f"unpack {subset} there, set data.corpus to the directory that holds it, or name another subset",
    )
