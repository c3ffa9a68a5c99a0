"""A run that goes on with more ranks or fewer, on other machines, or with less memory: what may change, and how that is
written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher import rundir, sealing
from launcher.errors import UsageError
from launcher.hosts import Host
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.rundir import Run

MAY_CHANGE = (
    "batch.max_rank_seconds",
    "activation_checkpointing",
    "evaluate.batch_seconds",
    "optimizer.learning_rate",
    "optimizer.grad_clip",
    "optimizer.nonfinite_patience",
)
"""Besides `launch`: what a run that ran out of memory, or is not finite any more, would otherwise be stuck with. None
of it decides which weights, states or utterances there are; the rest of an epoch is cut anew where it has to be."""


def refuse_others(run: Run, overrides: Sequence[str]) -> None:
    """
    Raises:
        UsageError: something else would change: half of the run would be of another recipe.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith("launch.") and key not in MAY_CHANGE:
            raise UsageError(
                f"--set {key} at a resume: {run.root} goes on with the recipe that it was launched with",
                hint=f"only launch.… may change, such as --set launch.processes=4, and {', '.join(MAY_CHANGE)}; for"
                " other values launch another run",
            )


def refuse_unasked(run: Run, recipe: Recipe, was: int, hosts: Sequence[Host]) -> None:
    """
    Raises:
        UsageError: this machine would have another number of ranks than before, and nobody has said how many: a GPU
            that fell off the bus is no reason to train on with the others in silence.
    """
    now = sum(h.slots for h in hosts)
    if now != was and recipe.launch.backend == "local" and recipe.launch.processes == "auto":
        ranks = "1 rank" if was == 1 else f"{was} ranks"
        raise UsageError(
            f"{run.root} has run with {ranks}; on this machine it would have {now}",
            hint=f"resume where {was} can be used, or go on with {now}:"
            f" `speechctl resume {run.root} --set launch.processes={now}`",
        )


def record(run: Run, resolved: Path, made: Plan) -> None:
    """Have this and all later attempts go by `resolved` and `made`. The caller holds the run's lock.

    Killed in between, the next resume finds either recipe, knows both for the run's own, and makes the rest anew.
    """
    known = rundir.read_json(run.provenance) or {}
    before = [*known.get("resolved_before", []), known.get("resolved")]
    now = sealing.digest_file(resolved)
    rundir.write_json(
        run.provenance, {**known, "resolved": now, "resolved_before": [d for d in before if d not in (None, now)]}
    )
    rundir.write_bytes(run.resolved, resolved.read_bytes())
    if made.deepspeed is not None:
        rundir.write_json(run.deepspeed, made.deepspeed)
    rundir.write_json(run.plan, made.to_json())
