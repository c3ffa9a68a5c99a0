"""What is drawn for one utterance in one epoch: its speed, its masks. NumPy only.

Everything follows from (seed, epoch, utterance) and from nothing else: not from the rank that reads it, the thread
that decodes it, the batch that it is in, or what was drawn before. So a run that comes back, on any number of ranks,
hears each utterance as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

Keys = npt.NDArray[np.uint64]
Masks = npt.NDArray[np.bool_]


def keys_of(subset: str, positions: npt.NDArray[np.int64], copies: npt.NDArray[np.int64]) -> Keys:
    """What identifies utterances in a run: the subset, the position in its pack, and which of its copies it is (an
    epoch may have several). Of a pack of the same digest, a position is always the same utterance."""
    base = np.uint64(xxhash.xxh3_64_intdigest(subset.encode()))
    return _mixed(_mixed(base ^ positions.astype(np.uint64)) ^ copies.astype(np.uint64))


def choose(seed: int, epoch: int, keys: Keys, ways: int) -> npt.NDArray[np.int64]:
    """One of `ways` for each utterance, all alike in their odds."""
    if ways == 1:
        return np.zeros(len(keys), dtype=np.int64)
    # Of 2^31 values by a modulus: the odds of any two ways differ by less than one in 10^7.
    return ((_mixed(keys ^ _moment(seed, epoch)) >> np.uint64(33)) % np.uint64(ways)).astype(np.int64)


def dice(seed: int, epoch: int, key: int) -> np.random.Generator:
    """Random numbers of one utterance in one epoch, in order: every user draws from the same stream, at its turn."""
    return np.random.default_rng([int(_moment(seed, epoch)), int(key)])


def _moment(seed: int, epoch: int) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(f"{seed} {epoch}".encode()))


def _mixed(x: npt.NDArray[np.uint64]) -> Keys:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): each bit of `x` decides about each bit of these."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


# Masks ---------------------------------------------------------------------------------------------------------------


def span_mask(dice: np.random.Generator, length: int, prob: float, span: int, min_spans: int = 0) -> Masks:
    """Which of `length` frames, or channels, are masked; shape (length,).

    The masks of wav2vec 2.0's fine-tuning. Names of the same numbers:

        fairseq                 Hugging Face             here
        mask_prob               mask_time_prob           prob, over time
        mask_length             mask_time_length         span
        (2, in the code)        mask_time_min_masks      min_spans
        mask_channel_prob       mask_feature_prob        prob, over channels
        mask_channel_length     mask_feature_length      span
        (0, in the code)        mask_feature_min_masks   min_spans

    In all three, prob * length / span spans begin at different places, rounded up or down by chance so that they are
    as many on average. Spans may overlap: 0.65 with spans of 10 masks about 0.49 of the frames, which is what the
    published recipes mean by it, and what fairseq2 writes as 0.69 of a count that allows for the overlap.

    Two differences, both so that a mask is its utterance's own. fairseq then thins each mask of a batch to the
    smallest of them (`require_same_masks`); Hugging Face rounds all rows of a batch by one draw. And where an utterance
    is too short for a span, fairseq shortens it and Hugging Face raises; here it is masked as far as it goes, but never
    whole.
    """
    mask = np.zeros(length, dtype=bool)
    spans = max(int(prob * length / span + dice.random()), min_spans if prob > 0 else 0)
    if length <= span:
        span, spans = max(length - 1, 0), min(spans, 1)
    starts = length - span + 1
    spans = min(spans, starts, length // span if span else 0)
    if spans > 0:
        begins = dice.choice(starts, spans, replace=False)
        mask[(begins[:, None] + np.arange(span)).ravel()] = True
    return mask


def one_span(dice: np.random.Generator, length: int, widest: int) -> tuple[int, int]:
    """(begin, end) of SpecAugment's span (Park et al., 2019): its width is uniform in [0, widest), its place uniform.
    `widest` is at most `length`."""
    width = dice.uniform(0, min(widest, length))
    begin = dice.uniform(0, length - width)
    return int(begin), int(begin) + int(width)


def stacked(rows: Sequence[Masks], width: int) -> Masks:
    """Masks of several utterances as one array (rows, width), false where a row is over."""
    whole = np.zeros((len(rows), width), dtype=bool)
    for target, row in zip(whole, rows, strict=True):
        target[: len(row)] = row
    return whole
