"""Which rank the others wait for, from what each takes for a step by itself."""

from __future__ import annotations

import random

from launcher.worker.pace import WINDOW, Pace


def told(pace: Pace, rows: list[list[float]]) -> list[int | None]:
    """The rank that is slow, each time that changes."""
    return [pace.slow.rank if pace.slow else None for row in rows if pace.add(row)]


def test_a_slow_rank_is_named_once_and_taken_back() -> None:
    pace = Pace()
    slow, fast = [0.1, 0.1, 0.31, 0.1], [0.1, 0.1, 0.1, 0.1]
    assert told(pace, [slow] * (WINDOW - 1)) == []
    assert told(pace, [slow] * 50) == [2]
    assert pace.slow is not None and round(pace.slow.factor, 2) == 3.1 and round(pace.slow.others_s, 3) == 0.1
    assert told(pace, [fast] * 50) == [None]
    assert told(pace, [[*slow[::-1]]] * 50) == [1]


def test_two_ranks_are_told_apart() -> None:
    assert told(Pace(), [[0.05, 0.25]] * WINDOW) == [1]


def test_load_that_comes_and_goes_names_nobody() -> None:
    """Every rank is slow at times, by a lot; over many windows none is named."""
    dice = random.Random(3)
    rows = [[0.1 * (3 if dice.random() < 0.3 else 1) for _ in range(4)] for _ in range(500)]
    assert told(Pace(), rows) == []


def test_a_single_hiccup_names_nobody() -> None:
    assert told(Pace(), [[0.1, 0.1]] * 30 + [[0.1, 20.0]] + [[0.1, 0.1]] * 30) == []


def test_one_rank_alone_is_not_slow() -> None:
    assert told(Pace(), [[9.0]] * 50) == []
