"""The optimizer, the same under every engine: torch's AdamW, which passes over what is frozen, leaves steps out, and
keeps the exponential moving average (EMA) of the weights where the recipe asks for one.

The average is a state like the two moments, of the very vectors that are updated: fp32, a rank's own part of them under
ZeRO, on the host where they are offloaded. So nothing is gathered for it, and it is saved, resumed and cut up for
another number of ranks as the moments are.
"""

from __future__ import annotations

from typing import Any

import torch

EMA = "ema"
"""The name of the average in the optimizer's state of a parameter."""


class AdamW(torch.optim.AdamW):
    """Passes over groups that are `frozen`: their weights, moments and counts stay as they are.

    DeepSpeed flattens a group into one vector that has a gradient, of zeros, at every step.
    """

    overflow = False
    """Set: `step` does nothing at all. DeepSpeed looks at it after a step, as all its own optimizers have it."""
    ema: float | None = None
    """Decay of the average of the weights; None: none is kept."""

    def step(self, closure: Any = None) -> Any:
        if self.overflow:
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("frozen")]
        # Adam makes its own states where there are none at all: the average comes to them behind the first update.
        new = [] if self.ema is None else [(p, p.detach().clone()) for p in self._without_average()]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for parameter, weights in new:
            self.state[parameter][EMA] = weights
        if self.ema is not None:
            self._average(self.ema)
        return result

    def _without_average(self) -> list[torch.Tensor]:
        learning = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        return [p for p in learning if EMA not in self.state.get(p, {})]

    def _average(self, ema: float) -> None:
        """Follow the weights; those of groups that are frozen for now, too, which stand still. Before its first update
        a parameter has no average: it would be what the parameter is."""
        alike: dict[float, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if EMA in state:
                    averages, weights = alike.setdefault(float(state["step"]), ([], []))
                    averages.append(state[EMA])
                    weights.append(parameter.detach())
        for updates, (averages, weights) in alike.items():
            torch._foreach_lerp_(averages, weights, 1 - decay(ema, updates))

    def exchange(self) -> None:
        """Have the weights and their average change places, without a copy; once more, and all is as it was."""
        for parameter, state in self.state.items():
            if EMA in state:
                parameter.data, state[EMA] = state[EMA], parameter.data


def decay(ema: float, updates: float) -> float:
    """How much of the average stays in the one after so many updates of a parameter: little at first, so that where
    training began, such as a random head, is soon forgotten. The rule of TensorFlow's `ExponentialMovingAverage` with
    `num_updates` (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage)."""
    return min(ema, (1 + updates) / (10 + updates))
