"""A waveform of any length and what a model hears in it, with times where they are asked for.

What fits into the model at once is heard as evaluation hears it. Longer sound is cut into windows: for CTC they
overlap, and of each only the frames in its middle count; for Whisper they are at most 30 s, cut where it is quiet, and
with timestamps the next one begins where the last sentence ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from launcher.worker.backbone import CtcModel, SpeechModel, quiet_transformers
from launcher.worker.captions import Segment, Transcript, Word, segmented
from launcher.worker.data import Tensors, Waveform, to_device
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.whisper import WhisperModel

WINDOW_S = 40
"""Longest sound that a CTC model gets at once: longer than every utterance of LibriSpeech."""
MARGIN_S = 5
"""So much of a CTC window on each side is heard, and its frames are taken from the neighbour."""
UNKNOWN = 3
"""The last of the classes that are no text: blank, `<s>`, `</s>`, `<unk>`."""
QUIET_S = 5
"""A Whisper window ends at the quietest place of its last seconds."""
ADVANCE_S, LEFT_S = 5.0, 1.0
"""The next window begins at the last timestamp, if that one is so far behind the start and before the end of this."""


def recognize(model: SpeechModel, waveform: Waveform, device: torch.device, *, file: str, timed: bool) -> Transcript:
    """
    Args:
        waveform: 16 kHz, shape (n_samples,).
        timed: whether segments are wanted. Whisper then writes timestamps, too, which can change a word.
    """
    duration_s = len(waveform) / SAMPLE_RATE_HZ
    with torch.inference_mode():
        if isinstance(model, CtcModel):
            hop = samples_per_frame(model)
            path = greedy_path(model, waveform, device, hop)
            words = words_of(path, model.vocabulary.tokens, hop / SAMPLE_RATE_HZ) if timed else []
            return Transcript(file, model.vocabulary.decode(path), duration_s, segmented(words))
        segments = list(window_by_window(model, waveform, device, timed=timed))
        text = " ".join(segment.text for segment in segments if segment.text)
        return Transcript(file, text, duration_s, [s for s in segments if s.text] if timed else [])


# CTC -----------------------------------------------------------------------------------------------------------------


def samples_per_frame(model: CtcModel) -> int:
    long = 10 * SAMPLE_RATE_HZ
    fewer, more = (int(n) for n in model.frames(np.array([long, 2 * long])))
    return round(long / (more - fewer))


def ctc_windows(n_samples: int, longest: int, hop: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first, last) of each window: samples that are heard, and the frames of the whole that it decides.

    Every frame is decided once; all starts are where a frame starts, so that frames of two windows are at one place.
    """
    if n_samples <= longest:
        return [(0, n_samples, 0, n_samples)]  # there are fewer frames than samples
    margin = min(MARGIN_S * SAMPLE_RATE_HZ, longest // 4) // hop * hop
    core = (longest - 2 * margin) // hop * hop
    windows = []
    for middle in range(0, n_samples, core):
        end = min(n_samples, middle + core + margin)
        # What is left over joins the last: of its own it might be shorter than one letter.
        is_last = n_samples - middle - core <= margin
        windows.append((max(0, middle - margin), end, middle // hop, n_samples if is_last else (middle + core) // hop))
        if is_last:
            break
    return windows


def greedy_path(model: CtcModel, waveform: Waveform, device: torch.device, hop: int) -> list[int]:
    """The best class of every frame of all of it."""
    longest = min(WINDOW_S * SAMPLE_RATE_HZ, model.max_samples or math.inf)
    path: list[int] = []
    for start, end, first, last in ctc_windows(len(waveform), int(longest), hop):
        # A label is part of every batch; nobody looks at it.
        tensors = to_device(model.collate([waveform[start:end]], ["A"]), device)
        logits, frames = model.logits(tensors)
        best = logits[0, : int(frames[0])].argmax(-1).tolist()
        path += best[first - start // hop : last - start // hop]
    return path


def words_of(path: Iterable[int], tokens: Sequence[str], frame_s: float) -> list[Word]:
    """Words of the best class of each frame: from the first frame of a word's first letter to the last of its last.

    Args:
        tokens: of each class. Words are told apart by the token `|`, or begin with SentencePiece's `▁`; the four first
            classes are no text.
    """
    words: list[Word] = []
    said, start, end, at = "", 0, 0, 0

    def close() -> None:
        nonlocal said
        if said:
            words.append(Word(said, round(start * frame_s, 3), round(end * frame_s, 3)))
        said = ""

    for index, run in groupby(path):
        began, at = at, at + sum(1 for _ in run)
        token = tokens[index]
        if index <= UNKNOWN:
            continue
        if token == "|" or token.startswith("▁"):
            close()
        if text := token.strip("|▁"):
            start = start if said else began
            said, end = said + text, at
    close()
    return words


# Whisper -------------------------------------------------------------------------------------------------------------


def window_by_window(model: SpeechModel, waveform: Waveform, device: torch.device, *, timed: bool) -> Iterator[Segment]:
    """Segments by the model's timestamps; where it has none, one for each window."""
    first = first_timestamp(model) if timed and isinstance(model, WhisperModel) else None
    start, longest = 0, model.max_samples or len(waveform)
    while start < len(waveform):
        end = quiet_cut(waveform, start, longest)
        span = start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ
        tensors = to_device(model.collate([waveform[start:end]], ["A"]), device)
        start = end
        if first is None or not isinstance(model, WhisperModel):
            _, texts = model(tensors, transcribe=True)
            yield Segment(texts[0], round(span[0], 3), round(span[1], 3))
            continue
        written = generate_with_timestamps(model, tensors)
        segments, closed_s = timestamped(model.tokenizer, written, first, *span, is_last=end == len(waveform))
        yield from segments
        if closed_s is not None:
            start = int(closed_s * SAMPLE_RATE_HZ)


def quiet_cut(waveform: Waveform, start: int, longest: int) -> int:
    """Where a window that begins at `start` ends: with the sound, or at the quietest tenth of a second of its last
    seconds, since a word that is cut through is heard by neither side."""
    if len(waveform) - start <= longest:
        return len(waveform)
    tenth = SAMPLE_RATE_HZ // 10
    search = start + longest - QUIET_S * SAMPLE_RATE_HZ
    tenths = waveform[search : start + longest].reshape(-1, tenth)
    return search + int(np.square(tenths).mean(1).argmin()) * tenth + tenth // 2


def generate_with_timestamps(model: WhisperModel, tensors: Tensors) -> list[int]:
    with quiet_transformers():
        written = model.model.generate(
            tensors["inputs"],
            max_new_tokens=model.model.config.max_target_positions - 8,
            do_sample=False,
            num_beams=1,
            return_timestamps=True,
            force_unique_generate_call=True,
            **model.language,
        )
    tokens: list[int] = written[0].tolist()
    return tokens


def first_timestamp(model: WhisperModel) -> int | None:
    """The token of 0.00 s; None where the model was made without any."""
    no_timestamps = getattr(model.model.generation_config, "no_timestamps_token_id", None)
    return None if no_timestamps is None else int(no_timestamps) + 1


def timestamped(
    tokenizer: Any, tokens: Sequence[int], first: int, start_s: float, end_s: float, *, is_last: bool
) -> tuple[list[Segment], float | None]:
    """Segments of what Whisper wrote about a window with timestamps between: one every 0.02 s, counted from its start.

    It leaves a sentence that the window's end cuts through to the next one: that begins at the last timestamp then, and
    what stands behind it here does not count. Measured on tiny.en: without this, 11 words at the end of a window of
    30 s were in no segment at all. At the end of the sound it goes on only where a second timestamp announces more.

    Returns:
        the segments, and where the next window begins; None: where this one ends. Text that no timestamp closes ends
        with the window; where there is none at all, that is one segment for all of it.
    """
    segments: list[Segment] = []
    said: list[int] = []
    began_s, closed_s = start_s, start_s

    def close(at_s: float) -> None:
        if text := tokenizer.decode(said, skip_special_tokens=True).strip():
            segments.append(Segment(text, round(began_s, 3), round(max(began_s, at_s), 3)))
        said.clear()

    for token in tokens:
        if token < first:
            said.append(token)
            continue
        closed_s = max(began_s, min(end_s, start_s + (token - first) * 0.02))
        close(closed_s)
        began_s = closed_s
    stamps = [
        token >= first for token in tokens if token >= first or tokenizer.decode([token], skip_special_tokens=True)
    ]
    announced = stamps[-2:] == [True, True]
    if closed_s - start_s >= ADVANCE_S and end_s - closed_s >= LEFT_S and (announced or not is_last):
        return segments, closed_s
    close(end_s)
    return segments, None
