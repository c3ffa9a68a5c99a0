"""The order of utterances, as arithmetic: budgets, coverage, equal steps, and resumes at other numbers of ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from launcher.worker.sampler import (
    Cursor,
    Sampler,
    Segment,
    Step,
    accumulation,
    digest,
    evaluation_batches,
    summary,
    utterances_in,
)


def lengths(count: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Seconds like LibriSpeech's: most near 14, a tail of short ones."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(12.8, 3.8, count), 1.4, 24.5)


def read_by(steps: list[Step]) -> list[int]:
    return [int(i) for step in steps for batch in step if not batch.filler for i in batch.indices]


@pytest.mark.parametrize(
    ("step_seconds", "max_rank_seconds", "world_size", "expected"),
    [(1600, 200, 8, 1), (1600, 200, 2, 4), (1600, 200, 1, 8), (1600, 200, 3, 3), (1600, 200, 64, 1), (48, 24, 2, 1)],
)
def test_accumulation_follows_the_world_size(
    step_seconds: float, max_rank_seconds: float, world_size: int, expected: int
) -> None:
    assert accumulation(step_seconds, max_rank_seconds, world_size) == expected
    assert step_seconds / (world_size * expected) <= max_rank_seconds


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_has_each_utterance_once_in_equal_steps(world_size: int) -> None:
    seconds = lengths(1000)
    sampler = Sampler(seconds, step_seconds=1600, seed=1)
    each = accumulation(1600, 200, world_size)
    steps = sampler.steps_left(Cursor(0, []), world_size, each)
    assert sorted(read_by(steps)) == list(range(1000))
    budget = 1600 / (world_size * each)
    for step in steps:
        assert len(step) == world_size * each
        assert all(b.padded_s <= budget + 1e-6 for b in step)
        assert all(seconds[b.indices].max() <= b.seconds + 1e-9 for b in step)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler = Sampler(lengths(300), step_seconds=200, seed=1)
    first = digest(sampler.steps_left(Cursor(0, []), 2, 1))
    assert first == digest(Sampler(lengths(300), step_seconds=200, seed=1).steps_left(Cursor(0, []), 2, 1))
    assert first != digest(sampler.steps_left(Cursor(1, []), 2, 1))
    assert first != digest(Sampler(lengths(300), step_seconds=200, seed=2).steps_left(Cursor(0, []), 2, 1))


def libri(count: int) -> npt.NDArray[np.float64]:
    """Seconds by train-clean-100's published quantiles (icefall's manifest statistics), its longest 24.5 s."""
    shares = [0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1]
    quantiles = [1.41, 2.5, 4.2, 6.4, 11.4, 13.8, 15.3, 16.7, 17.3, 18.1, 24.5]
    return np.interp(np.random.default_rng(0).random(count), shares, quantiles)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_little_is_padded_and_nobody_waits(world_size: int) -> None:
    """At fairseq's 200 s on as many utterances as train-clean-100 has: the largest batch keeps to it, 1.2% is padding
    at most, and the ranks of a step have like work, at every number of ranks that make up its 1,600 s."""
    seconds = libri(28_539)
    steps = Sampler(seconds, step_seconds=1600, seed=1).steps_left(Cursor(0, []), world_size, 8 // world_size)
    seen = summary(steps, world_size, float(seconds.sum()))
    assert sorted(read_by(steps)) == list(range(28_539))
    assert seen.waste <= 0.012
    assert seen.largest_s <= 200 + 1e-6
    assert seen.straggler <= 1.01
    assert seen.padded_lengths <= 80


@pytest.mark.parametrize("count", [1, 7, 80])
def test_no_more_padded_lengths_than_asked_for(count: int) -> None:
    """Also where the number of ranks changes in the middle of the epoch: the ladder is of the whole training set."""
    seconds = lengths(4000)
    sampler = Sampler(seconds, step_seconds=1600, seed=1, padded_lengths=count)
    steps = sampler.steps_left(Cursor(0, []), 8, 1)
    cursor = Cursor(0, [Segment(8, 1, 5)])
    steps += sampler.steps_left(cursor, 3, 3)
    padded = {b.seconds for step in steps for b in step}
    assert len(padded) <= count
    assert all((seconds[b.indices] <= b.seconds + 1e-9).all() for step in steps for b in step)


def test_a_quadratic_term_makes_batches_of_long_utterances_smaller() -> None:
    seconds = lengths(2000)
    steps = Sampler(seconds, step_seconds=1600, seed=1, quadratic_seconds=20).steps_left(Cursor(0, []), 8, 1)
    assert sorted(read_by(steps)) == list(range(2000))
    counted = np.array([len(b.indices) * (b.seconds + b.seconds**2 / 20) for step in steps for b in step])
    padded = np.array([b.padded_s for step in steps for b in step])
    longest = max((b for step in steps for b in step), key=lambda b: b.seconds)
    assert counted.max() <= 200 + 1e-6
    assert padded.max() <= 200 and longest.padded_s < 200 / (1 + longest.seconds / 20) + 1e-6
    with pytest.raises(ValueError, match=r"24\.0 padded seconds, which count as 52\.8, and a rank's share .* 50\.0 s"):
        Sampler(np.array([2.0, 24.0]), step_seconds=50, seed=1, quadratic_seconds=20).steps_left(Cursor(0, []), 1, 1)


def test_each_way_of_an_utterance_is_planned_for() -> None:
    """Three speeds: in each epoch every utterance has the length of its own, and the budget holds for it."""
    seconds = lengths(3000)
    ways = np.stack([seconds / 0.9, seconds, seconds / 1.1])
    sampler = Sampler(ways, step_seconds=400, seed=1)
    drawn = []
    for epoch in range(3):
        way = sampler.ways_in(epoch)
        drawn.append(way)
        assert np.bincount(way, minlength=3).min() > 900
        steps = sampler.steps_left(Cursor(epoch, []), 2, 1)
        assert sorted(read_by(steps)) == list(range(3000))
        own = ways[way, np.arange(3000)]
        for step in steps:
            for batch in step:
                assert own[batch.indices].max() <= batch.seconds + 1e-9
                assert batch.padded_s <= 200 + 1e-6
    assert (drawn[0] != drawn[1]).mean() > 0.6, "another one in another epoch"


def test_what_decides_the_order_is_in_its_identity() -> None:
    """A checkpoint's cursor means nothing under another order, and `resume` refuses that by this hash."""
    seconds, keys = lengths(200), np.arange(200, dtype=np.uint64)

    def identity(ways: npt.NDArray[np.float64] = seconds, **changes: Any) -> str:
        options = {"step_seconds": 400.0, "seed": 1, "keys": keys, "padded_lengths": 80, "quadratic_seconds": None}
        return Sampler(ways, **{**options, **changes}).identity()

    assert identity() == identity(seconds.copy())
    others = [
        identity(step_seconds=401.0),
        identity(seed=2),
        identity(keys=keys[::-1].copy()),
        identity(padded_lengths=79),
        identity(quadratic_seconds=30.0),
        identity(np.stack([seconds, seconds])),
        identity(seconds + 1e-3),
    ]
    assert len({identity(), *others}) == 8


