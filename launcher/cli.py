"""The command line: the only user of typer. Each command makes values, shows them, then acts.

Heavy imports wait until a command needs them: `speechctl --help` costs what a bare Typer app costs, and nothing here
ever imports torch.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="speechctl",
    help="Launch DeepSpeed training of speech models, and come back from every failure.\n\n"
    "The whole way: speechctl pack RECIPE, speechctl launch RECIPE, speechctl status RUN; after an interruption"
    " speechctl resume RUN; at the end speechctl evaluate RUN and speechctl export RUN.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the help is text as everything else is: no boxes, no padding in a pipe
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")
checkpoint_app = typer.Typer(help="Look after checkpoints.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(checkpoint_app, name="checkpoint")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)]


def _run_named(path: Path) -> Path:
    """A run under `runs` may be called by its name alone."""
    named = "runs" / path
    is_run, is_named = ((p / "resolved.yaml").is_file() for p in (path, named))
    return named if is_named and not is_run and len(path.parts) == 1 else path


RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run's directory, such as runs/NAME, or its NAME there.",
        show_default=False,
        callback=_run_named,
    ),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Go on without this terminal; `attach` follows. A SLURM job needs none."),
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one value: --set batch.step_seconds=100s.")
]
Subsets = Annotated[
    list[str], typer.Option("--subset", metavar="SUBSET", help="A packed subset, in place of the recipe's; repeatable.")
]
Backend = Literal["local", "ssh", "slurm"]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Step = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="best, last, or a step.")]


def main() -> None:
    """The entry point: every failure ends as one text with a hint and the exit code of its class."""
    from launcher.errors import AlreadyTold, ExitCode, SpeechctlError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    try:
        sys.exit(app(prog_name="speechctl", standalone_mode=False))
    except AlreadyTold as error:
        sys.exit(error.exit_code)
    except SpeechctlError as error:
        from launcher import ui

        ui.error(error.render())
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        _explain_usage(error)
        sys.exit(ExitCode.USAGE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            f"\nerror: this is a bug of speechctl\n\nhint: report it with the traceback above (exit {ExitCode.BUG})",
            file=sys.stderr,
        )
        sys.exit(ExitCode.BUG)


def _explain_usage(error: typer.TyperException) -> None:
    """A wrong command line, in the form of every other error. Without any arguments it is the help."""
    from launcher import ui

    text = error.format_message()
    if text.startswith("Usage:"):
        print(text, file=sys.stderr)
        return
    command = getattr(getattr(error, "ctx", None), "command_path", "speechctl")
    there = "lists the commands" if command == "speechctl" else "shows what it takes"
    ui.error(f"error: {text[:1].lower()}{text[1:].rstrip('.')}\n\nhint: `{command} --help` {there}")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"speechctl {version('speechctl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


# Before a run --------------------------------------------------------------------------------------------------------


@recipe_app.command("check")
def recipe_check(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a recipe with every value filled in, or every mistake in it."""
    from launcher import recipe_file, ui

    ui.answer(recipe_file.dump(recipe_file.load(recipe, overrides)).rstrip())


