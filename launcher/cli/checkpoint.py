"""Commands on the checkpoints of a run."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated

import typer

from launcher.cli.arguments import AsJson, RunPath


def ls(
    run: RunPath,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every file, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run: WER, size, state, and what can go on from each.

    `sealed`: the manifest is intact, and every file is there and has its size. `verified`: its content, too, is what
    was sealed.
    """
    from launcher import checkpoints, ui, views
    from launcher.rundir import Run

    where = Run(run)
    steps = checkpoints.chosen(where, [])
    seen = [checkpoints.verify(where, s, views.hashed()) if verify else checkpoints.look(where, s) for s in steps]
    rows = checkpoints.rows(where, seen)
    if as_json:
        ui.answer(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        views.checkpoints(rows)


def verify(
    run: RunPath,
    steps: Annotated[
        list[str],
        typer.Argument(metavar="[STEP]...", help="Steps, best or last. Without any: all.", show_default=False),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Read and hash every file of checkpoints, and compare with what was sealed.

    Nothing is unpickled. Every problem of every checkpoint is listed.

    Exit codes: 0 all verify, 5 one is damaged, 6 no such run or checkpoint.
    """
    from launcher import checkpoints, ui, views
    from launcher.rundir import Run

    where = Run(run)
    seen = [checkpoints.verify(where, step, views.hashed()) for step in checkpoints.chosen(where, steps)]
    if as_json:
        ui.answer(json.dumps([condition.to_json() for condition in seen], indent=1))
    else:
        views.conditions(seen)
    checkpoints.refuse_damaged(where, seen)


def prune(
    run: RunPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints that the recipe's rules do not keep, as a launcher does after each save.

    Those that count are read and hashed first; two that verify always stay, and so does one that is being read. A run
    that a launcher has is refused.
    """
    from launcher import checkpoints, ui, views
    from launcher.rundir import Run

    done = checkpoints.prune(Run(run), " ".join(sys.argv), dry_run=dry_run)
    if as_json:
        ui.answer(json.dumps(done.to_json(), indent=1))
    else:
        views.pruned(done)


def pin(
    run: RunPath,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step, best or last.", show_default=False)],
) -> None:
    """Keep a checkpoint whatever the rules say."""
    from launcher import checkpoints, ui
    from launcher.rundir import Run

    where = Run(run)
    number = checkpoints.pin(where, step)
    ui.answer(f"{where.checkpoint(number)} stays until it is unpinned")


def unpin(
    run: RunPath,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="A step.", show_default=False)],
) -> None:
    """Leave a pinned checkpoint to the rules again."""
    from launcher import checkpoints, ui
    from launcher.rundir import Run

    where = Run(run)
    checkpoints.unpin(where, step)
    ui.answer(f"{where.checkpoint(step)} is left to the rules again")


def reshard(
    run: RunPath,
    step: Annotated[str, typer.Argument(metavar="STEP", help="best, last, or a step.", show_default=False)],
    ranks: Annotated[int, typer.Option(min=1, help="So many ranks are to go on.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Find out now whether another number of ranks can go on from a checkpoint.

    Reads all of it as they would, and checks that nothing of the model is missing. Writes nothing: `resume` needs no
    copy in another form, and does the same by itself.
    """
    from launcher import recipe_file, report, ui, verbs
    from launcher.ownership import refuse_foreign
    from launcher.rundir import Run

    where = Run(run)
    number = report.sealed_step(where, step)
    refuse_foreign(where)
    answer = verbs.answer_of("reshard", str(where.root), "--step", str(number), "--ranks", str(ranks))
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    left = (
        ui.counted(answer["steps_left_in_epoch"], "step"),
        ui.counted(answer["utterances_left_in_epoch"], "utterance"),
    )
    ui.answer(
        f"step {number}: {ui.counted(ranks, 'rank')} can go on where {answer['saved_by']} stopped, in epoch"
        f" {answer['epoch']} with {left[0]} left of {left[1]}; accumulation {answer['accumulation']}"
    )
    if recipe_file.load(where.resolved).launch.backend == "local":
        ui.commands_next([f"speechctl resume {shlex.quote(str(where.root))} --set launch.processes={ranks}"])
