"""Which micro-batches of a budget are the hardest on memory, and which is the usual one. NumPy only, as the sampler.

Memory grows with padded sound in most layers, with its square in attention, with the number of utterances where each
is padded to 30 s, and with sound times text in CTC. No formula holds for every model, so each of these is looked for,
over all that an order may ever hold: in another epoch, others of one length meet, at other speeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.worker.sampler import Cursor, Indices, Sampler, Seconds, room


@dataclass(frozen=True)
class Extreme:
    """A micro-batch to try."""

    name: str
    """What it has most of; several, where it is one and the same."""
    indices: Indices
    """Utterances, those with the longest texts that may meet here."""
    seconds: float
    """What each of them is padded to."""
    chars: int
    """Of the longest text."""

    @property
    def padded_s(self) -> float:
        return self.seconds * len(self.indices)


MODAL = "modal"
"""Name of the shape in which most of an epoch's sound is computed."""


EVALUATION = "evaluation"
"""What the names of batches of an evaluation begin with. `launcher/trials.py` looks for it."""


def extremes(sampler: Sampler, chars: Indices, world_size: int) -> list[Extreme]:
    """The micro-batches of a sampler whose step is one of them for each rank, each shape once; the modal one first.

    Args:
        chars: letters in the text of each utterance, shape (utterances,).

    Raises:
        ValueError: an utterance is longer than a micro-batch may be.
    """
    budget = sampler.step_seconds / world_size
    steps = sampler.steps_left(Cursor(0, []), world_size, 1)
    counted = Counter((b.seconds, len(b.indices)) for step in steps for b in step if not b.filler)
    modal_s, modal_count = max(counted, key=lambda shape: (counted[shape] * shape[0] * shape[1], shape))
    modal = int(np.searchsorted(sampler.ladder, modal_s - 1e-9))

    # At most so many utterances meet at each rung: what the budget holds, and what is no longer than it in some way.
    lowest = sampler.rungs.min(0)
    no_longer = np.bincount(lowest, minlength=len(sampler.ladder)).cumsum()
    most = np.minimum(room(sampler.costs, budget), no_longer)
    text = np.zeros(len(sampler.ladder), dtype=np.int64)
    for rungs in sampler.rungs:
        np.maximum.at(text, rungs, chars)
    text = np.maximum.accumulate(text)  # where a length runs out, the next shorter fill the batch up
    sound = most * sampler.ladder
    wanted = {
        "longest": len(sampler.ladder) - 1,
        "most utterances": _last_best(most),
        "most sound": _last_best(sound),
        "most attention": _last_best(sound * sampler.ladder),
        "most text": _last_best(sound * text),
    }
    shapes: dict[tuple[int, int], list[str]] = {(modal, modal_count): [MODAL]}
    for name, rung in wanted.items():
        shapes.setdefault((rung, int(most[rung])), []).append(name)
    made = []
    for (rung, count), names in shapes.items():
        items = _wordiest(sampler, chars, rung, count)
        made.append(Extreme(", ".join(names), items, float(sampler.ladder[rung]), int(chars[items].max())))
    return made


def of_evaluation(batches: Sequence[Indices], seconds: Seconds, chars: Indices) -> list[Extreme]:
    """The batch with most sound and, if it is another, that of the longest utterance.

    Args:
        batches: as `evaluation_batches` cuts them.
        seconds: padded, of each utterance, shape (utterances,).
        chars: letters in the text of each utterance, shape (utterances,).
    """
    longest = np.array([seconds[batch].max() for batch in batches])
    most = int(np.argmax(longest * [len(batch) for batch in batches]))
    wanted = {int(np.argmax(longest)): f"{EVALUATION}, longest", most: EVALUATION}
    return [Extreme(n, batches[k], float(longest[k]), int(chars[batches[k]].max())) for k, n in wanted.items()]


def _last_best(values: Indices | Seconds) -> int:
    """Where the greatest value is; of several, at the longest utterances."""
    return int(len(values) - 1 - np.argmax(values[::-1]))


def _wordiest(sampler: Sampler, chars: Indices, rung: int, count: int) -> Indices:
    """So many utterances that are no longer than a rung in some way, those with the longest texts: a batch of that rung
    holds one of its own and, where these run out, any below."""
    order = np.argsort(-chars, kind="stable")
    return np.asarray(order[(sampler.rungs.min(0) <= rung)[order]][:count], dtype=np.int64)
