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
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.plan import Plan
    from launcher.recipe import Recipe
    from launcher.rundir import Run

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

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/NAME.", show_default=False)
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one value: --set batch.step_seconds=100s.")
]
Subsets = Annotated[
    list[str], typer.Option("--subset", metavar="SUBSET", help="A packed subset, in place of the recipe's; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Step = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="best, last, or a step.")]


def main() -> None:
    """The entry point: every failure ends as one text with a hint and the exit code of its class."""
    from launcher.errors import ExitCode, SpeechctlError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    try:
        sys.exit(app(prog_name="speechctl", standalone_mode=False))
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
    from launcher import ui
    from launcher.errors import UsageError
    from launcher.prepare import new_hostfile, run

    with _resolved(recipe, overrides) as (value, path):
        if write_hostfile is None and (hosts or from_slurm):
            raise UsageError("HOSTs and --from-slurm say what to write", hint="add --write-hostfile FILE")
        if write_hostfile is not None:
            if bool(hosts) == from_slurm:
                raise UsageError("--write-hostfile takes HOSTs or --from-slurm", hint="name one of the two")
            found = new_hostfile.from_slurm(value) if from_slurm else new_hostfile.from_list(value, hosts)
            ui.answer(new_hostfile.write(write_hostfile, found).rstrip())
            return
        result = run.prepare(value, path, fix=fix)
    if as_json:
        ui.answer(json.dumps(result.to_json(), indent=1))
    else:
        ui.prepared(result)
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
    from launcher import ui

    with _resolved(recipe, overrides) as (_, path):
        answer = _worker("pack", str(path), "--processes", str(processes))
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    for row in answer:
        utterances, speakers = ui.counted(row["utterances"], "utterance"), ui.counted(row["speakers"], "speaker")
        ui.answer(f"{row['pack']}: {utterances}, {row['hours']:.2f} h, {speakers}")


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show what a launch would do: ranks, batches, steps, memory, commands. Starts and writes nothing."""
    from launcher import ui

    with _resolved(recipe, overrides) as (value, path):
        made, _ = _plan(value, path)
    if as_json:
        ui.answer(json.dumps(made.to_json(), indent=1))
    else:
        ui.plan(made)


# A run ---------------------------------------------------------------------------------------------------------------


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="One process, no DeepSpeed, in this terminal: breakpoints work.")
    ] = False,
) -> None:
    """Start a new run of a recipe and follow it to its end.

    The packs must be there: `speechctl pack RECIPE` makes them. Everything about the run is in its directory, RECIPE's
    `run_dir` (runs/NAME unless the recipe says otherwise).

    Ctrl-C asks the ranks to finish their step, seal a checkpoint and stop; a second one ends them at once. Either way
    `speechctl resume RUN` goes on from the newest checkpoint that verifies.

    Exit codes: 0 finished, 1 the training code raised, 2 the command line or the recipe is wrong, 3 a host cannot be
    reached or refused, 5 data or a checkpoint failed verification, 74 storage, 75 stopped with the work saved, 76
    something under the run died (resume), 77 out of memory.
    """
    from launcher import new_run, ui
    from launcher.prepare import run as preflight
    from launcher.rundir import Run, RunLock

    if debug:
        here = ("backend=local", "hostfile=null", "include=[]", "exclude=[]", "processes=1")
        overrides = [*overrides, *(f"launch.{word}" for word in here), "zero_stage=off"]
    with _resolved(recipe, overrides) as (value, path):
        run = Run(value.run_path)
        if not dry_run and run.root.exists():
            raise new_run.in_the_way(run)
        made, facts = _plan(value, path)
        if dry_run:
            ui.plan(made)
            return
        preflight.before_launch(value, made.hosts)
        new_run.create(run, recipe, path, made, facts)
    steps, ranks = ui.counted(made.max_steps, "step"), ui.counted(made.world_size, "rank")
    ui.say(f"{made.name}: {steps} on {ranks}, in {run.root}")
    with RunLock(run, " ".join(sys.argv)):
        _attempt(run, value, made, fresh=False, debug=debug)


@app.command()
def resume(
    run: RunPath,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over at step 0, even if there are checkpoints; they are put aside."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="In this terminal; only for a run launched with --debug.")
    ] = False,
) -> None:
    """Go on with a run from the newest checkpoint that verifies.

    For a run that was stopped, failed or interrupted; it is followed to its end. Ctrl-C and the exit codes are as in
    `launch`.
    """
    import dataclasses

    from launcher import environment, new_run, recipe_file, report, rundir, ui
    from launcher import plan as plans
    from launcher.errors import UsageError
    from launcher.prepare import run as preflight
    from launcher.rundir import Run, RunLock

    where = Run(run)
    report.read(where)  # refuses what is no run before anything is written there
    with RunLock(where, " ".join(sys.argv)):
        state = report.read(where)
        if state.state == "finished" and state.max_steps in state.sealed and not fresh:
            ui.say(f"{where.root} is finished")
            _show(where)
            return
        new_run.refuse_edited(where)
        value = recipe_file.load(where.resolved)
        if debug and (value.zero_stage != "off" or value.launch.processes != 1):
            raise UsageError("this run was not launched with --debug", hint=f"`speechctl resume {where.root}`")
        made = plans.Plan.from_json(rundir.read_json(where.plan))
        machines = environment.machines(value)
        was, now = (sum(h.slots for h in some) for some in (made.hosts, machines))
        if was != now:
            place = "on this machine" if value.launch.hostfile is None else f"by {value.launch.hostfile}"
            raise UsageError(
                f"{where.root} was launched with {ui.counted(was, 'rank')}; {place} it would have"
                f" {ui.counted(now, 'rank')}",
                hint="resume where as many GPUs can be used; another number of ranks cannot take over a run yet",
            )
        made = dataclasses.replace(made, hosts=machines)  # another host may have taken the place of one that died
        preflight.before_launch(value, machines)
        _attempt(where, value, made, fresh=fresh, debug=debug)


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show where a run stands, and what to type next."""
    from launcher import report, ui
    from launcher.rundir import Run

    if as_json:
        ui.answer(json.dumps(report.read(Run(run)).to_json(), indent=1))
    else:
        _show(Run(run))


@app.command()
def stop(
    run: RunPath,
    wait: Annotated[bool, typer.Option(help="Whether to wait until the run has ended.")] = True,
) -> None:
    """Ask a run to finish its step, seal a checkpoint, and end."""
    import time

    from launcher import report, rundir, supervise, ui
    from launcher.errors import UsageError
    from launcher.rundir import Run

    where = Run(run)
    if report.read(where).holder is None:
        raise UsageError(f"{where.root} is not running", hint=f"`speechctl status {where.root}` shows how it ended")
    supervise.request_stop(where, "speechctl stop")
    while wait and rundir.holder(where) is not None:
        time.sleep(0.2)
    ui.answer(f"{where.root}: {report.read(where).state if wait else 'asked to stop'}")


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

    from launcher import ui
    from launcher.errors import UsageError
    from launcher.recipe import NAME
    from launcher.rundir import Run

    where = Run(run)
    step = _which(where, checkpoint)
    subset = list(dict.fromkeys(subset))
    for name in subset:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"--subset {name!r} is no subset's name", hint="such as --subset dev-clean")
    name = "-".join([f"step-{step:08d}.evaluate", *subset])
    options = [x for s in subset for x in ("--subset", s)]
    target = where.evaluations / f"{name}.json"
    answer = _worker("evaluate", str(where.root), "--step", str(step), "--target", str(target), *options)
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
    from launcher import ui
    from launcher.errors import UsageError
    from launcher.rundir import Run

    where = Run(run)
    step = _which(where, checkpoint)
    folder = (target or where.exports / f"step-{step:08d}").absolute()
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="remove it or name another directory")
    _worker("export", str(where.root), "--step", str(step), "--target", str(folder), parse=False)
    ui.answer(str(folder))


