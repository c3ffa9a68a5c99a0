"""The global order of utterances: which rank reads what, at which step.

Lengths are known from the packs, so the order of an epoch is computed, not discovered: every rank computes the whole
of it and takes its own share. NumPy only; nothing here touches torch, a disk or a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

WINDOW = 8000
"""Utterances sorted by length together: large enough to pad little, small enough to stay shuffled."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank computes at once."""

    indices: Indices
    """Utterances, as positions in the lengths, longest first."""

    filler: bool = False
    """True where there were too few utterances for every rank: computed like any other, and counted with weight 0."""


Step = list[MicroBatch]
"""Micro-batches of one optimizer step: rank `r` of `w` computes numbers r, r + w, r + 2w, …"""


def accumulation(step_seconds: float, max_rank_seconds: float, world_size: int) -> int:
    """Micro-batches that each rank adds up in one optimizer step."""
    return max(1, math.ceil(step_seconds / (max_rank_seconds * world_size) - 1e-9))


@dataclass(frozen=True)
class Segment:
    """A stretch of an epoch trained by one number of ranks."""

    world_size: int
    accumulation: int
    steps: int


@dataclass
class Cursor:
    """Where training stands. Replaying `history` over the lengths gives exactly what this epoch has consumed."""

    epoch: int
    history: list[Segment]

    def to_json(self) -> dict[str, object]:
        return {"epoch": self.epoch, "history": [[s.world_size, s.accumulation, s.steps] for s in self.history]}

    @staticmethod
    def from_json(value: dict[str, object]) -> Cursor:
        history = value["history"]
        assert isinstance(history, list) and isinstance(value["epoch"], int)
        return Cursor(value["epoch"], [Segment(*segment) for segment in history])

    @property
    def steps(self) -> int:
        """Optimizer steps done in this epoch."""
        return sum(s.steps for s in self.history)

    def advance(self, world_size: int, accumulation: int) -> None:
        """Count one step."""
        last = self.history[-1] if self.history else None
        if last and (last.world_size, last.accumulation) == (world_size, accumulation):
            self.history[-1] = Segment(world_size, accumulation, last.steps + 1)
        else:
            self.history.append(Segment(world_size, accumulation, 1))


class Sampler:
    """The order of every epoch, from seed and lengths.

    Args:
        seconds: padded length that each utterance takes in a batch, in the order of the packs; shape (utterances,).
        step_seconds: padded seconds in one optimizer step, over all ranks and all accumulation.

    Raises:
        ValueError: an utterance is longer than one rank's share of a step, or there are none.
    """

    def __init__(self, seconds: npt.NDArray[np.float64], *, step_seconds: float, seed: int) -> None:
        if len(seconds) == 0:
            raise ValueError("no utterances")
        self.seconds = seconds
        self.step_seconds = step_seconds
        self.seed = seed

    def identity(self) -> str:
        """A hash of all that decides the order: a cursor means nothing under another one."""
        hasher = xxhash.xxh3_128(f"{self.seed} {self.step_seconds!r} ".encode())
        hasher.update(np.ascontiguousarray(self.seconds, dtype="<f8").tobytes())
        return hasher.hexdigest()

    def steps_left(self, cursor: Cursor, world_size: int, accumulation: int) -> list[Step]:
        """The steps of `cursor`'s epoch that are still to do, for this many ranks, in order.

        The utterances of the steps already done are found by replaying the cursor's history; the rest is cut anew
        where the number of ranks has changed, so that none is repeated and none is lost.
        """
        left: Indices = np.arange(len(self.seconds), dtype=np.int64)
        steps: list[Step] = []
        shape: tuple[int, int] | None = None
        for part, segment in enumerate(cursor.history):
            shape = (segment.world_size, segment.accumulation)
            steps = self._cut(left, cursor.epoch, part, *shape)
            done = [b.indices for step in steps[: segment.steps] for b in step if not b.filler]
            left = np.setdiff1d(left, np.concatenate(done), assume_unique=True)
            steps = steps[segment.steps :]
        if shape == (world_size, accumulation):
            return steps
        return self._cut(left, cursor.epoch, len(cursor.history), world_size, accumulation) if len(left) else []

    def _cut(self, left: Indices, epoch: int, part: int, world_size: int, accumulation: int) -> list[Step]:
        """Shuffle `left`, sort inside windows, cut by padded seconds, group into steps, shuffle the steps."""
        group = world_size * accumulation
        budget = self.step_seconds / group
        if (longest := float(self.seconds[left].max())) > budget + 1e-6:
            raise ValueError(
                f"an utterance takes {longest:.1f} padded seconds, a rank's share of a step is {budget:.1f} s"
            )
        rng = np.random.default_rng([self.seed, epoch, part])
        shuffled = rng.permutation(left)
        batches: list[Indices] = []
        for start in range(0, len(shuffled), WINDOW):
            window = shuffled[start : start + WINDOW]
            # Stable, so that equal lengths keep their shuffled order on every machine.
            window = window[np.argsort(-self.seconds[window], kind="stable")]
            cut = self._cut_window(window, budget)
            # Every other window runs from short to long, so that neighbours across a border are alike too.
            batches += cut if (start // WINDOW) % 2 == 0 else cut[::-1]
        steps = [[MicroBatch(b) for b in batches[i : i + group]] for i in range(0, len(batches), group)]
        steps[-1] = self._fill(steps[-1], group)
        return [steps[i] for i in rng.permutation(len(steps))]

    def _cut_window(self, window: Indices, budget: float) -> list[Indices]:
        """Greedy: longest first, each batch as many utterances as fit when all are padded to its first."""
        cut, start = [], 0
        while start < len(window):
            fit = max(1, int((budget + 1e-6) / self.seconds[window[start]]))
            cut.append(window[start : start + fit])
            start += fit
        return cut

    def _fill(self, step: Step, group: int) -> Step:
        """The last step of a cut, brought to `group` micro-batches by halving the largest, then by filler."""
        parts = [b.indices for b in step]
        while len(parts) < group and max(len(p) for p in parts) > 1:
            largest = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1, self.padded(parts[i]), -i))
            half = (len(parts[largest]) + 1) // 2
            parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
        filler = [MicroBatch(parts[0], filler=True)] * (group - len(parts))
        return [MicroBatch(p) for p in parts] + filler

    def padded(self, indices: Indices) -> float:
        """Seconds that a batch of these utterances takes once all are padded to the longest."""
        return float(self.seconds[indices].max()) * len(indices)


def utterances_in(step: Step) -> int:
    """How many utterances a step trains on: the denominator of its loss, the same on every rank."""
    return sum(len(b.indices) for b in step if not b.filler)


def digest(steps: list[Step]) -> str:
    """A hash of the order, for ranks to compare before they trust each other."""
    hasher = xxhash.xxh3_128()
    for step in steps:
        for batch in step:
            hasher.update(b"f" if batch.filler else b"b")
            hasher.update(np.ascontiguousarray(batch.indices, dtype="<i8").tobytes())
        hasher.update(b";")
    return hasher.hexdigest()


def evaluation_batches(seconds: npt.NDArray[np.float64], budget: float) -> list[Indices]:
    """All utterances cut by length alone, longest first: the same batches at every world size and in every mode.

    An utterance longer than the budget gets a batch of its own.
    """
    order = np.argsort(-seconds, kind="stable")
    return Sampler(seconds, step_seconds=budget, seed=0)._cut_window(order.astype(np.int64), budget)
