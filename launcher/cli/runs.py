"""Commands on a run that is to be, is, or was under way."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launcher.cli.arguments import (
    AsJson,
    Backend,
    Detach,
    Overrides,
    RecipePath,
    RunPath,
    length_of_time,
)


def launch(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    backend: Backend = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Make the run, print its directory, and start nothing; made before is fine.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="One process, no DeepSpeed, in this terminal: breakpoints work.")
    ] = False,
    detach: Detach = False,
) -> None:
    """Start a new run of a recipe and follow it to its end.

    The packs must be there: `speechctl pack RECIPE` makes them. Everything about the run is in its directory, RECIPE's
    `run_dir` (runs/NAME unless the recipe says otherwise).

    Ctrl-C asks the ranks to finish their step, seal a checkpoint and stop; a second one ends them at once. Either way
    `speechctl resume RUN` goes on from the newest checkpoint that verifies.

    Where something under the run dies (a process, a host, a port that was taken) or a rank hangs, all ranks start again
    from there by themselves, until launch.relaunch.attempts in a row have brought no new checkpoint.

    With backend slurm a job is submitted, and nobody waits for it (exit 0): `speechctl status RUN` says where it is.

    Exit codes: 0 finished, 1 the training code raised, 2 the command line or the recipe is wrong, 3 a host cannot be
    reached or refused, 5 data or a checkpoint failed verification, 74 storage, 75 stopped with the work saved, 76
    something under the run died (resume), 77 out of memory, 78 no progress in several attempts (look into it first).
    """
    from launcher import start

    _refuse_both(debug, detach)
    overrides = [*start.for_backend(backend), *overrides]
    if debug:
        overrides = [*overrides, *start.DEBUG]
    raise typer.Exit(start.launch(recipe, overrides, dry_run=dry_run, hold=hold, debug=debug, detach=detach))


def resume(
    run: RunPath,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Go on in another way: --set launch.processes=4.")
    ] = [],  # noqa: B006
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over at step 0, even if there are checkpoints; they are put aside."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="In this terminal; only for a run launched with --debug.")
    ] = False,
    in_allocation: Annotated[
        bool, typer.Option("--in-allocation", help="On the nodes of the SLURM job that this is in (train.sbatch).")
    ] = False,
    detach: Detach = False,
) -> None:
    """Go on with a run from the newest checkpoint that verifies.

    For a run that was stopped, failed or interrupted; it is followed to its end. Ctrl-C and the exit codes are as in
    `launch`. With backend slurm another job is submitted.

    More ranks or fewer may go on: after the hostfile has changed, or with --set launch.processes=4, launch.nodes=2 and
    the like, which stays so. The audio in an optimizer step stays the same, and no utterance is repeated or lost.
    """
    from launcher import start
    from launcher.rundir import Run

    _refuse_both(debug, detach)
    code = start.resume(Run(run), overrides, fresh=fresh, debug=debug, in_allocation=in_allocation, detach=detach)
    raise typer.Exit(code)


def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show where a run stands, and what to type next."""
    from launcher import jobs, ui, views
    from launcher.rundir import Run

    value = jobs.report_of(Run(run))
    if as_json:
        ui.answer(json.dumps(value.to_json(), indent=1))
    else:
        views.show(Run(run), value)


def why(
    run: RunPath,
    attempt: Annotated[int | None, typer.Option(help="Another attempt than the last one that failed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say why a run failed: first cause, evidence, verdict, and what to type next."""
    from launcher import ui, views
    from launcher import why as reasons
    from launcher.rundir import Run

    value = reasons.diagnose(Run(run), attempt)
    if as_json:
        ui.answer(json.dumps(value.to_json(), indent=1))
    else:
        views.why(value)


def audit(run: RunPath, as_json: AsJson = False) -> None:
    """Prove that sealed work saw each utterance of each epoch exactly once.

    Follows what every rank wrote down, over all attempts and numbers of ranks. Exit codes: 0 it is so, 5 it is not, and
    the first place where it is not is named.
    """
    from launcher import audit as audits
    from launcher import ui
    from launcher.rundir import Run

    value = audits.audit(Run(run))
    ui.answer(json.dumps(value.to_json(), indent=1) if as_json else "\n".join(value.lines()))
    value.complain()


def logs(
    run: RunPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the run ends.")] = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="RANKS", help="0,3-5, all, or failed: those that failed. Without it: 0.", show_default=False
        ),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="NODES",
            help="0,2, host names, or all: what these nodes, ssh to them, and their ranks have said.",
            show_default=False,
        ),
    ] = None,
    attempt: Annotated[
        str | None,
        typer.Option(metavar="ATTEMPTS", help="2, 1-3, all, or last. Without it: last.", show_default=False),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Only the last N lines of each log.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only logs that grew in the last 10m, 2h, ….", show_default=False),
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Only lines in which this is found; --tail counts them.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what the ranks and nodes of a run have said, each line with its writer.

    Without options: all that rank 0 of the last attempt said. With --rank failed: of the last attempt that failed.
    Lines carry no time: they come log by log, and with -f, after those that are there, as they are written, of later
    attempts too. --json prints one object a line.
    """
    from launcher import follow as following
    from launcher import logs as files
    from launcher.rundir import Run

    since_s = length_of_time("--since", since) if since is not None else None
    view = files.View(tail, since_s, files.pattern(grep or ""))
    following.print_logs(Run(run), files.Selection(rank, node, attempt), view, follow=follow, as_json=as_json)


def attach(run: RunPath) -> None:
    """Follow a running run, from any machine that sees its directory.

    Prints what `launch` prints and ends as it does, with its exit code. Ctrl-C leaves the run running (exit 130);
    `speechctl stop RUN` ends it. Of a run that is not running it says how that ended.
    """
    from launcher import follow
    from launcher.rundir import Run

    raise typer.Exit(follow.attach(Run(run)))


def stop(
    run: RunPath,
    wait: Annotated[bool, typer.Option(help="Whether to wait until the run has ended.")] = True,
) -> None:
    """Ask a run to finish its step, seal a checkpoint, and end. A job that waits is cancelled."""
    from launcher import start
    from launcher.rundir import Run

    start.stop(Run(run), wait=wait)


def _refuse_both(debug: bool, detach: bool) -> None:
    from launcher.errors import UsageError

    if debug and detach:
        raise UsageError("--debug is in this terminal, --detach without one", hint="leave one of them out")
