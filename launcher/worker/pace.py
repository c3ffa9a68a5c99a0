"""Whether one rank is persistently slower than the others, who wait for it in every step.

Each rank says how long it took for a step by itself (`waits.py`); batches of one step are alike, so that all should
take about as long.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 20
"""Steps that are looked at together."""

FACTOR = 1.25
"""Over what the others take, in the middle: from here on a rank is slow."""

MOST = 0.8
"""Of the steps of a window, in which it must have been the slower one: load comes and goes, and hits now one rank, now
another."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    factor: float
    """Its own time over the median of the others'."""
    own_s: float
    """In one step, on average."""
    others_s: float


class Pace:
    """Of all ranks of a run, as rank 0 sees it."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._rows: deque[Sequence[float]] = deque(maxlen=window)
        self.slow: Straggler | None = None

    def add(self, own_s: Sequence[float]) -> bool:
        """Take in one step.

        Args:
            own_s: by rank.

        Returns:
            whether `slow` has changed: a rank is named, another one is, or none is any more.
        """
        self._rows.append(own_s)
        if len(own_s) < 2 or len(self._rows) < self.window:
            return False
        found = self._look()
        before = self.slow
        if (found and found.rank) == (before and before.rank):
            return False
        self.slow = found
        return True

    def _look(self) -> Straggler | None:
        sums = [sum(column) for column in zip(*self._rows, strict=True)]
        rank = max(range(len(sums)), key=sums.__getitem__)
        others = statistics.median(s for r, s in enumerate(sums) if r != rank)
        worst = sum(
            row[rank] > 1.1 * statistics.median(o for r, o in enumerate(row) if r != rank) for row in self._rows
        )
        # One that is named stays so until it is nearly as fast as the others, or it would come and go.
        is_known = self.slow is not None and self.slow.rank == rank
        factor, most = ((1 + FACTOR) / 2, 0.0) if is_known else (FACTOR, MOST)
        if sums[rank] < factor * others or worst < most * len(self._rows):
            return None
        count = len(self._rows)
        return Straggler(rank, sums[rank] / max(others, 1e-9), sums[rank] / count, others / count)