@app.command()
def prepare(
    recipe: RecipePath,
    hosts: Annotated[
        list[str], typer.Argument(metavar="[HOST]...", help="For --write-hostfile: lines of it.", show_default=False)
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend, and look again.")] = False,
    write_hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a hostfile of the HOSTs, or of SLURM's nodes, and stop.")
    ] = None,
    from_slurm: Annotated[
        bool, typer.Option("--from-slurm", help="For --write-hostfile: the nodes of this job, or of the partition.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every host for what a recipe needs: one table, and a hint for each red cell.

    Nothing is changed without --fix. That removes stale shared memory and processes of this run that nobody looks
    after, makes the run's parent directory, fetches the backbone once, and installs or updates the environment on hosts
    where it is missing or differs. Network interfaces are proposed and never set.

    Exit codes: 0 ready (perhaps with warnings), 3 a host cannot be reached, 4 something is red.
    """
    from launcher import recipe_file, ui, views
    from launcher.errors import UsageError
    from launcher.prepare import new_hostfile, run

    with recipe_file.resolved(recipe, overrides) as (value, path):
        if write_hostfile is None and (hosts or from_slurm):
            raise UsageError("HOSTs and --from-slurm say what to write", hint="add --write-hostfile FILE")
        if write_hostfile is not None:
            if bool(hosts) == from_slurm:
                raise UsageError("--write-hostfile takes HOSTs or --from-slurm", hint="name one of the two")
            found = new_hostfile.from_slurm(value) if from_slurm else new_hostfile.from_list(value, hosts)
            ui.answer(new_hostfile.write(write_hostfile, found).rstrip())
            return
        result = run.prepare(value, path, fix=fix, say=ui.say)
    if as_json:
        ui.answer(json.dumps(result.to_json(), indent=1))
    else:
        views.prepared(result)
    raise typer.Exit(result.code)


@app.command()
def pack(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    processes: Annotated[int, typer.Option(min=1, help="Processes that pack at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Turn the LibriSpeech subsets that a recipe names into sealed MDS packs.

    A pack that is there already is checked and kept. Ctrl-C is safe: the next `pack` goes on from what is complete.
    """
    from launcher import recipe_file, ui, verbs

    with recipe_file.resolved(recipe, overrides) as (_, path):
        answer = verbs.answer_of("pack", str(path), "--processes", str(processes))
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    for row in answer:
        utterances, speakers = ui.counted(row["utterances"], "utterance"), ui.counted(row["speakers"], "speaker")
        ui.answer(f"{row['pack']}: {utterances}, {row['hours']:.2f} h, {speakers}")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    mtbf: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How often something fails, such as 24h.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a launch would do: ranks, batches, steps, memory, commands. Starts and writes nothing.

    Also what a checkpoint costs, and how many steps between two lose least (Young/Daly): as measured by this run or
    those beside it, or by an assumption that is named. The time of a restart is not in these losses.
    """
    from launcher import measured, recipe_file, start, ui, views

    mtbf_s = None if mtbf is None else _length_of_time("--mtbf", mtbf)
    with recipe_file.resolved(recipe, overrides) as (value, path):
        made, _ = start.planned(value, path)
        saving = measured.planned(value, made, mtbf_s)
    if as_json:
        ui.answer(json.dumps({**made.to_json(), "saving": saving.to_json()}, indent=1))
    else:
        views.plan(made, saving)


# A run ---------------------------------------------------------------------------------------------------------------


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    backend: Annotated[
        Backend | None, typer.Option("--backend", help="Reach the nodes in this way, whatever the recipe says.")
    ] = None,
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
    if backend is not None:
        overrides = [*start.for_backend(backend), *overrides]
    if debug:
        overrides = [*overrides, *start.DEBUG]
    raise typer.Exit(start.launch(recipe, overrides, dry_run=dry_run, hold=hold, debug=debug, detach=detach))


@app.command()
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


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show where a run stands, and what to type next."""
    from launcher import jobs, ui, views
    from launcher.rundir import Run

    value = jobs.report_of(Run(run))
    if as_json:
        ui.answer(json.dumps(value.to_json(), indent=1))
    else:
        views.show(Run(run), value)


@app.command()
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


@app.command()
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


@app.command()
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

    since_s = _length_of_time("--since", since) if since is not None else None
    view = files.View(tail, since_s, files.pattern(grep or ""))
    following.print_logs(Run(run), files.Selection(rank, node, attempt), view, follow=follow, as_json=as_json)


@app.command()
def attach(run: RunPath) -> None:
    """Follow a running run, from any machine that sees its directory.

    Prints what `launch` prints and ends as it does, with its exit code. Ctrl-C leaves the run running (exit 130);
    `speechctl stop RUN` ends it. Of a run that is not running it says how that ended.
    """
    from launcher import follow
    from launcher.rundir import Run

    raise typer.Exit(follow.attach(Run(run)))


@app.command()
def stop(
    run: RunPath,
    wait: Annotated[bool, typer.Option(help="Whether to wait until the run has ended.")] = True,
) -> None:
    """Ask a run to finish its step, seal a checkpoint, and end. A job that waits is cancelled."""
    from launcher import start
    from launcher.rundir import Run

    start.stop(Run(run), wait=wait)


# After a run ---------------------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    run: RunPath,
    checkpoint: Step = "best",
    subset: Subsets = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compute the WER of a sealed checkpoint, in one process and in fp32."""
    import re

    from launcher import report, ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.recipe_values import NAME
    from launcher.rundir import Run

    where = Run(run)
    step = report.sealed_step(where, checkpoint)
    refuse_foreign(where)
    subset = list(dict.fromkeys(subset))
    for name in subset:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"--subset {name!r} is no subset's name", hint="such as --subset dev-clean")
    name = "-".join([f"step-{step:08d}.evaluate", *subset])
    options = [x for s in subset for x in ("--subset", s)]
    target = where.evaluations / f"{name}.json"
    answer = verbs.answer_of("evaluate", str(where.root), "--step", str(step), "--target", str(target), *options)
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    for title, row in [*answer["subsets"].items(), ("all", answer)]:
        ui.answer(
            f"{title}: WER {row['wer']:.2%} ({row['substitutions']} sub, {row['insertions']} ins,"
            f" {row['deletions']} del of {row['words']} words in {row['utterances']} utterances)"
        )


@app.command()
def export(
    run: RunPath,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="TARGET", help="A directory to make. Default: RUN/exports/step-….", show_default=False),
    ] = None,
    checkpoint: Step = "best",
) -> None:
    """Write a checkpoint's model as a directory that other programs load."""
    from launcher import report, ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.rundir import Run

    where = Run(run)
    step = report.sealed_step(where, checkpoint)
    refuse_foreign(where)
    folder = (target or where.exports / f"step-{step:08d}").absolute()
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="remove it or name another directory")
    verbs.said_by("export", str(where.root), "--step", str(step), "--target", str(folder))
    ui.answer(str(folder))


# Checkpoints ---------------------------------------------------------------------------------------------------------


@checkpoint_app.command("ls")
def checkpoint_ls(
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


@checkpoint_app.command("verify")
def checkpoint_verify(
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


@checkpoint_app.command("prune")
def checkpoint_prune(
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


@checkpoint_app.command("pin")
def checkpoint_pin(
    run: RunPath,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step, best or last.", show_default=False)],
) -> None:
    """Keep a checkpoint whatever the rules say."""
    from launcher import checkpoints, ui
    from launcher.rundir import Run

    where = Run(run)
    number = checkpoints.pin(where, step)
    ui.answer(f"{where.checkpoint(number)} stays until it is unpinned")


@checkpoint_app.command("unpin")
def checkpoint_unpin(
    run: RunPath,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="A step.", show_default=False)],
) -> None:
    """Leave a pinned checkpoint to the rules again."""
    from launcher import checkpoints, ui
    from launcher.rundir import Run

    where = Run(run)
    checkpoints.unpin(where, step)
    ui.answer(f"{where.checkpoint(step)} is left to the rules again")


@app.command()
def transcribe(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A directory made by `export`.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Sound files.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print what a model hears in sound files."""
    from launcher import verbs
    from launcher.errors import printable

    said = verbs.said_by("transcribe", "--", str(model), *map(str, files)).splitlines()
    for line in (text for text in said if text.startswith("{")):  # libraries may say something too
        row = json.loads(line)
        # Not through rich, which makes blanks of a tab: this is for `cut -f2`.
        print(line if as_json else f"{printable(row['file'])}\t{printable(row['text'])}")


@checkpoint_app.command("reshard")
def checkpoint_reshard(
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


def _refuse_both(debug: bool, detach: bool) -> None:
    from launcher.errors import UsageError

    if debug and detach:
        raise UsageError("--debug is in this terminal, --detach without one", hint="leave one of them out")


def _length_of_time(option: str, text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from launcher.errors import UsageError
    from launcher.recipe_values import Seconds

    try:
        return TypeAdapter(Seconds).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"{option} {text!r} is no length of time", hint="such as 90s, 10m, 2h or 01:30:00") from error


if __name__ == "__main__":
    main()
