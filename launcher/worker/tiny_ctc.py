"""The demo's backbone: log-mel, convolution, transformer and a CTC head, small enough to train on two CPU cores.

Every part is an ordinary module that owns and calls its own parameters, and what runs depends on shapes alone, so
that ZeRO-3 gathers the same parameters in the same order on every rank. The letters are in `vocabulary.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher import recipe as schema
from launcher.worker import masking, shims
from launcher.worker.backbone import CtcModel, IntArray, layer_parts
from launcher.worker.data import Tensors
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.masking import hidden_by
from launcher.worker.vocabulary import Vocabulary

shims.apply()

from torchaudio.transforms import MelSpectrogram  # noqa: E402  (after the shims)

_WINDOW = 400  # samples: 25 ms
_HOP = 160  # samples: 10 ms
_MELS = 80
_KERNEL = 5  # of the two convolutions of stride 2: 25 frames a second, where speech has about 15 letters a second
_HEADS = 4  # of attention; the recipe holds `hidden` to multiples of 8

_N = TypeVar("_N", int, Tensor, npt.NDArray[np.int64])
_Lengths = TypeVar("_Lengths", Tensor, npt.NDArray[np.int64])


class TinyCtcModel(CtcModel):
    def __init__(self, backbone: schema.TinyCtc, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.backbone = backbone
        self.model = TinyCtc(
            vocabulary_size=len(vocabulary),
            hidden=backbone.hidden,
            layers=backbone.layers,
            dropout=backbone.dropout,
        )

    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        spans = (tensors[masking.TIME_SPAN], tensors[masking.BAND_SPAN]) if masking.TIME_SPAN in tensors else None
        return cast(tuple[Tensor, Tensor], self.model(tensors["inputs"], tensors["lengths"], spans))

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        assert isinstance(self.backbone, schema.TinyCtc)
        if not self.backbone.spec_augment:
            return tensors
        frames = TinyCtc.mel_frames(tensors["lengths"].numpy()).tolist()
        return {**tensors, **masking.spec_spans(dice, frames, TinyCtc.BANDS, widest_time=25, widest_band=15)}

    def frames(self, n_samples: IntArray) -> IntArray:
        return TinyCtc.frames(n_samples)

    def parts(self) -> dict[str, list[str]]:
        return {
            "feature_encoder": ["model.subsample1.", "model.subsample2."],
            **layer_parts("layer", "model.blocks.", len(self.model.blocks), after=["model.norm."]),
            "head": ["model.head."],
        }

    def export(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous().clone() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.backbone.model_dump(), indent=1) + "\n")
        if self.vocabulary.kind != "letters":
            self.vocabulary.save(folder)

    def load_export(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(folder / "model.safetensors"))


class TinyCtc(nn.Module):
    """(B, T) samples to (B, F, V) logits of one letter each 40 ms."""

    BANDS = _MELS

    def __init__(self, *, vocabulary_size: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.subsample1 = _CastingConv1d(_MELS, hidden, _KERNEL, stride=2, padding=_KERNEL // 2)
        self.subsample2 = nn.Conv1d(hidden, hidden, _KERNEL, stride=2, padding=_KERNEL // 2)
        self.blocks = nn.ModuleList(_Block(hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary_size)

    def forward(
        self, waveforms: Tensor, lengths: Tensor, spans: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, F, V) in the parameters' type, and how many of each utterance's F frames are its own (B,).

        Args:
            waveforms: (B, T) 16 kHz, zero after each utterance's length. Never computed on in less than fp32.
            lengths: (B,) int64, in samples.
            spans: of 10 ms frames and of mel bands, (B, 2) each: in training set to the utterance's mean.
        """
        mels = _mel_frames(lengths)
        with torch.no_grad(), torch.autocast(waveforms.device.type, enabled=False):
            features = _log_mel(waveforms.float(), mels)
            if spans is not None and self.training:
                features = hidden_by(features, *spans)
        # A convolution looks over the end of an utterance: what it sees there must be zero, as at the batch's end.
        halves, frames = _halve(mels), _halve(_halve(mels))
        x = F.gelu(self.subsample1(features)) * _inside(halves, _halve(features.shape[2]))[:, None, :]
        x = F.gelu(self.subsample2(x)).transpose(1, 2)
        inside = _inside(frames, x.shape[1])
        for block in self.blocks:
            x = block(x, inside)
        logits: Tensor = self.head(self.norm(x))
        return logits, frames

    @staticmethod
    def frames(n_samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of `forward`'s frames utterances of so many samples have; at least 1 each."""
        return _halve(_halve(_mel_frames(n_samples)))

    @staticmethod
    def mel_frames(n_samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many frames of its features they have."""
        return _mel_frames(n_samples)


class _CastingConv1d(nn.Conv1d):
    """Takes features of any type to its weight's. It asks its own weight: ZeRO-3 would gather another's at each ask."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class _Block(nn.Module):
    """Depthwise convolution, self-attention and feed-forward, each a residual on (B, F, hidden).

    The convolution is also what tells positions apart.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, 2 * hidden)
        self.depthwise = nn.Conv1d(hidden, hidden, 15, padding=7, groups=hidden)
        self.contract = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        y = F.glu(self.expand(self.norm1(x))) * inside[:, :, None]
        y = self.depthwise(y.transpose(1, 2)).transpose(1, 2)
        x = x + self.dropout(self.contract(F.silu(y)))
        x = x + self.dropout(self.out(self._attend(self.norm2(x), inside)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm3(x)))))
        return x

    def _attend(self, x: Tensor, inside: Tensor) -> Tensor:
        batch, frames, hidden = x.shape
        qkv = self.qkv(x).view(batch, frames, 3, _HEADS, hidden // _HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None, :]).transpose(1, 2).flatten(2)


# Features ------------------------------------------------------------------------------------------------------------


@cache
def _mel(device: torch.device) -> MelSpectrogram:
    """Outside the model, so that casting the model to bf16 leaves the filters fp32 and checkpoints without them."""
    # center=False: with it a frame at the end would hear the reflection of what follows the utterance.
    return MelSpectrogram(
        SAMPLE_RATE_HZ, n_fft=_WINDOW, hop_length=_HOP, n_mels=_MELS, center=False, norm="slaney", mel_scale="slaney"
    ).to(device)


def _log_mel(waveforms: Tensor, mels: Tensor) -> Tensor:
    """(B, mels, frames), zero mean and unit variance for each utterance and band over its own frames, else zero."""
    waveforms = F.pad(waveforms, (0, max(0, _WINDOW - waveforms.shape[1])))
    features = _mel(waveforms.device)(waveforms).clamp(min=1e-5).log()
    inside = _inside(mels, features.shape[2])[:, None, :]
    count = mels[:, None, None]
    mean = (features * inside).sum(2, keepdim=True) / count
    centred = (features - mean) * inside
    deviation = (centred.square().sum(2, keepdim=True) / count).sqrt()
    normalized: Tensor = centred / (deviation + 1e-3)
    return normalized


def _mel_frames(samples: _Lengths) -> _Lengths:
    """Whole windows in so many samples; one, filled up with zeros, in less."""
    return (samples - _WINDOW).clip(min=0) // _HOP + 1


def _halve(frames: _N) -> _N:
    """Length after a convolution of stride 2 with `_KERNEL // 2` of padding."""
    return (frames + 1) // 2


def _inside(lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool: true where a frame belongs to its utterance."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
