"""The global order of utterances: which rank reads what, at which step.

Lengths are known from the packs, so the order of an epoch is computed, not discovered: every rank computes the whole
of it and takes its own share. NumPy only; nothing here touches torch, a disk or a clock.

Utterances are padded to the steps of a ladder of at most `padded_lengths` lengths, laid where utterances are many. An
epoch is shuffled, sorted by step of the ladder, longest first, and cut: each batch holds as many as the budget allows
at the length of its first, and consecutive batches make one optimizer step, so that its ranks have like work. Then the
optimizer steps are shuffled. Which utterances of one length meet in a batch is another matter in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from launcher.worker.augment import choose

PADDED_LENGTHS = 80
"""Measured on train-clean-100's lengths: 64 cost 1.1% of padding, 80 cost 0.9%, 128 cost 0.6%."""

QUANTUM_S = 0.02
"""Steps of the ladder are multiples of a frame of wav2vec 2.0 and Whisper."""

ALGORITHM = "ladder 1"
"""Part of the identity of an order: another way to cut is another order."""

Indices = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank computes at once."""

    indices: Indices
    """Utterances, as positions in the lengths, longest first."""

    seconds: float = 0.0
    """What each of them is padded to."""

    filler: bool = False
    """True where there were too few utterances for every rank: computed like any other, and counted with weight 0."""

    @property
    def padded_s(self) -> float:
        """Seconds that the batch takes, padding and all."""
        return self.seconds * len(self.indices)


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
        seconds: length of each utterance in the order of the packs, shape (utterances,); or, where an utterance is
            heard in several ways, of each way, shape (ways, utterances). Which way an epoch takes follows from `keys`.
        step_seconds: padded seconds in one optimizer step, over all ranks and all accumulation. No micro-batch holds
            more than its share of it.
        keys: what identifies each utterance, shape (utterances,); needed where there are several ways.
        padded_lengths: how many different lengths batches are padded to, at most.
        quadratic_seconds: an utterance of T padded seconds counts as T + T²/this in the budget, for attention; None:
            as T.

    Raises:
        ValueError: there are no utterances.
    """

    def __init__(
        self,
        seconds: Seconds,
        *,
        step_seconds: float,
        seed: int,
        keys: npt.NDArray[np.uint64] | None = None,
        padded_lengths: int = PADDED_LENGTHS,
        quadratic_seconds: float | None = None,
    ) -> None:
        self.ways = np.atleast_2d(np.asarray(seconds, dtype=np.float64))
        if self.ways.size == 0:
            raise ValueError("no utterances")
        self.step_seconds = step_seconds
        self.seed = seed
        self.keys = np.arange(self.ways.shape[1], dtype=np.uint64) if keys is None else keys
        self.quadratic_seconds = quadratic_seconds
        self.padded_lengths = padded_lengths
        self.ladder = ladder(self.ways.ravel(), padded_lengths)
        self.costs = self.ladder
        """What one utterance of each length on the ladder takes of a micro-batch's budget."""
        if quadratic_seconds is not None:
            self.costs = self.ladder + self.ladder**2 / quadratic_seconds
        self.rungs = np.searchsorted(self.ladder, self.ways - 1e-9).astype(np.uint16)
        """Where on the ladder each utterance is in each way, shape (ways, utterances)."""

    def __len__(self) -> int:
        return len(self.keys)

    def identity(self) -> str:
        """A hash of all that decides the order: a cursor means nothing under another one."""
        options = (ALGORITHM, self.seed, self.step_seconds, self.padded_lengths, self.quadratic_seconds)
        hasher = xxhash.xxh3_128(repr(options).encode())
        hasher.update(np.ascontiguousarray(self.ways, dtype="<f8").tobytes())
        hasher.update(np.ascontiguousarray(self.keys, dtype="<u8").tobytes())
        return hasher.hexdigest()

    def ways_in(self, epoch: int) -> Indices:
        """In which way each utterance is heard in an epoch: rows of `seconds`, shape (utterances,)."""
        return choose(self.seed, epoch, self.keys, len(self.ways))

    def steps_left(self, cursor: Cursor, world_size: int, accumulation: int) -> list[Step]:
        """The steps of `cursor`'s epoch that are still to do, for this many ranks, in order.

        The utterances of the steps already done are found by replaying the cursor's history; the rest is cut anew
        where the number of ranks has changed, so that none is repeated and none is lost.

        Raises:
            ValueError: an utterance is longer than a micro-batch may be.
        """
        rungs = self.rungs[self.ways_in(cursor.epoch), np.arange(len(self))]
        left: Indices = np.arange(len(self), dtype=np.int64)
        steps: list[Step] = []
        shape: tuple[int, int] | None = None
        for part, segment in enumerate(cursor.history):
            shape = (segment.world_size, segment.accumulation)
            steps = self._cut(rungs, left, cursor.epoch, part, *shape)
            done = [b.indices for step in steps[: segment.steps] for b in step if not b.filler]
            left = np.setdiff1d(left, np.concatenate(done), assume_unique=True)
            steps = steps[segment.steps :]
        if shape == (world_size, accumulation):
            return steps
        if not len(left):
            return []
        return self._cut(rungs, left, cursor.epoch, len(cursor.history), world_size, accumulation)

    def _cut(
        self, rungs: npt.NDArray[np.uint16], left: Indices, epoch: int, part: int, world_size: int, accumulation: int
    ) -> list[Step]:
        """Shuffle `left`, sort by rung, cut by the budget, group into steps, shuffle the steps."""
        group = world_size * accumulation
        budget = self.step_seconds / group
        costs = self.costs
        # Over all ways of all utterances: what fits in this epoch fits in every other.
        if costs[-1] > budget + 1e-6:
            counted = "" if self.quadratic_seconds is None else f", which count as {costs[-1]:.1f},"
            raise ValueError(
                f"an utterance takes {self.ladder[-1]:.1f} padded seconds{counted} and"
                f" a rank's share of a step is {budget:.1f} s"
            )
        rng = np.random.default_rng([self.seed, epoch, part])
        shuffled = rng.permutation(left)
        # Stable, so that equal lengths keep their shuffled order on every machine.
        order = shuffled[np.argsort(costs.size - 1 - rungs[shuffled].astype(np.int16), kind="stable")]
        batches = self._cut_sorted(order, rungs[order], costs, budget)
        steps = [batches[i : i + group] for i in range(0, len(batches), group)]
        if len(steps[-1]) < group:
            rest = np.concatenate([b.indices for b in steps[-1]])
            steps[-1] = self._fill(self._even(rest, rungs[rest], costs, budget, group), group, rungs)
        return [steps[i] for i in rng.permutation(len(steps))]

    def _cut_sorted(
        self, order: Indices, rungs: npt.NDArray[np.uint16], costs: Seconds, budget: float
    ) -> list[MicroBatch]:
        """Greedy: each batch takes as many utterances as fit when all are padded to its first."""
        fit: list[int] = room(costs, budget).tolist()
        lengths: list[float] = self.ladder.tolist()
        of: list[int] = rungs.tolist()
        cut, start = [], 0
        while start < len(of):
            rung = of[start]
            cut.append(MicroBatch(order[start : start + fit[rung]], lengths[rung]))
            start += fit[rung]
        return cut

    def _even(
        self, order: Indices, rungs: npt.NDArray[np.uint16], costs: Seconds, budget: float, group: int
    ) -> list[MicroBatch]:
        """The last step of a cut, which has too few: by the smallest budget that makes no more than `group` batches."""
        low, high = float(costs[rungs[0]]), budget
        best = self._cut_sorted(order, rungs, costs, budget)
        for _ in range(20):
            middle = (low + high) / 2
            cut = self._cut_sorted(order, rungs, costs, middle)
            if len(cut) <= group:
                best, high = cut, middle
            else:
                low = middle
        return best

    def _fill(self, step: Step, group: int, rungs: npt.NDArray[np.uint16]) -> Step:
        """A step that is still short of batches, brought to `group` by halving the largest, then by filler."""
        parts = list(step)
        while len(parts) < group and max(len(p.indices) for p in parts) > 1:
            largest = max(range(len(parts)), key=lambda i: (len(parts[i].indices) > 1, parts[i].padded_s, -i))
            indices = parts[largest].indices
            half = (len(indices) + 1) // 2
            halves = [indices[:half], indices[half:]]
            parts[largest : largest + 1] = [MicroBatch(h, float(self.ladder[rungs[h[0]]])) for h in halves]
        filler = [MicroBatch(parts[0].indices, parts[0].seconds, filler=True)] * (group - len(parts))
        return [*parts, *filler]


