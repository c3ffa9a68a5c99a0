"""A corpus of synthetic English speech in LibriSpeech's layout, for demos and tests without a download.

espeak-ng speaks sentences of a small grammar, in many accents and variants ("voices"). Neither the voices nor the
sentences of `dev-clean` occur in `train-clean-100`, so that a WER on it says something. What reads a corpus is in
`librispeech.py`.
"""

from __future__ import annotations

import ctypes
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError, UsageError
from launcher.rundir import storage_errors, sync_dir
from launcher.worker.librispeech import SAMPLE_RATE_HZ

# Sentences -----------------------------------------------------------------------------------------------------------

_DETERMINERS = ["the", "my", "our"]
_ADJECTIVES = ["old", "young", "happy", "quiet", "tired", "famous"]
_PEOPLE = ["doctor", "farmer", "sailor", "teacher", "king", "baker", "child", "woman"]
_DEEDS = ["found", "carried", "painted", "wanted", "lost", "bought"]
_THINGS = ["a letter", "the basket", "a lantern", "some apples", "the silver ring", "a wooden chair"]
_MOTIONS = ["waited", "slept", "walked", "worked", "danced", "played"]
_PLACES = [
    "in the garden",
    "near the river",
    "under the bridge",
    "behind the house",
    "beside the window",
    "across the field",
]
_TIMES = ["today", "yesterday", "every morning", "last winter", "after dinner", "all evening"]

_SENTENCES = len(_DETERMINERS) * len(_PEOPLE) * len(_ADJECTIVES) * len(_PLACES) * len(_TIMES) * len(_MOTIONS) + len(
    _DETERMINERS
) * len(_PEOPLE) * len(_ADJECTIVES) * len(_DEEDS) * len(_THINGS) * len(_PLACES)  # 62,208


def _sentence(rng: random.Random) -> str:
    pick = rng.choice
    person = f"{pick(_DETERMINERS)} {pick(_ADJECTIVES)} {pick(_PEOPLE)}"
    if rng.random() < 0.5:
        return f"{person} {pick(_MOTIONS)} {pick(_PLACES)} {pick(_TIMES)}"
    return f"{person} {pick(_DEEDS)} {pick(_THINGS)} {pick(_PLACES)}"


def _sentences(count: int, rng: random.Random, never: set[str]) -> list[str]:
    """`count` different sentences, none of them in `never`."""
    found: dict[str, None] = {}
    while len(found) < count:
        sentence = _sentence(rng)
        if sentence not in never:
            found[sentence] = None
    return list(found)


# Voices --------------------------------------------------------------------------------------------------------------

_ACCENTS = ["en", "en-029", "en-GB-scotland", "en-GB-x-gbclan", "en-GB-x-gbcwmd", "en-GB-x-rp", "en-US", "en-US-nyc"]
_TRAIN_VARIANTS = ["f1", "f2", "f3", "f5", "m1", "m2", "m3", "m5", "m6", "m7", "m8"]
_DEV_VARIANTS = ["f4", "m4"]
_WORDS_PER_MINUTE = (135, 160)  # at 185 a few sentences have more letters than a CTC of 25 frames a second has frames


@dataclass(frozen=True)
class _Voice:
    """How one speaker sounds."""

    speaker: int
    accent: str
    variant: str
    """espeak's name for a vocal tract; its first letter is the sex."""
    words_per_minute: int
    pitch: int
    """0 to 99; 50 is the variant's own."""

    @property
    def name(self) -> str:
        return f"gmw/{self.accent}+{self.variant}"


def _voices(variants: Sequence[str], first_speaker: int, rng: random.Random) -> list[_Voice]:
    """One speaker for each accent and variant, in an order where a few already differ in both."""
    pairs = [(accent, variant) for variant in variants for accent in _ACCENTS]
    rng.shuffle(pairs)
    return [
        _Voice(first_speaker + i, accent, variant, rng.randint(*_WORDS_PER_MINUTE), rng.randint(35, 65))
        for i, (accent, variant) in enumerate(pairs)
    ]


