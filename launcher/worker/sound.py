"""Sound files of people: which there are below a folder, and any of them as 16 kHz mono. Packs have a reader of their
own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from launcher.errors import DataError, UsageError
from launcher.worker import shims
from launcher.worker.data import Waveform
from launcher.worker.librispeech import SAMPLE_RATE_HZ

BLOCK_S = 60
"""Sound is brought down to one channel and resampled in pieces of this length: an hour of stereo at 48 kHz would take
1.4 GB at once, and several times that while it is resampled."""

NAMES_OF_SOUND = {
    *(
        ".aac",
        ".aif",
        ".aiff",
        ".amr",
        ".au",
        ".caf",
        ".flac",
        ".m4a",
        ".mp3",
        ".mp4",
        ".oga",
        ".ogg",
        ".opus",
        ".rf64",
    ),
    *(".snd", ".sph", ".w64", ".wav", ".webm", ".wma"),
}
"""A file in a folder that is called so and cannot be opened is told of; others that cannot be opened are no sound."""


@dataclass(frozen=True)
class Found:
    """One sound file."""

    path: Path
    name: Path
    """What to call results of it: its path below the folder that was named, or its own name."""


def find(paths: Sequence[Path]) -> list[Found]:
    """The files, and below the folders all that is sound by its content; as they were named, folders sorted within.

    Hidden files are left out. What follows a link is found once.

    Raises:
        UsageError: a path is not there, or no sound is below it.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        if path.is_file():
            found.setdefault(path, Found(path, Path(path.name)))
            continue
        if not path.is_dir():
            raise UsageError(
                f"{path}: no such file", hint="give sound files such as FLAC, WAV, OGG or MP3, or folders of them"
            )
        below = [Found(file, file.relative_to(path)) for file in _files(path) if _is_sound(file)]
        if not below:
            raise UsageError(f"{path} has no sound file in it", hint="give FLAC, WAV, OGG, MP3 or a folder of them")
        for one in below:
            found.setdefault(one.path, one)
    return list(found.values())


def _files(folder: Path) -> Iterator[Path]:
    """All files below, by name, a folder's own before those of its folders."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def _is_sound(path: Path) -> bool:
    if path.suffix.lower() in NAMES_OF_SOUND:
        return True  # and if it is none, that is worth an error
    try:
        soundfile.info(path)
    except (soundfile.LibsndfileError, OSError):
        return False
    return True


def read(path: Path) -> Waveform:
    """All of a file: the mean of its channels, at 16 kHz, shape (n_samples,).

    Raises:
        DataError: it cannot be decoded to its end, has no samples, or has samples that are no numbers.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = int(file.samplerate)
            blocks = [b.mean(1) for b in file.blocks(BLOCK_S * rate, dtype="float32", always_2d=True)]
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"{path} cannot be read as sound: {error}", hint="convert it to FLAC or WAV") from error
    if not sum(map(len, blocks)):
        raise DataError(f"{path} holds no sound: 0 samples", hint="leave it out")
    mono: Waveform = np.concatenate(blocks)
    if not np.isfinite(mono).all():
        raise DataError(f"{path} holds samples that are not numbers", hint="write it anew from where it came from")
    return mono if rate == SAMPLE_RATE_HZ else resampled(mono, rate)


def resampled(mono: Waveform, rate: int) -> Waveform:
    """At 16 kHz (torchaudio), piece by piece; each hears a second of its neighbours, so that no seam is heard."""
    import torch

    shims.apply()
    import torchaudio

    pieces = []
    for start in range(0, len(mono), BLOCK_S * rate):
        first = max(0, start - rate)
        piece = torch.from_numpy(mono[first : start + (BLOCK_S + 1) * rate])
        whole = torchaudio.functional.resample(piece, rate, SAMPLE_RATE_HZ).numpy()
        skip = SAMPLE_RATE_HZ if start else 0
        last = start + BLOCK_S * rate >= len(mono)
        pieces.append(whole[skip:] if last else whole[skip : skip + BLOCK_S * SAMPLE_RATE_HZ])
    joined: Waveform = np.concatenate(pieces)
    return joined
