"""`speechctl fit`: the largest `batch.max_rank_seconds` that fits, found by trials instead of guessed.

A search over budgets known to fit and known not to, as NeMo's OOMptimizer has it (scripts/speech_recognition/
oomptimizer.py, read: precision 5%, a tenth of the memory left free); each trial in a process of its own, on the shapes
that the sampler makes, and aimed by the peaks of those before, so that about five of them do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import environment, start, ui
from launcher.errors import MemoryExhausted, UsageError, in_bytes
from launcher.hosts import Host
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.trials import Trial, Trials

PRECISION = 0.05
"""The search ends when a budget fits and one larger by this share of itself does not."""

GRAIN_S = 0.1
"""Budgets are multiples of it, but for the smallest and the largest."""


@dataclass(frozen=True)
class Fit:
    """What was found, for so many ranks of one device."""

    ranks: int
    launched: int
    """Ranks of the recipe's own launch, wherever those are."""
    best: Trial
    trials: list[Trial]
    """In the order in which they were made."""
    is_largest: bool
    """A rank's whole share of a step fits: so many ranks never use a larger budget."""

    @property
    def fastest(self) -> Trial:
        return max((t for t in self.trials if t.fits), key=lambda t: t.padded_s_per_s or 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "max_rank_seconds": self.best.max_rank_seconds,
            "ranks": self.ranks,
            "device": self.best.device,
            "limit_bytes": self.best.limit_bytes,
            "peak_bytes": self.best.peak_bytes,
            "is_largest": self.is_largest,
            "fastest_max_rank_seconds": self.fastest.max_rank_seconds,
            "trials": [trial.to_json() for trial in self.trials],
        }


def fit(
    recipe: Recipe, path: Path, ranks: int, memory_bytes: int | None, headroom: float, say: Callable[[str], None]
) -> Fit:
    """
    Args:
        path: the same recipe, as a file that the worker can read.

    Raises:
        UsageError: there are fewer GPUs than ranks, or the longest utterance is longer than a rank's share of a step.
        MemoryExhausted: not even the longest utterance alone fits, or the run's evaluation does not.
    """
    gpus = environment.gpu_count(recipe.launch.device)
    if gpus and ranks > gpus:
        raise UsageError(f"{ranks} ranks are asked for, and this machine shows {gpus} GPU(s)", hint="lower --ranks")
    launched = sum(host.slots for host in environment.named(recipe))
    plan, longest_s = _unlimited(recipe, path, ranks)
    low, high = math.ceil(longest_s * 100 - 1e-6) / 100, recipe.batch.step_seconds / ranks
    if longest_s > high + 1e-6:
        raise UsageError(
            f"the batch does not fit: an utterance takes {longest_s:.1f} padded seconds, and a rank's share of"
            f" batch.step_seconds is {high:g} s",
            hint="raise batch.step_seconds, lower data.max_utterance, or take fewer --ranks",
        )
    trials = Trials(recipe, path, plan.deepspeed, ranks, memory_bytes, headroom)
    say(f"trying budgets from {min(low, high):g} s, the longest utterance, to {high:g} s, a rank's share of a step")

    def attempt(budget_s: float) -> Trial:
        trial = trials.run(budget_s)
        say(f"max_rank_seconds {budget_s:g}: " + in_words(trial))
        return trial

    made = search(attempt, min(low, high), recipe.batch.max_rank_seconds, high)
    fitting = [trial for trial in made if trial.fits]
    if not fitting and made[-1].is_for_evaluation:
        raise evaluation_does_not_fit(recipe, made[-1], ranks)
    if not fitting:
        raise nothing_fits(recipe, made[-1], ranks, plan.state_bytes_per_rank)
    best = max(fitting, key=lambda trial: trial.max_rank_seconds)
    return Fit(ranks, launched, best, made, is_largest=best.max_rank_seconds >= high)


def _unlimited(recipe: Recipe, path: Path, ranks: int) -> tuple[Plan, float]:
    """The plan of so many ranks on this machine whose batch holds everything, and what the longest utterance takes of a
    budget: refuses what `plan` refuses, but for the batch."""
    from launcher import recipe_file

    batch = recipe.batch.model_copy(update={"step_seconds": 1e9, "max_rank_seconds": 1e9})
    wide = recipe.model_copy(update={"batch": batch})
    file = path.with_name("wide.yaml")
    file.write_text(recipe_file.dump(wide))
    plan, facts = start.planned(wide, file, [Host("localhost", ranks)])
    return plan, float(facts["longest_s"])