def room(costs: Seconds, budget: float) -> Indices:
    """How many utterances of each cost a micro-batch holds."""
    return np.asarray(np.maximum(1, (budget + 1e-6) / costs), dtype=np.int64)


def ladder(seconds: Seconds, count: int) -> Seconds:
    """At most `count` lengths to pad to, ascending; the last is the longest utterance.

    Where an interval of the ladder is d wide and utterances lie f dense, padding costs f d²/2: the least is lost with
    rungs as dense as the root of f: Panter and Dite's argument for quantizers (1951), for a loss linear in d.
    """
    distinct: Seconds = np.unique(seconds)
    if len(distinct) <= count:
        return distinct
    dense, edges = np.histogram(seconds, bins=2048)
    below = np.concatenate([[0.0], np.cumsum(np.sqrt(dense))])
    rungs = np.interp(np.linspace(0, below[-1], count + 1)[1:-1], below, edges)
    rungs = np.ceil(np.round(rungs / QUANTUM_S, 6)) * QUANTUM_S
    return np.asarray(np.unique(np.append(rungs[rungs < distinct[-1]], distinct[-1])))


@dataclass(frozen=True)
class Summary:
    """What an order costs."""

    steps: int
    waste: float
    """Share of the padded audio that is padding."""
    straggler: float
    """Mean over steps of the longest rank over the mean one: 1 is no waiting."""
    largest_s: float
    """The largest micro-batch, in padded seconds."""
    padded_lengths: int
    """How many different lengths batches are padded to."""
    by_rank: Seconds = field(repr=False)
    """Padded seconds, shape (steps, ranks)."""


