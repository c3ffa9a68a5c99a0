"""The order of utterances, as arithmetic: budgets, coverage, equal steps, and resumes at other numbers of ranks."""

from __future__ import annotations

import random

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
        assert all(sampler.padded(b.indices) <= budget + 1e-6 for b in step)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler = Sampler(lengths(300), step_seconds=200, seed=1)
    first = digest(sampler.steps_left(Cursor(0, []), 2, 1))
    assert first == digest(Sampler(lengths(300), step_seconds=200, seed=1).steps_left(Cursor(0, []), 2, 1))
    assert first != digest(sampler.steps_left(Cursor(1, []), 2, 1))
    assert first != digest(Sampler(lengths(300), step_seconds=200, seed=2).steps_left(Cursor(0, []), 2, 1))


def test_ranks_of_a_step_get_like_lengths() -> None:
    """Neighbours in the sorted order go to one step, so that no rank waits long for another."""
    sampler = Sampler(lengths(4000), step_seconds=1600, seed=1)
    steps = sampler.steps_left(Cursor(0, []), 8, 1)
    padded = np.array([[sampler.padded(b.indices) for b in step] for step in steps])
    assert float((padded.max(1) / padded.mean(1)).mean()) < 1.05


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