def test_the_last_step_is_shared_out_evenly() -> None:
    """What is left over for it would fill three batches of eight: no rank gets much more than another."""
    seconds = np.concatenate([np.full(8 * 20, 10.0), np.full(150, 4.0)])
    steps = Sampler(seconds, step_seconds=1600, seed=1).steps_left(Cursor(0, []), 8, 1)
    (last,) = (step for step in steps if max(b.seconds for b in step) < 5)
    assert [b.filler for b in last] == [False] * 8
    padded = [b.padded_s for b in last]
    assert max(padded) <= 1.1 * sum(padded) / 8


def test_filler_where_there_are_fewer_utterances_than_ranks() -> None:
    """Three utterances on four ranks: the fourth computes one of them too, with weight 0, and none is counted twice."""
    steps = Sampler(np.array([2.0, 3.0, 1.0]), step_seconds=40, seed=1).steps_left(Cursor(0, []), 4, 1)
    assert len(steps) == 1
    assert [b.filler for b in steps[0]] == [False, False, False, True]
    assert sorted(read_by(steps)) == [0, 1, 2]
    assert utterances_in(steps[0]) == 3


def test_an_utterance_longer_than_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"24\.0 padded seconds.*20\.0 s"):
        Sampler(np.array([2.0, 24.0]), step_seconds=40, seed=1).steps_left(Cursor(0, []), 2, 1)


def test_the_cursor_replays_exactly() -> None:
    """Stopping anywhere and going on with the same ranks gives the rest of the same order."""
    sampler = Sampler(lengths(500), step_seconds=200, seed=3)
    whole = sampler.steps_left(Cursor(4, []), 2, 1)
    cursor = Cursor(4, [])
    for done in range(len(whole) + 1):
        assert digest(sampler.steps_left(cursor, 2, 1)) == digest(whole[done:])
        cursor.advance(2, 1)
        cursor = Cursor.from_json(cursor.to_json())


def test_other_numbers_of_ranks_repeat_and_lose_nothing() -> None:
    """200 random histories of stops and resumes at 1 to 8 ranks: an epoch still holds each utterance exactly once."""
    dice = random.Random(11)
    for _ in range(200):
        count = dice.randrange(1, 400)
        sampler = Sampler(lengths(count, seed=count), step_seconds=250, seed=dice.randrange(100))
        cursor, seen = Cursor(dice.randrange(3), []), []
        while True:
            world_size = dice.choice([1, 2, 3, 4, 8])
            each = accumulation(250, dice.choice([60, 125, 250]), world_size)
            steps = sampler.steps_left(cursor, world_size, each)
            if not steps:
                break
            for step in steps[: dice.randrange(1, len(steps) + 1)]:
                seen += read_by([step])
                cursor.advance(world_size, each)
        assert sorted(seen) == list(range(count))


def test_the_history_merges_equal_segments() -> None:
    cursor = Cursor(0, [])
    for world_size in (2, 2, 4, 2):
        cursor.advance(world_size, 1)
    assert cursor.history == [Segment(2, 1, 2), Segment(4, 1, 1), Segment(2, 1, 1)]
    assert cursor.steps == 4


def test_evaluation_batches_come_from_lengths_alone() -> None:
    """All utterances once, longest first; one longer than the budget gets a batch of its own."""
    seconds = np.array([5.0, 35.0, 4.0, 5.0, 1.0])
    batches = [b.tolist() for b in evaluation_batches(seconds, 10)]
    assert batches == [[1], [0, 3], [2, 4]]
