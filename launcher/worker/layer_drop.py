"""LayerDrop (Fan, Grave, Joulin 2020) that neither ranks nor ZeRO's stages can disagree on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STREAM = 0x1A7E  # parts these numbers from others that are drawn from the same seed


class LayerDrop:
    """Passes whole layers over in training: what went into one comes out of it.

    The layers of a micro-batch follow from the seed, the step and the number of the micro-batch, so that they are the
    same on every rank and after a resume. A layer that is passed over runs all the same and its result is thrown away:
    its weights have a gradient, of zeros, in every step. Else ZeRO 3 would gather other weights in each step, data
    parallel without ZeRO would wait for gradients that never come, and AdamW would move such a layer on by its momentum
    at some stages and not at others. transformers skips the layer by each rank's own dice, and where it believes in
    ZeRO 3 drops none (read: 5.23, `Wav2Vec2Encoder.forward`).

    Args:
        layers: modules whose first input and (first) output are the hidden states, of one shape.
        probability: of each layer to be passed over.
    """

    def __init__(self, layers: Sequence[nn.Module], probability: float, seed: int) -> None:
        self.probability, self.seed, self.count = probability, seed, len(layers)
        self.dropped = np.zeros(self.count, dtype=bool)
        if probability > 0:
            for number, layer in enumerate(layers):
                layer.register_forward_hook(partial(self._after, number), with_kwargs=True)

    def draw(self, step: int, batch: int) -> None:
        """The layers of one micro-batch, from now on. Before the first call none is passed over."""
        if self.probability > 0:
            dice = np.random.default_rng((_STREAM, self.seed, step, batch))
            self.dropped = dice.random(self.count) < self.probability

    def _after(self, number: int, layer: nn.Module, given: Any, named: dict[str, Any], result: Any) -> Any:
        if not (layer.training and self.dropped[number]):
            return None  # the result stands
        entered = given[0] if given else named["hidden_states"]
        left, *rest = result if isinstance(result, tuple) else (result,)
        # Not a product with zero: that of an infinity is no number.
        passed: Tensor = torch.where(torch.zeros((), dtype=torch.bool, device=left.device), left, entered)
        return (passed, *rest) if isinstance(result, tuple) else passed
