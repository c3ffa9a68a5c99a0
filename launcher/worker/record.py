"""What a rank writes about its training: its ledger, and on rank 0 events, metrics and TensorBoard."""

from __future__ import annotations

import math
import time
from typing import Any

from launcher import redact
from launcher.lines import Lines
from launcher.recipe import Recipe
from launcher.rundir import Attempt

STEP = ("loss", "grad_norm", "learning_rate")
"""Of the metrics of a step, what TensorBoard shows."""

EVALUATION = ("wer", "loss", "substitutions", "insertions", "deletions", "words", "utterances", "truncated")
"""Of an evaluation, what its event says."""


class Record:
    def __init__(self, attempt: Attempt, rank: int) -> None:
        self.attempt = attempt
        self.is_first = rank == 0
        self.events = Lines(attempt.events)
        self.metrics = Lines(attempt.metrics, stays_open_s=0.05)
        self.ledger = Lines(attempt.ledger(rank), stays_open_s=math.inf)
        self._tracker: Any = None

    def track(self, recipe: Recipe, first_step: int) -> None:
        """Log to what the recipe names, from `first_step` on: what was logged of it was rolled back, and is purged."""
        if not self.is_first or "tensorboard" not in recipe.trackers:
            return
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(recipe.name, str(self.attempt.run.tensorboard), purge_step=first_step)
        self._tracker.start()

    def event(self, event: str, **facts: Any) -> None:
        """Rank 0's record of what happened; the launcher follows it."""
        if self.is_first:
            said = {k: redact.current.text(v) if isinstance(v, str) else v for k, v in facts.items()}
            self.events.append({"event": event, "time": time.time(), **said})

    def step(self, metrics: dict[str, Any]) -> None:
        """Of rank 0 alone."""
        self.metrics.append(metrics)
        if self._tracker is not None:
            shown = {f"train/{k}": metrics[k] for k in STEP if metrics[k] is not None}
            self._tracker.log(shown, step=metrics["step"])

    def evaluated(self, result: dict[str, Any]) -> None:
        if not self.is_first:  # whose result is the criterion alone
            return
        self.event("evaluated", step=result["step"], **{k: result[k] for k in (*EVALUATION, "blocked_s")})
        if self._tracker is not None:
            logged = {"evaluate/wer": result["wer"], "evaluate/loss": result["loss"]}
            self._tracker.log(logged, step=result["step"])

    def sync(self) -> None:
        """A checkpoint must not outlive the lines that say what it has seen. In the committer's thread."""
        for lines in (self.ledger, self.events, self.metrics):
            lines.sync()  # the last two of other ranks than 0 have nothing to sync

    def close(self) -> None:
        for lines in (self.ledger, self.metrics):
            lines.close()
        if self._tracker is not None:
            self._tracker.finish()