# Speech --------------------------------------------------------------------------------------------------------------

_SYNCHRONOUS = 2
_NEVER_EXIT = 0x8000
_UTF8 = 1
_RATE, _PITCH = 1, 3
_OK = 0


class _Espeak:
    """A copy of espeak-ng with a state of its own. Its audio is 16-bit mono at `rate_hz`."""

    def __init__(self, library: Path, data_parent: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.rate_hz = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data_parent), _NEVER_EXIT))
        if self.rate_hz <= 0:
            raise PreflightError("espeak-ng does not start with its own data", hint="reinstall espeakng-loader")
        self._pieces: list[bytes] = []
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._callback = prototype(self._collect)  # espeak keeps no reference: without ours it would be freed
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: int | None, count: int, _: int | None) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, text: str, voice: _Voice, seed: int) -> bytes:
        """Little-endian 16-bit samples at `rate_hz`."""
        library, data = self._library, text.encode() + b"\0"
        if hasattr(library, "espeak_ng_SetRandSeed"):  # breath and jitter; seeded from the clock by itself
            library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._pieces.clear()
        for status in (
            library.espeak_SetVoiceByName(voice.name.encode()),
            library.espeak_SetParameter(_RATE, voice.words_per_minute, 0),
            library.espeak_SetParameter(_PITCH, voice.pitch, 0),
            library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _UTF8, None, None),
        ):
            if status != _OK:
                raise PreflightError(
                    f"espeak-ng cannot speak as {voice.name}: status {status}", hint="reinstall espeakng-loader"
                )
        return b"".join(self._pieces)


