"""The micro-batches that `fit` tries, against those that the sampler really makes, epoch after epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from launcher.worker.extremes import extremes, of_evaluation
from launcher.worker.sampler import Cursor, Indices, MicroBatch, Sampler, Seconds, evaluation_batches


def made_by(sampler: Sampler, world_size: int, epochs: int) -> list[MicroBatch]:
    every = [s for epoch in range(epochs) for s in sampler.steps_left(Cursor(epoch, []), world_size, 1)]
    return [batch for step in every for batch in step if not batch.filler]


def speech(count: int, seed: int) -> tuple[Seconds, Indices]:
    """Seconds at three speeds, and letters: some speak three times as fast as others."""
    dice = np.random.default_rng(seed)
    seconds = np.clip(dice.gamma(4, 3, count), 1, 24).round(2)
    chars = np.maximum(1, seconds * dice.uniform(6, 18, count)).astype(np.int64)
    return np.stack([seconds / 0.9, seconds, seconds / 1.1]), chars


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("quadratic_seconds", [None, 30.0])
@pytest.mark.parametrize(("count", "budget"), [(9, 60.0), (300, 30.0), (300, 120.0), (3000, 200.0)])
def test_no_micro_batch_is_harder_than_those_tried(
    count: int, budget: float, quadratic_seconds: float | None, world_size: int
) -> None:
    """In twenty epochs none has more utterances, more sound, longer ones, more sound times text or times its square."""
    ways, chars = speech(count, seed=count)
    budget = budget if quadratic_seconds is None else 2 * budget
    sampler = Sampler(
        ways, step_seconds=budget * world_size, seed=3, padded_lengths=40, quadratic_seconds=quadratic_seconds
    )
    tried = extremes(sampler, chars, world_size)
    every = made_by(sampler, world_size, epochs=20)
    assert max(len(e.indices) for e in tried) >= max(len(b.indices) for b in every)
    assert max(e.seconds for e in tried) == sampler.ladder[-1] >= max(b.seconds for b in every)
    assert max(e.padded_s for e in tried) >= max(b.padded_s for b in every) - 1e-9
    text = max(e.padded_s * e.chars for e in tried)
    assert text >= max(b.padded_s * int(chars[b.indices].max()) for b in every) - 1e-6
    square = max(e.padded_s * e.seconds for e in tried)
    assert square >= max(b.padded_s * b.seconds for b in every) - 1e-6


def test_what_is_tried_could_happen() -> None:
    """Each holds as many as the budget and the utterances allow, different ones, none longer than it is padded to at
    every speed."""
    ways, chars = speech(200, seed=5)
    sampler = Sampler(ways, step_seconds=100, seed=1, padded_lengths=20)
    for extreme in extremes(sampler, chars, 1):
        assert extreme.padded_s <= 100 + 1e-6
        assert len(set(extreme.indices.tolist())) == len(extreme.indices) > 0
        assert ways.min(0)[extreme.indices].max() <= extreme.seconds + 1e-6
        assert extreme.chars == chars[extreme.indices].max()
        assert extreme.seconds == sampler.ladder[-1] or "longest" not in extreme.name


def test_the_modal_shape_is_that_of_most_sound() -> None:
    ways, chars = speech(2000, seed=6)
    sampler = Sampler(ways, step_seconds=80, seed=1, padded_lengths=12)
    counted = Counter((len(b.indices), b.seconds) for b in made_by(sampler, 1, epochs=1))
    modal = extremes(sampler, chars, 1)[0]
    assert "modal" in modal.name
    assert counted[len(modal.indices), modal.seconds] * modal.padded_s == max(
        n * k * s for (k, s), n in counted.items()
    )


def test_each_shape_is_tried_once() -> None:
    """All of one length, as Whisper has it: one shape has the most of everything."""
    sampler = Sampler(np.full(50, 30.0), step_seconds=120, seed=1)
    chars = np.arange(1, 51)
    (only,) = extremes(sampler, chars, 1)
    assert only.name == "modal, longest, most utterances, most sound, most attention, most text"
    assert sorted(only.indices) == [46, 47, 48, 49], "those with the longest texts"


def test_an_utterance_that_no_budget_holds() -> None:
    with pytest.raises(ValueError, match="a rank's share of a step is 20"):
        extremes(Sampler(np.array([3.0, 30.0]), step_seconds=20, seed=1), np.array([1, 2]), 1)


def test_the_hardest_batches_of_an_evaluation() -> None:
    """Of 7 s one fits, of 5 s two: most sound is not where the longest is. One batch may be both."""
    chars = np.array([70, 10, 90, 50])
    seconds = np.array([7.0, 5.0, 5.0, 4.0])
    longest, most = of_evaluation(evaluation_batches(seconds, 10), seconds, chars)
    assert (longest.name, longest.indices.tolist(), longest.seconds, longest.chars) == (
        "evaluation, longest",
        [0],
        7,
        70,
    )
    assert (most.name, most.indices.tolist(), most.seconds, most.chars) == ("evaluation", [1, 2], 5, 90)
    (both,) = of_evaluation(evaluation_batches(seconds, 100), seconds, chars)
    assert both.name == "evaluation" and both.padded_s == 28