def summary(steps: Sequence[Step], world_size: int, audio_s: float) -> Summary:
    """
    Args:
        audio_s: of all utterances in `steps`, without padding. Fillers count as padding.
    """
    padded = np.array([[b.padded_s for b in step] for step in steps])
    by_rank = padded.reshape(len(steps), -1, world_size).sum(1)
    return Summary(
        steps=len(steps),
        waste=1 - audio_s / float(padded.sum()),
        straggler=float((by_rank.max(1) / by_rank.mean(1)).mean()),
        largest_s=float(padded.max()),
        padded_lengths=len({b.seconds for step in steps for b in step}),
        by_rank=by_rank,
    )


def utterances_in(step: Step) -> int:
    """How many utterances a step trains on: the denominator of its loss, the same on every rank."""
    return sum(len(b.indices) for b in step if not b.filler)


def digest(steps: list[Step]) -> str:
    """A hash of the order, for ranks to compare before they trust each other."""
    hasher = xxhash.xxh3_128()
    for step in steps:
        for batch in step:
            hasher.update(b"f" if batch.filler else b"b")
            hasher.update(np.array([batch.seconds], dtype="<f8").tobytes())
            hasher.update(np.ascontiguousarray(batch.indices, dtype="<i8").tobytes())
        hasher.update(b";")
    return hasher.hexdigest()


def evaluation_batches(seconds: Seconds, budget: float) -> list[Indices]:
    """All utterances cut by length alone, longest first: the same batches at every world size and in every mode.

    An utterance longer than the budget gets a batch of its own.
    """
    order = np.argsort(-seconds, kind="stable").astype(np.int64)
    cut, start = [], 0
    while start < len(order):
        fit = max(1, int((budget + 1e-6) / seconds[order[start]]))
        cut.append(order[start : start + fit])
        start += fit
    return cut
