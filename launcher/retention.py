"""Which checkpoints a run keeps, and the end of the others. Only what verifies counts as kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from launcher import rundir, sealed
from launcher.errors import DataError, SpeechctlError
from launcher.rundir import Run

AT_LEAST = 2
"""So many of the newest stay whatever the rules say: the newest may turn out to be damaged."""


@dataclass(frozen=True)
class Rules:
    """As the recipe has them in `checkpoint`."""

    last: int = AT_LEAST
    best: int = 1
    every_steps: int | None = None


def why_kept(
    steps: Collection[int],
    wers: Mapping[int, float],
    pinned: Collection[int],
    rules: Rules,
    verifies: Callable[[int], bool],
) -> dict[int, list[str]]:
    """Those of `steps` that stay, and for what reasons.

    One among the newest that does not verify stays too and counts for nothing: it is evidence, and restoring puts it
    aside.

    Args:
        wers: of the steps that were evaluated. Of equal ones the earlier is the better.
        verifies: asked about as few as the rules need; reading a checkpoint takes time.
    """
    kept: dict[int, list[str]] = {step: ["pinned"] for step in steps if step in pinned}
    if rules.every_steps:
        for step in (s for s in steps if s % rules.every_steps == 0):
            kept.setdefault(step, []).append(f"every {rules.every_steps} steps")
    whole, last = 0, max(AT_LEAST, rules.last)
    for step in sorted(steps, reverse=True):
        if whole == last:
            break
        is_whole = verifies(step)
        kept.setdefault(step, []).append(f"newest {last}" if is_whole else "damaged: not counted")
        whole += is_whole
    best = 0
    for step in sorted(set(steps) & wers.keys(), key=lambda step: (wers[step], step)):
        if best == rules.best:
            break
        if verifies(step):
            kept.setdefault(step, []).append("best WER" if rules.best == 1 else f"best {rules.best} WERs")
            best += 1
    return kept


def judged(run: Run, rules: Rules, whole: set[int], best_step: int = -1) -> dict[int, list[str]]:
    """Every sealed step, oldest first, and why it stays; without a reason it goes.

    Args:
        whole: steps known to verify; those that are found to are added.
    """

    def verifies(step: int) -> bool:
        if step not in whole:
            try:
                with sealed.lease(run.checkpoint(step)):
                    sealed.verify(run, step)
            except (SpeechctlError, OSError):
                return False
            whole.add(step)
        return True

    steps = run.sealed_steps()
    kept = why_kept(steps, wers(run, steps), sealed.pinned(run), rules, verifies)
    if best_step in steps and best_step not in kept:
        kept[best_step] = ["best so far"]
    return {step: kept.get(step, []) for step in steps}


def surplus(run: Run, rules: Rules, whole: set[int], best_step: int = -1) -> list[int]:
    """Sealed steps that the rules do not keep, oldest first; arguments as of `judged`."""
    return [step for step, reasons in judged(run, rules, whole, best_step).items() if not reasons]


def wers(run: Run, steps: Sequence[int]) -> dict[int, float]:
    """As far as the steps were evaluated in training."""
    found = {}
    for step in steps:
        try:
            value = rundir.read_json(run.evaluation(step))
            found[step] = float(value.get("criterion", value)["wer"])
        except (DataError, OSError, TypeError, KeyError, ValueError, AttributeError):
            continue
    return found


def retain(run: Run, rules: Rules, whole: set[int], best_step: int = -1) -> list[int]:
    """Remove what `surplus` names; returns the steps that were removed. One that is leased waits for the next time, and
    so does one whose evaluation comes in meanwhile: it may be the best.

    Raises:
        StorageError: one could not be renamed away; nothing else was touched.
    """
    sealed.empty_trash(run)
    known = wers(run, run.sealed_steps())

    def is_judged(step: int) -> bool:
        return wers(run, [step]).get(step) == known.get(step)

    with rundir.storage_errors(run.checkpoints):
        goes = surplus(run, rules, whole, best_step)
        return [step for step in goes if sealed.remove(run, step, partial(is_judged, step))]
