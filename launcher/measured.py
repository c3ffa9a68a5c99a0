"""How long saves and steps took in this run, or in those beside it: medians, for the plan."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import cadence, rundir
from launcher.cadence import Cadence, Saves, Steps
from launcher.errors import DataError
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.rundir import Run

RUNS, SAVES, STEPS = 20, 20, 200
"""So many at most are looked at, the newest."""

TAIL_BYTES = 1 << 18
"""Of a file of events or metrics; a long run has many megabytes of them."""


def planned(recipe: Recipe, plan: Plan, mtbf_s: float | None = None) -> Cadence:
    """How often this recipe saves, and how often it would for the least loss.

    Args:
        mtbf_s: how often something fails; None: an assumption.
    """
    assumed_s, assumption = cadence.assumed_mtbf(len(plan.hosts))
    asynchronous = recipe.checkpoint.asynchronous
    this = Run(recipe.run_path)
    runs = [Known(run, plan, is_this=run is this) for run in _runs(this)]
    saves = next(filter(None, (known.saves(asynchronous=asynchronous) for known in runs)), None)
    steps = next(filter(None, (known.steps() for known in runs)), None)
    return cadence.cadence(
        saves or cadence.assumed_saves(plan.checkpoint_bytes, plan.world_size, asynchronous=asynchronous),
        steps or Steps(None, "no run like this one has trained yet"),
        assumed_s if mtbf_s is None else mtbf_s,
        assumption if mtbf_s is None else "as given",
        every_steps=recipe.checkpoint.every_steps,
        max_steps=recipe.max_steps,
    )


def _runs(run: Run) -> Iterator[Run]:
    """This run, then the newest beside it."""
    yield run
    dated = []
    with suppress(OSError):
        for folder in run.root.parent.iterdir():
            with suppress(OSError):
                if folder != run.root and (folder / "resolved.yaml").is_file():
                    dated.append((folder.stat().st_mtime, folder))
    yield from (Run(folder) for _, folder in sorted(dated, reverse=True)[:RUNS])


class Known:
    """What the files of one run tell of a planned one."""

    def __init__(self, run: Run, plan: Plan, *, is_this: bool) -> None:
        self.run = run
        self.plan = plan
        self.is_this = is_this
        try:
            self.theirs: dict[str, Any] = rundir.read_json(run.plan) or {}
            attempts = run.attempts()[::-1] if self.theirs else []
        except (DataError, OSError):
            self.theirs, attempts = {}, []
        self.events = (row for attempt in attempts for row in reversed(_tail(attempt.events)))
        self.metrics = (row for attempt in attempts for row in reversed(_tail(attempt.metrics)))
        self.is_alike = all(self.theirs.get(name) == value for name, value in _shape(plan).items())

    def saves(self, *, asynchronous: bool) -> Saves | None:
        rows = []
        for row in self.events:
            with suppress(KeyError, TypeError, ValueError):
                if row["event"] == "sealed" and (row["blocked_s"] < row["durable_s"]) == asynchronous:
                    rows.append((float(row["blocked_s"]), float(row["durable_s"]), int(row["bytes"])))
            if len(rows) == SAVES:
                break
        if not rows or not min(size for _, _, size in rows):
            return None
        source = f"measured: median of {len(rows)} saves of {self._name()}"
        # Of another run: each rank copies as fast as there, and the file system takes as much.
        all_bytes, share = 1.0, 1.0
        if not self.is_alike:
            all_bytes = self.plan.checkpoint_bytes / statistics.median(size for _, _, size in rows)
            share = all_bytes * self.theirs.get("world_size", 1) / self.plan.world_size
            source += ", by their size"
        stall_s = share * statistics.median(blocked for blocked, _, _ in rows)
        writing_s = all_bytes * statistics.median(durable - blocked for blocked, durable, _ in rows)
        if not asynchronous:
            stall_s = all_bytes * statistics.median(durable for _, durable, _ in rows)
        return Saves(stall_s, stall_s + writing_s, source)

    def steps(self) -> Steps | None:
        if not self.is_alike:
            return None
        seconds: list[float] = []
        for row in self.metrics:
            with suppress(KeyError, TypeError, ValueError):
                seconds.append(float(row["step_s"]))
            if len(seconds) == STEPS:
                break
        if not seconds or statistics.median(seconds) <= 0:
            return None
        return Steps(statistics.median(seconds), f"measured: median of {len(seconds)} steps of {self._name()}")

    def _name(self) -> str:
        return "this run" if self.is_this else self.run.root.name


def _shape(plan: Plan) -> dict[str, Any]:
    """What two plans must share for their steps to take as long, on machines of one kind."""
    names = ("world_size", "backend", "step_seconds", "micro_batch_seconds", "parameters", "trained_parameters")
    return {**{name: getattr(plan, name) for name in names}, "deepspeed": plan.deepspeed}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file that may be growing."""
    rows = []
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
        for line in lines[1:-1] if size > TAIL_BYTES else lines[:-1]:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
