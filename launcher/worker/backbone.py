"""What every trained model is to the rest of the program: tensors in, loss and text out; and what all share.

The families are in `wav2vec2.py` (with HuBERT and WavLM), `whisper.py` and `tiny_ctc.py`; `models.py` makes one from
the recipe.

A `SpeechModel` owns no parameter itself, only submodules, so that ZeRO-3's hooks see every one. Weights are loaded
whole on each rank before the engine shards them: building speech models under `zero.Init` breaks the weight norm of
wav2vec2's positional convolution and Whisper's sinusoids.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher import recipe as schema
from launcher.errors import DataError
from launcher.worker.data import Tensors, Waveform, pad
from launcher.worker.layer_drop import LayerDrop
from launcher.worker.vocabulary import BLANK, Vocabulary

IntArray = npt.NDArray[np.int64]
Pretrained = schema.Wav2Vec2 | schema.Whisper | schema.WhisperCtc
"""A backbone of the recipe that has weights somewhere."""


class SpeechModel(nn.Module, ABC):
    """What the engine trains and the evaluation asks."""

    backbone: schema.Backbone

    layer_drop: LayerDrop | None = None

    unadaptable: frozenset[str] = frozenset()
    """Names of linear modules whose weights are read in passing: what stands in their place is never called."""

    max_samples: int | None = None
    """Longest utterance that is heard whole; what lies behind is cut off. None: any."""

    @property
    def inner(self) -> Any:
        """The network that is not ours: adapters go into it, and it can compute its layers again."""
        return self.model

    def begin(self, step: int, batch: int) -> None:
        """Say which micro-batch is next: the `batch`-th of a rank in optimizer step `step`, both from 0 and the same
        on all ranks. What is drawn for all of them alike follows from it."""
        if self.layer_drop is not None:
            self.layer_drop.draw(step, batch)

    @abstractmethod
    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        """Inputs and labels of one micro-batch, on the CPU. Called in a thread; touches no parameter."""

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        """A collated micro-batch with what training is to hide of it.

        Args:
            dice: one for each utterance, the same whenever and wherever an epoch reads it. Called in a thread; nothing
                else may decide what is hidden, and touches no parameter.
        """
        return tensors

    @abstractmethod
    def forward(self, tensors: Tensors, transcribe: bool = False, in_step: bool = False) -> tuple[Tensor, list[str]]:
        """Loss of each utterance, shape (batch,), and where `transcribe` is set the greedy transcripts.

        Evaluation goes through here too, because ZeRO-3 hangs its hooks on `forward`. `in_step`: every rank runs
        the same number of decoding steps, which ZeRO-3 needs.
        """

    @abstractmethod
    def padded_samples(self, n_samples: IntArray) -> IntArray:
        """Samples that an utterance takes in a batch when it is the longest there."""

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which utterances this model can be trained on at all."""
        return np.ones(len(lengths), dtype=bool)

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, vocabulary and preprocessor into `folder`."""

    @abstractmethod
    def parts(self) -> dict[str, list[str]]:
        """The model's parts from input to output: name -> prefixes of the names in `named_parameters()`.

        Names: `feature_encoder` (convolutions over sound or its spectrum), `encoder` (what lies between it and the
        layers: projection, positions), `layer.0` to `layer.n-1`, `adapter`, `decoder` (embeddings and positions),
        `decoder_layer.0` to `decoder_layer.n-1`, `head`. A part that a model lacks is left out. Every parameter,
        frozen or not, is in exactly one part; a norm behind the last layer is in the part of that layer.
        """

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


class CtcModel(SpeechModel):
    """Classes of a vocabulary by CTC: loss of an utterance is its negative log likelihood, computed in fp32."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    @abstractmethod
    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(batch, frames, classes) and each row's true number of frames."""

    @abstractmethod
    def frames(self, n_samples: IntArray) -> IntArray:
        """The same number of frames, from lengths alone."""

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        inputs, lengths = pad(waveforms)
        return {"inputs": inputs, "lengths": lengths, **self.labels(texts)}

    def labels(self, texts: Sequence[str]) -> Tensors:
        labels = [torch.tensor(self.vocabulary.encode(text), dtype=torch.int64) for text in texts]
        return {
            "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True),
            "label_lengths": torch.tensor([len(x) for x in labels], dtype=torch.int64),
        }

    def forward(self, tensors: Tensors, transcribe: bool = False, in_step: bool = False) -> tuple[Tensor, list[str]]:
        logits, frames = self.logits(tensors)
        # Infeasible utterances are kept out of training; in evaluation zero_infinity keeps one from hiding the rest.
        losses = F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            tensors["labels"],
            frames,
            tensors["label_lengths"],
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        if not transcribe:
            return losses, []
        best = logits.argmax(-1).cpu()
        return losses, [self.vocabulary.decode(row[:n].tolist()) for row, n in zip(best, frames.tolist(), strict=True)]

    def padded_samples(self, n_samples: IntArray) -> IntArray:
        return n_samples

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        needed = lengths["ctc_frames"].astype(np.int64)
        return (needed > 0) & (self.frames(lengths["n_samples"].astype(np.int64)) >= needed)


def layer_parts(name: str, prefix: str, count: int, after: list[str]) -> dict[str, list[str]]:
    """A part for each layer; `after`: what follows the last one and belongs to it."""
    parts = {f"{name}.{i}": [f"{prefix}{i}."] for i in range(count)}
    parts[f"{name}.{count - 1}"] += after
    return parts


# Loading -------------------------------------------------------------------------------------------------------------


def pretrained(kind: Any, backbone: Pretrained, config: Any, fresh: tuple[str, ...] = ()) -> Any:
    """The model with the weights of `backbone.source`, fp32; every one of them, but for those that start with `fresh`.

    Raises:
        DataError: a weight is missing or of another shape; transformers would make it up.
    """
    model, loaded = kind.from_pretrained(
        backbone.source,
        revision=backbone.revision or "main",
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers 4.57 gives the names of mismatched weights, 5 puts their shapes beside them.
    mismatched = (row if isinstance(row, str) else row[0] for row in loaded["mismatched_keys"])
    made_up = {*loaded["missing_keys"], *mismatched}
    if wrong := sorted(name for name in made_up if not name.startswith(fresh or ("\0",))):
        raise DataError(
            f"{backbone.source} lacks {len(wrong)} weights of {backbone.kind}, or has them in another shape:"
            f" {', '.join(wrong[:3])}",
            hint=f"set backbone.source to a {backbone.kind} model whose weights and config.json belong together",
        )
    return model


@contextlib.contextmanager
def quiet_transformers() -> Any:
    """transformers reports fresh heads and slow tokenizers as warnings; here they are what was asked for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