@app.command()
def transcribe(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A directory made by `export`.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Sound files.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print what a model hears in sound files."""
    from launcher.errors import printable

    said = _worker("transcribe", "--", str(model), *map(str, files), parse=False).splitlines()
    for line in (text for text in said if text.startswith("{")):  # libraries may say something too
        row = json.loads(line)
        # Not through rich, which makes blanks of a tab: this is for `cut -f2`.
        print(line if as_json else f"{printable(row['file'])}\t{printable(row['text'])}")


# What the commands share ---------------------------------------------------------------------------------------------


@contextmanager
def _resolved(path: Path, overrides: list[str]) -> Iterator[tuple[Recipe, Path]]:
    """The recipe with overrides applied and paths made absolute, and a file that says so for the worker."""
    from launcher import recipe_file

    value = recipe_file.absolute(recipe_file.load(path, overrides), Path.cwd())
    with tempfile.TemporaryDirectory(prefix="speechctl-") as folder:
        file = Path(folder) / "resolved.yaml"
        file.write_text(recipe_file.dump(value))
        yield value, file


def _worker(*arguments: str, parse: bool = True) -> Any:
    """What a verb of the worker answered. It has printed its own error where it failed."""
    from launcher import supervise
    from launcher.errors import InfrastructureError, SpeechctlError

    done = supervise.ask_worker(list(arguments))
    if done.returncode < 0:
        raise InfrastructureError(
            f"the worker's `{arguments[0]}` was ended by {supervise.by_signal(-done.returncode)}",
            hint="look at the memory of this machine, then try again",
        )
    if done.returncode == 1:
        raise SpeechctlError(
            f"the worker's `{arguments[0]}` failed in a way that it does not expect; its traceback is above",
            hint="mend what it names if that is on this machine; otherwise it is a bug of speechctl: report it",
        )
    if done.returncode != 0:
        print(done.stdout, end="")
        raise typer.Exit(done.returncode)
    # Libraries may say something on stdout before the answer, which is one line.
    return json.loads(done.stdout.splitlines()[-1]) if parse else done.stdout


def _plan(value: Recipe, path: Path) -> tuple[Plan, dict[str, Any]]:
    """What the recipe comes to on this machine, and the facts it was made from."""
    from launcher import environment
    from launcher import plan as plans

    machines = environment.machines(value)
    facts = _worker("facts", str(path), "--world-size", str(sum(h.slots for h in machines)))
    return plans.make(value, machines, facts), facts


def _attempt(run: Run, value: Recipe, made: Plan, *, fresh: bool, debug: bool) -> None:
    """One attempt to its end; ends the command with its exit code."""
    from launcher import rundir, supervise, ui
    from launcher.errors import ExitCode

    attempt = supervise.prepare_attempt(run, value.launch, made, fresh=fresh)
    progress = ui.Progress(value.max_steps)
    code = supervise.run_debug(attempt) if debug else supervise.run_attempt(attempt, made, progress)
    failure = rundir.read_json(attempt.failure)
    if failure is not None:
        ui.error(f"error: {failure['message']}\n\nevidence: {failure['evidence']}\n\nhint: {failure['hint']}")
        raise typer.Exit(code)
    _show(run)
    if code != ExitCode.FINISHED:
        raise typer.Exit(code)


def _show(run: Run) -> None:
    """The report of a run as it stands, with the commands that make sense next."""
    from launcher import report, ui

    value = report.read(run)
    root = shlex.quote(str(run.root))
    at = value.best["step"] if value.best else (value.sealed[-1] if value.sealed else 0)
    heard_at = value.best["step"] if value.best else (value.evaluations[-1]["step"] if value.evaluations else 0)
    if value.state == "running":
        commands = [f"speechctl status {root}", f"speechctl stop {root}"]
    elif value.state == "finished":
        which = "" if value.best else " --checkpoint last"
        commands = [
            f"speechctl evaluate {root}{which}",
            f"speechctl export {root}{which}",
            f"speechctl transcribe {shlex.quote(f'{run.exports}/step-{at:08d}')} FILE.flac",
        ]
    else:
        commands = [f"speechctl resume {root}"]
    ui.report(value, report.samples(run, heard_at, 4), commands)


def _which(run: Run, checkpoint: str) -> int:
    """The step that `best`, `last` or a number means.

    Raises:
        NotFoundError: no such checkpoint is sealed; lists those that are.
    """
    from launcher import report
    from launcher.errors import NotFoundError

    value = report.read(run)
    best = value.best["step"] if value.best else None
    named = {"best": best, "last": value.sealed[-1] if value.sealed else None}
    number = int(checkpoint) if checkpoint.isascii() and checkpoint.isdigit() else None
    step = named.get(checkpoint, number)
    if step is None or step not in value.sealed:
        if not value.sealed:
            raise NotFoundError(
                f"{run.root} has no sealed checkpoint yet", hint=f"`speechctl status {run.root}` shows where it stands"
            )
        raise NotFoundError(
            f"{run.root} has no checkpoint {checkpoint}",
            hint=f"--checkpoint takes best, last, or one of its sealed steps: {', '.join(map(str, value.sealed))}",
        )
    return step


if __name__ == "__main__":
    main()