# The search ----------------------------------------------------------------------------------------------------------


def search(attempt: Callable[[float], Trial], low: float, first: float, high: float) -> list[Trial]:
    """Trials, until the largest budget between `low` and `high` that fits is known to `PRECISION`, or `high` fits, or
    `low` does not, or an evaluation does not that has not fitted before: it takes the same under every budget.

    Args:
        first: where to begin.
    """
    made: list[Trial] = []
    good = bad = None
    budget, turn = min(max(first, low), high), 0
    while True:
        made.append(trial := attempt(budget))
        if trial.fits:
            good = trial
        else:
            bad = trial
        if (good and good.max_rank_seconds >= high) or (bad and bad.max_rank_seconds <= low):
            return made
        if good is None and trial.is_for_evaluation:
            return made
        fitting = sorted((t for t in made if t.fits), key=lambda t: t.max_rank_seconds)
        predicted = _predicted(fitting)
        if good is None:
            assert bad is not None
            budget = max(low, _neat(bad.max_rank_seconds / 2))
        elif bad is None:
            reach = predicted if predicted is not None else 2 * good.max_rank_seconds
            at_least, at_most = (1 + PRECISION) * good.max_rank_seconds, 8 * good.max_rank_seconds
            budget = min(high, _neat(min(max(reach, at_least), at_most)))
        else:
            a, b = good.max_rank_seconds, bad.max_rank_seconds
            if b - a <= max(PRECISION * b, GRAIN_S * 1.01):
                return made
            # In turn: where the peaks point to; whether that was close; the middle, which is always right.
            inner_a, inner_b = (1 + PRECISION) * a, (1 - PRECISION) * b
            middle = math.sqrt(a * b)
            aims = [predicted or middle, inner_a if trial.fits else inner_b, middle]
            budget = _neat(min(max(aims[turn % 3], inner_a), max(inner_a, inner_b)))
            if not a < budget < b:
                budget = (a + b) / 2
            turn += 1


def _predicted(fitting: list[Trial]) -> float | None:
    """Where the straight line through the peaks of the two largest that fit comes to the limit, less a little."""
    if len(fitting) < 2:
        return None
    (x1, y1), (x2, y2) = ((t.max_rank_seconds, t.needed_bytes) for t in fitting[-2:])
    if y2 <= y1:
        return None
    return 0.98 * (x2 + (fitting[-1].limit_bytes - y2) * (x2 - x1) / (y2 - y1))


def _neat(budget: float) -> float:
    return math.floor(budget / GRAIN_S + 1e-6) * GRAIN_S if budget < 1e3 else math.floor(budget)


# In words ------------------------------------------------------------------------------------------------------------


def in_words(trial: Trial) -> str:
    """What came of a trial, in a line."""
    if not trial.fits:
        where = "" if trial.hardest is None else f" on {of_shape(trial.hardest)}"
        return f"does not fit{where}: {trial.why}"
    return f"fits, {in_bytes(trial.peak_bytes)} of {in_bytes(trial.limit_bytes)}, {trial.padded_s_per_s:.0f}x real time"


def of_shape(shape: dict[str, Any]) -> str:
    return f"{shape['utterances']} x {shape['seconds']:.2f} s ({shape['shape']})"


