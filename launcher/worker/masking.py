"""Masks that a micro-batch carries into its model: drawn for each utterance when it is collated (`augment.py`), laid
over what the model hears when it trains.

wav2vec 2.0 masks its features behind the convolutions: spans of frames become one trained vector, spans of channels
zero. transformers would draw them on each rank from numpy's global dice; here they come with the batch. SpecAugment
(Park et al., 2019) hides one span of time and one of bands of a spectrogram.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.worker import augment
from launcher.worker.data import Tensors

Dice = Sequence[np.random.Generator]

FRAMES, CHANNELS = "masked_frames", "masked_channels"
"""Names in a micro-batch: bool, (batch, frames) and (batch, channels)."""

TIME_SPAN, BAND_SPAN = "time_span", "band_span"
"""Names in a micro-batch: int64, (batch, 2), each row a begin and an end."""

MIN_TIME_SPANS = 2
"""fairseq, wav2vec2.py: `min_masks=2`; transformers: `mask_time_min_masks`."""


def wav2vec2_masks(
    dice: Dice,
    frames: Sequence[int],
    width: int,
    channels: int,
    *,
    time: tuple[float, int],
    channel: tuple[float, int],
) -> Tensors:
    """
    Args:
        frames: of each utterance, without padding.
        width: frames of the batch.
        time, channel: share that spans cover, counted before overlap, and the length of one; as `augment.span_mask`.
    """
    over_time = [augment.span_mask(d, n, *time, MIN_TIME_SPANS) for d, n in zip(dice, frames, strict=True)]
    over_channels = [augment.span_mask(d, channels, *channel) for d in dice]
    masks = {FRAMES: augment.stacked(over_time, width), CHANNELS: augment.stacked(over_channels, channels)}
    return {name: torch.from_numpy(mask) for name, mask in masks.items()}


@contextmanager
def masked_by(model: Any, tensors: Tensors) -> Iterator[None]:
    """In it, transformers' Wav2Vec2Model, HubertModel or WavLMModel masks as the micro-batch says, when it trains.

    A batch without masks, and one whose masks hide nothing, have the graph of any other: each rank waits for the
    gradient of the vector that stands for masked frames.
    """

    def mask(hidden: Tensor, *_: object, **__: object) -> Tensor:
        if not model.training:
            return hidden
        vector = getattr(model, "masked_spec_embed", None)
        if vector is not None and vector.requires_grad:
            frames = tensors.get(FRAMES, hidden.new_zeros(hidden.shape[:2], dtype=torch.bool))
            hidden = torch.where(frames[:, :, None], vector.to(hidden.dtype), hidden)
        if CHANNELS in tensors:
            hidden = hidden.masked_fill(tensors[CHANNELS][:, None, :], 0)
        return hidden

    model._mask_hidden_states = mask
    try:
        yield
    finally:
        del model._mask_hidden_states  # the class's own is behind it


def spec_spans(dice: Dice, frames: Sequence[int], bands: int, *, widest_time: int, widest_band: int) -> Tensors:
    """One span of an utterance's own frames and one of bands, for each."""
    spans = [
        (augment.one_span(d, n, widest_time), augment.one_span(d, bands, widest_band))
        for d, n in zip(dice, frames, strict=True)
    ]
    return {
        TIME_SPAN: torch.tensor([time for time, _ in spans], dtype=torch.int64),
        BAND_SPAN: torch.tensor([band for _, band in spans], dtype=torch.int64),
    }


def hidden_by(features: Tensor, time_span: Tensor, band_span: Tensor) -> Tensor:
    """Spectrograms (batch, bands, frames) with their spans set to zero."""
    time = _inside(time_span, features.shape[2])[:, None, :]
    band = _inside(band_span, features.shape[1])[:, :, None]
    return features.masked_fill(time | band, 0)


def _inside(span: Tensor, width: int) -> Tensor:
    at = torch.arange(width, device=span.device)
    return (at >= span[:, :1]) & (at < span[:, 1:])