@contextmanager
def _espeak() -> Iterator[_Espeak]:
    """A fresh espeak-ng, loaded from a copy of its library.

    espeak keeps state from one sentence to the next that neither its seed nor `espeak_Terminate` resets (1.52: the
    same sentence twice differs by some samples). Another file is another library to the loader, with fresh state. The
    temporary directory also keeps the path of the data short: past some 140 characters espeak does not find it.

    Raises:
        PreflightError: espeakng-loader is not installed, or does not fit this machine.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise PreflightError(
            "synthetic speech needs espeakng-loader, which is not installed", hint="pip install 'speechctl[demo]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="speechctl-espeak-") as name:
        folder = Path(name)
        shutil.copyfile(espeakng_loader.get_library_path(), folder / "libespeak-ng.so")
        (folder / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
        try:
            espeak = _Espeak(folder / "libespeak-ng.so", folder)
        except OSError as error:
            raise PreflightError(
                f"the library of espeakng-loader does not load here: {error}",
                hint="set TMPDIR to a directory that is not mounted noexec, or use a real LibriSpeech",
            ) from error
        yield espeak


@contextmanager
def _to_16_khz(rate_hz: int) -> Iterator[Callable[[bytes], Any]]:
    """From little-endian 16-bit samples at `rate_hz` to an int16 array (T,) at 16 kHz."""
    import numpy as np
    import torch

    from launcher.worker import shims

    shims.apply()
    from torchaudio.transforms import Resample

    resample = Resample(rate_hz, SAMPLE_RATE_HZ)

    def convert(samples: bytes) -> Any:
        wave = torch.from_numpy(np.frombuffer(samples, dtype="<i2").astype(np.float32))
        return resample(wave).round().clamp(-(2**15), 2**15 - 1).to(torch.int16).numpy()

    threads = torch.get_num_threads()
    # Three seconds are too little to share: 29 ms with two threads on a busy 2-core machine, 5 ms with one.
    torch.set_num_threads(1)
    try:
        yield convert
    finally:
        torch.set_num_threads(threads)


# The corpus ----------------------------------------------------------------------------------------------------------


def synthesize(root: Path, train_utterances: int, dev_utterances: int, seed: int) -> None:
    """Make `root` with `train-clean-100`, `dev-clean` and `SPEAKERS.TXT`; equal arguments give equal bytes.

    It is built beside `root` and renamed at the end: `root` exists whole or not at all.

    Raises:
        UsageError: `root` exists, or the grammar has not enough sentences.
        PreflightError: the extra `demo` is not installed.
        StorageError: a write failed.
    """
    if root.exists():
        raise UsageError(f"{root} exists already", hint=f"remove {root} to have it made again")
    if train_utterances + dev_utterances > _SENTENCES // 2:  # a half, so that drawing them at random ends
        raise UsageError(
            f"{train_utterances + dev_utterances} sentences are more than the {_SENTENCES // 2} on offer",
            hint="lower data.synthesize.train_utterances",
        )
    rng = random.Random(seed)
    dev_voices = _voices(_DEV_VARIANTS, 101, rng)
    train_voices = _voices(_TRAIN_VARIANTS, 201, rng)
    dev = _sentences(dev_utterances, rng, never=set())
    train = _sentences(train_utterances, rng, never=set(dev))
    assert {v.variant for v in dev_voices}.isdisjoint(v.variant for v in train_voices)
    assert {v.speaker for v in dev_voices}.isdisjoint(v.speaker for v in train_voices)
    assert set(dev).isdisjoint(train)

    print(f"synthesizing {len(train)} + {len(dev)} utterances into {root}", file=sys.stderr, flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    with storage_errors(root):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that died and had our number
            partial.mkdir()
            with _espeak() as espeak, _to_16_khz(espeak.rate_hz) as convert:

                def speak(sentence: str, voice: _Voice) -> Any:
                    return convert(espeak.say(sentence, voice, rng.randrange(1, 2**31)))

                spoken = [
                    *_write_subset(partial / "dev-clean", dev, dev_voices, speak),
                    *_write_subset(partial / "train-clean-100", train, train_voices, speak),
                ]
            _write_speakers(partial / "SPEAKERS.TXT", spoken)
            os.rename(partial, root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_dir(root.parent)


def _write_subset(
    subset: Path, sentences: list[str], voices: list[_Voice], speak: Callable[[str, _Voice], Any]
) -> list[tuple[_Voice, str, float]]:
    """Write one subset, the sentences dealt to the voices in turn; returns each voice's subset and minutes."""
    import soundfile

    subset.mkdir()
    spoken = []
    for i, voice in enumerate(voices[: len(sentences)]):
        chapter = 1000 + voice.speaker
        folder = subset / str(voice.speaker) / str(chapter)
        folder.mkdir(parents=True)
        transcript, seconds = [], 0.0
        for k, sentence in enumerate(sentences[i :: len(voices)]):
            utt_id = f"{voice.speaker}-{chapter}-{k:04d}"
            samples = speak(sentence, voice)
            flac = io.BytesIO()  # soundfile's own message for a full disk is "System error."
            soundfile.write(flac, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
            (folder / f"{utt_id}.flac").write_bytes(flac.getvalue())
            transcript.append(f"{utt_id} {sentence.upper()}\n")
            seconds += len(samples) / SAMPLE_RATE_HZ
        (folder / f"{voice.speaker}-{chapter}.trans.txt").write_text("".join(transcript))
        spoken.append((voice, subset.name, seconds / 60))
    return spoken


def _write_speakers(path: Path, spoken: list[tuple[_Voice, str, float]]) -> None:
    """LibriSpeech's table: `ID | SEX | SUBSET | MINUTES | NAME`, comments start with a semicolon."""
    lines = ["; Synthetic speech by espeak-ng; the name is the voice.", ";ID  |SEX| SUBSET           |MINUTES| NAME"]
    for voice, subset, minutes in sorted(spoken, key=lambda s: s[0].speaker):
        lines.append(f"{voice.speaker:<5}| {voice.variant[0].upper()} | {subset:<17}| {minutes:<5.2f} | {voice.name}")
    path.write_text("\n".join(lines) + "\n")