def table(trials: list[Trial]) -> None:
    """A line for each budget, the smallest first: what took most under it, and whether it fits."""
    rows = [("max_rank_seconds", "fits", "peak", "speed", "hardest micro-batch")]
    for trial in sorted(trials, key=lambda t: t.max_rank_seconds):
        peak = ("" if trial.fits else "> ") + in_bytes(trial.peak_bytes)
        speed = "-" if trial.padded_s_per_s is None else f"{trial.padded_s_per_s:.0f}x"
        hardest = "-" if trial.hardest is None else of_shape(trial.hardest)
        rows.append((f"{trial.max_rank_seconds:g}", "yes" if trial.fits else "no", peak, speed, hardest))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    for *cells, last in rows:
        ui.answer("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + f"  {last}")


def show(found: Fit, recipe: Recipe, headroom: float) -> None:
    """The trials, what they come to, and the line for the recipe."""
    best, batch = found.best, recipe.batch
    table(found.trials)
    ui.answer("")
    one = ui.counted(found.ranks, "rank")
    refused = min((t.max_rank_seconds for t in found.trials if not t.fits), default=None)
    limit = "it is a rank's whole share of a step, and more is never used"
    if refused is not None:
        limit = f"{refused:g} does not fit"
    assert best.padded_s_per_s is not None
    rows = [
        ("fits", f"{best.max_rank_seconds:g} padded s a rank; {limit}"),
        (
            "memory",
            f"{in_bytes(best.peak_bytes)} at most, of {in_bytes(best.limit_bytes)} on {best.device}"
            f" ({headroom:.0%} stays free)",
        ),
        ("holds for", f"{one}, ZeRO {recipe.zero_stage}, {recipe.precision}; {other_ranks(recipe.zero_stage)}"),
    ]
    for number in dict.fromkeys((found.ranks, found.launched)):
        each = max(1, math.ceil(batch.step_seconds / (best.max_rank_seconds * number) - 1e-9))
        micro = batch.step_seconds / (number * each)
        about = f"; about {batch.step_seconds / (number * best.padded_s_per_s):.3g} s" if number == found.ranks else ""
        rows.append(
            (
                "step",
                f"{batch.step_seconds:g} padded s = {ui.counted(number, 'rank')} x {ui.counted(each, 'micro-batch')}"
                f" x {micro:g} s{about}",
            )
        )
    fastest = found.fastest
    if fastest is not best and (fastest.padded_s_per_s or 0) > (1 + PRECISION) * best.padded_s_per_s:
        rows.append(
            ("faster", f"{fastest.max_rank_seconds:g} s: {fastest.padded_s_per_s:.0f}x real time, in its trial")
        )
    ui.grid(rows)
    ui.answer("\nin the recipe, under `batch`:")
    ui.answer(f"  max_rank_seconds: {best.max_rank_seconds:g}s")


def other_ranks(stage: object) -> str:
    """What the answer for some ranks means for more of them."""
    if stage in ("off", 0):
        return "several ranks also keep buffers to exchange gradients: for those, --ranks 2"
    return "more ranks take less each"


def nothing_fits(recipe: Recipe, trial: Trial, ranks: int, state_bytes: int) -> MemoryExhausted:
    """Not even the smallest budget: what was tried, and what to change."""
    tried = "loading the model" if trial.hardest is None else of_shape(trial.hardest)
    ways = []
    if not recipe.activation_checkpointing:
        ways.append("activation_checkpointing: true")
    if recipe.precision == "fp32":
        ways.append("precision: bf16")
    if recipe.zero_stage in ("off", 0, 1, 2):
        ways.append(f"a higher zero_stage than {recipe.zero_stage} with more --ranks")
    if not recipe.offload.optimizer and trial.device != "cpu":
        ways.append("offload.optimizer: true (ZeRO 1 to 3)")
    if recipe.lora is None:
        ways.append("lora")
    return MemoryExhausted(
        f"not even the longest utterance alone fits, max_rank_seconds {trial.max_rank_seconds:g}:"
        f" on {tried}, {ui.counted(ranks, 'rank')} on {trial.device}: {trial.why}; {in_bytes(trial.limit_bytes)} may be"
        f" used, and model states alone take {in_bytes(state_bytes)}",
        hint=f"{'; or '.join([*ways, 'a smaller data.max_utterance'])}; or more --memory",
    )


def evaluation_does_not_fit(recipe: Recipe, trial: Trial, ranks: int) -> MemoryExhausted:
    """No budget of training helps: which batch it was, and what to change."""
    shape = trial.ran_out_on
    assert shape is not None
    ways = ["evaluate.mode: sidecar"]
    if shape["utterances"] > 1:
        ways.insert(0, f"lower evaluate.batch_seconds, {recipe.evaluate.batch_seconds:g} now")
    return MemoryExhausted(
        f"the run's evaluation does not fit, whatever batch.max_rank_seconds is: on an evaluation batch of"
        f" {shape['utterances']} x {shape['seconds']:.2f} s, {ui.counted(ranks, 'rank')} on {trial.device}:"
        f" {trial.why}; {in_bytes(trial.limit_bytes)} may be used",
        hint=f"{'; or '.join(ways)}; or more --memory",
    )
