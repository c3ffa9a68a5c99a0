"""A waveform of any length and what a model hears in it, with times where they are asked for.

What fits into the model at once is heard as evaluation hears it. Longer sound is cut into windows: for CTC they
overlap, and of each only the frames in its middle count; for Whisper they are at most 30 s, cut where it is quiet.
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
from launcher.worker.data import Waveform, to_device
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
        segments: list[Segment] = []
        for start, end in quiet_cuts(waveform, model.max_samples or len(waveform)):
            segments += _window(model, waveform[start:end], device, start / SAMPLE_RATE_HZ, timed)
        text = " ".join(segment.text for segment in segments if segment.text)
        return Transcript(file, text, duration_s, [s for s in segments if s.text] if timed else [])


# CTC -----------------------------------------------------------------------------------------------------------------


def samples_per_frame(model: CtcModel) -> int:
    minute = 60 * SAMPLE_RATE_HZ
    fewer, more = (int(n) for n in model.frames(np.array([minute, 2 * minute])))
    return round(minute / (more - fewer))


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


def quiet_cuts(waveform: Waveform, longest: int) -> Iterator[tuple[int, int]]:
    """(start, end) of windows of at most so many samples, one after the other, cut at the quietest tenth of a second
    of each one's last seconds: a word that is cut through is heard by neither side."""
    tenth = SAMPLE_RATE_HZ // 10
    start = 0
    while len(waveform) - start > longest:
        search = start + longest - QUIET_S * SAMPLE_RATE_HZ
        tenths = waveform[search : start + longest].reshape(-1, tenth)
        end = search + int(np.square(tenths).mean(1).argmin()) * tenth + tenth // 2
        yield start, end
        start = end
    yield start, len(waveform)


def _window(
    model: SpeechModel, waveform: Waveform, device: torch.device, offset_s: float, timed: bool
) -> list[Segment]:
    """What is heard in one window; its times are those of the whole."""
    end_s = offset_s + len(waveform) / SAMPLE_RATE_HZ
    tensors = to_device(model.collate([waveform], ["A"]), device)
    if not timed or not isinstance(model, WhisperModel) or (first := first_timestamp(model)) is None:
        _, texts = model(tensors, transcribe=True)
        return [Segment(texts[0], round(offset_s, 3), round(end_s, 3))]
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
    return timestamped(model.tokenizer, written[0].tolist(), first, offset_s, end_s)


def first_timestamp(model: WhisperModel) -> int | None:
    """The token of 0.00 s; None where the model was made without any."""
    no_timestamps = getattr(model.model.generation_config, "no_timestamps_token_id", None)
    return None if no_timestamps is None else int(no_timestamps) + 1


def timestamped(tokenizer: Any, tokens: Sequence[int], first: int, offset_s: float, end_s: float) -> list[Segment]:
    """Segments of what Whisper wrote with timestamps between: one every 0.02 s, counted from the window's start.

    Text that no timestamp closes ends with the window; where there is none at all, that is one segment for all of it.
    """
    segments: list[Segment] = []
    said: list[int] = []
    start_s = offset_s

    def close(at_s: float) -> None:
        if text := tokenizer.decode(said, skip_special_tokens=True).strip():
            segments.append(Segment(text, round(start_s, 3), round(max(start_s, at_s), 3)))
        said.clear()

    for token in tokens:
        if token < first:
            said.append(token)
            continue
        at_s = min(end_s, offset_s + (token - first) * 0.02)
        close(at_s)
        start_s = max(start_s, at_s)
    close(end_s)
    return segments
