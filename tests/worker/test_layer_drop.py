"""Which layers are passed over, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from launcher.worker.layer_drop import LayerDrop


class Layer(nn.Module):
    def __init__(self, factor: float, pair: bool = False) -> None:
        super().__init__()
        self.weight, self.pair = nn.Parameter(torch.tensor(factor)), pair

    def forward(self, hidden_states: Tensor) -> Any:
        out = hidden_states * self.weight
        return (out, "bias") if self.pair else out


def test_the_draw_follows_from_seed_step_and_batch_alone() -> None:
    """Not from how often was drawn before: a run that is resumed at a step passes over what it would have."""
    layers = [Layer(1.0) for _ in range(12)]
    first, resumed = LayerDrop(layers, 0.3, seed=5), LayerDrop(layers, 0.3, seed=5)
    seen = []
    for step in range(6):
        for batch in range(2):
            first.draw(step, batch)
            seen.append(first.dropped.tolist())
    resumed.draw(4, 1)
    assert resumed.dropped.tolist() == seen[9]
    assert len({tuple(row) for row in seen}) > 6
    other = LayerDrop(layers, 0.3, seed=6)
    other.draw(4, 1)
    assert other.dropped.tolist() != seen[9]


def test_as_many_as_the_probability_says() -> None:
    drop = LayerDrop([Layer(1.0) for _ in range(24)], 0.1, seed=1)
    count = 0
    for step in range(500):
        drop.draw(step, 0)
        count += int(drop.dropped.sum())
    assert count / (24 * 500) == pytest.approx(0.1, abs=0.012)  # four standard deviations


@pytest.mark.parametrize("pair", [False, True])
def test_a_layer_that_is_passed_over_changes_nothing_and_has_a_gradient_of_zero(pair: bool) -> None:
    layers = [Layer(2.0, pair), Layer(1e30, pair)]
    drop = LayerDrop(layers, 0.5, seed=1)
    drop.dropped = np.array([False, True])
    hidden = torch.ones(3, requires_grad=True)
    heard = hidden
    for number, layer in enumerate(layers):
        out = layer(hidden_states=heard) if number else layer(heard)  # transformers does both
        heard = out[0] if pair else out
    assert heard.tolist() == [2, 2, 2]
    torch.autograd.backward(heard.sum())
    assert layers[0].weight.grad is not None and layers[0].weight.grad.item() == 3
    assert layers[1].weight.grad is not None and layers[1].weight.grad.item() == 0
    assert hidden.grad is not None and hidden.grad.tolist() == [2, 2, 2]


def test_infinity_is_passed_over_like_any_number() -> None:
    layer = Layer(float("inf"))
    drop = LayerDrop([layer], 0.5, seed=1)
    drop.dropped[:] = True
    assert layer(torch.ones(1)).item() == 1


def test_evaluation_hears_every_layer() -> None:
    layer = Layer(2.0)
    drop = LayerDrop([layer], 0.5, seed=1)
    drop.dropped[:] = True
    assert layer(torch.ones(1)).item() == 1
    assert layer.eval()(torch.ones(1)).item() == 2
