"""When a run evaluates, and when its evaluations say that it may end. Pure: no clock, no ranks, no disk.

How often checkpoints are worth their time is another question: `launcher/cadence.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher import recipe as schema


@dataclass(frozen=True)
class Moment:
    """What the cadence is decided on, after a step."""

    step: int
    epochs: float
    """Epochs done, with a fraction."""
    epochs_before: float
    """The same, one step earlier."""
    minutes_since_last: float
    """By rank 0's clock, since the last evaluation ended or training began."""


def is_due(cadence: schema.Evaluate, now: Moment, max_steps: int) -> bool:
    """Whether rank 0 wants an evaluation now. Pure; tested as a table."""
    if now.step == max_steps:
        return cadence.at_end
    if now.step < cadence.after_steps:
        return False
    if cadence.every_steps and now.step % cadence.every_steps == 0:
        return True
    if cadence.every_epochs and math.floor(now.epochs / cadence.every_epochs + 1e-9) > math.floor(
        now.epochs_before / cadence.every_epochs + 1e-9
    ):
        return True
    return cadence.every_minutes is not None and now.minutes_since_last >= cadence.every_minutes


@dataclass(frozen=True)
class Patience:
    """What early stopping remembers from one evaluation to the next."""

    lowest: float = math.inf
    """The WER that a lower one is measured from."""
    in_vain: int = 0
    """How many evaluations in a row have not brought a lower one."""

    def after(self, rules: schema.EarlyStopping, wer: float) -> Patience:
        """With one more evaluation. A WER that is no number is not lower."""
        if wer < self.lowest - rules.min_delta:
            return Patience(wer, 0)
        return Patience(self.lowest, self.in_vain + 1)

    def is_over(self, rules: schema.EarlyStopping | None) -> bool:
        return rules is not None and self.in_vain >= rules.patience


def why_early(patience: Patience, options: schema.Evaluate) -> str:
    """Why a run ended before its last step, in a sentence."""
    where = "" if options.best_on is None else f" on {options.best_on}"
    least = options.early_stopping.min_delta if options.early_stopping else 0.0
    by = f" by more than {least:g}" if least else ""
    times = "1 evaluation" if patience.in_vain == 1 else f"{patience.in_vain} evaluations"
    return f"early stopping: in {times} the WER{where} has not fallen{by} below {patience.lowest:.2%}"
