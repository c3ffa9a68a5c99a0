"""What the files of a run say, as a value: its state, its curve, its checkpoints. Reads; writes nothing."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from launcher import rundir
from launcher.errors import DataError, ExitCode, NotFoundError
from launcher.rundir import Run


@dataclass(frozen=True)
class Report:
    """A run at a glance."""

    name: str
    run_dir: str
    state: str
    """running; finished; stopped (sealed, on request); failed; interrupted (the launcher was killed); created (before
    the first attempt)."""
    step: int
    """Newest step that a rank reported, of the attempt that went last."""
    max_steps: int
    sealed: list[int]
    """Steps with a sealed checkpoint."""
    best: dict[str, Any] | None
    """Step and WER of the best checkpoint, while it is there."""
    evaluations: list[dict[str, Any]]
    """By step."""
    metrics: list[dict[str, Any]]
    """One a step, without those that were rolled back."""
    attempts: int
    failure: dict[str, Any] | None
    """Why the last attempt ended, where it failed."""
    holder: dict[str, Any] | None
    job: dict[str, Any] | None = None
    """SLURM's last job of the run: id, state, reason. Not from its files: `jobs.py` asks SLURM."""

    @property
    def audio_s(self) -> float:
        return float(sum(m["audio_s"] for m in self.metrics))

    @property
    def training_s(self) -> float:
        return float(sum(m["step_s"] for m in self.metrics))

    def to_json(self) -> dict[str, Any]:
        value = {k: v for k, v in vars(self).items() if k != "metrics"}
        return {**value, "last": self.metrics[-1] if self.metrics else None}


def read(run: Run) -> Report:
    """
    Raises:
        NotFoundError: there is no run in that directory.
        DataError: one of its files is not what speechctl writes.
    """
    if not run.exists():
        raise NotFoundError(
            f"{run.root} is not a run: it has no {run.resolved.name}",
            hint="give the directory of a run, such as runs/NAME; `speechctl launch RECIPE` makes one",
        )
    try:
        return _read(run)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"a file of {run.root} is not what speechctl writes ({type(error).__name__}: {error})",
            hint="plan.json, best.json, exit.json and the like are not for editing; restore what was there",
        ) from error


def _read(run: Run) -> Report:
    plan = rundir.read_json(run.plan)
    attempts = run.attempts()
    paths = [p for p in sorted(run.evaluations.glob("step-*.json")) if p.name.count(".") == 1]
    evaluations: list[dict[str, Any]] = [rundir.read_json(p) for p in paths]
    metrics: dict[int, dict[str, Any]] = {}
    for attempt in attempts:
        started = [e for e in rundir.read_lines(attempt.events) if e["event"] == "started"]
        if started:  # what older attempts did behind the step that it resumed from was rolled back
            step = started[0]["step"]
            metrics = {s: m for s, m in metrics.items() if s <= step}
            evaluations = [e for e in evaluations if e["step"] <= step or e["attempt"] >= attempt.number]
        metrics.update({m["step"]: m for m in rundir.read_lines(attempt.metrics)})
    sealed, best = run.sealed_steps(), rundir.read_json(run.best)
    holder = rundir.holder(run)
    if holder is not None and (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
        holder = None  # the launcher itself, telling how its own run ended
    last = attempts[-1] if attempts else None
    ended = rundir.read_json(last.exit) if last else None
    failure = rundir.read_json(last.failure) if last else None
    if holder is not None:
        state = "running"
    elif failure is not None:
        state = "failed"
    elif ended is not None:
        state = "finished" if ended["code"] == ExitCode.FINISHED else "stopped"
    else:
        state = "interrupted" if last else "created"
    return Report(
        name=plan["name"],
        run_dir=str(run.root),
        state=state,
        step=max(metrics, default=0),
        max_steps=plan["max_steps"],
        sealed=sealed,
        best=best if best is not None and best["step"] in sealed else None,
        evaluations=evaluations,
        metrics=[metrics[step] for step in sorted(metrics)],
        attempts=len(attempts),
        failure=failure,
        holder=holder,
    )


def samples(run: Run, step: int, count: int) -> list[dict[str, Any]]:
    """A few references with what the model heard, spread over the evaluation."""
    rows = rundir.read_lines(run.hypotheses(step))
    return rows[:: max(1, len(rows) // count)][:count]
