"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from launcher.rundir import Run

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)]


def run_named(path: Path) -> Path:
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
        callback=run_named,
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
Backend = Annotated[
    Literal["local", "ssh", "slurm"] | None,
    typer.Option("--backend", help="Reach the nodes in this way, whatever the recipe says."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Step = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="best, last, or a step.")]
Average = Annotated[
    str | None,
    typer.Option(
        metavar="WHICH",
        help="ema: the moving average, the default of a run with optimizer.ema; none: the weights themselves;"
        " last:5, best:3: the mean of several checkpoints.",
        show_default=False,
    ),
]


def chosen(run: Run, checkpoint: str, average: str | None) -> tuple[list[str], str]:
    """Whose weights are taken, as options of the worker, and what to call a result of them."""
    from launcher import recipe_file, report
    from launcher.errors import UsageError

    if average is None or average in ("ema", "none"):
        step = report.sealed_step(run, checkpoint)
        keeps = recipe_file.load(run.resolved).optimizer.ema is not None
        if average == "ema" and not keeps:
            raise UsageError(
                f"--average ema: {run.root} keeps no moving average of its weights",
                hint="a run whose recipe has optimizer.ema does; --average last:5 is the mean of its last checkpoints",
            )
        # What evaluations have scored goes by the step alone: the WER of `best` is of these weights.
        named = f"step-{step:08d}.average-none" if keeps and average == "none" else f"step-{step:08d}"
        return ["--step", str(step), *["--ema"] * (keeps and average != "none")], named
    if checkpoint != "best":
        raise UsageError("an --average of checkpoints takes the place of --checkpoint", hint="leave one of them out")
    steps = report.averaged_steps(run, average)
    options = [x for step in steps for x in ("--step", str(step))]
    return options, f"step-{steps[-1]:08d}.average-{average.replace(':', '-')}"


def length_of_time(option: str, text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from launcher.errors import UsageError
    from launcher.recipe_values import Seconds

    try:
        return TypeAdapter(Seconds).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"{option} {text!r} is no length of time", hint="such as 90s, 10m, 2h or 01:30:00") from error


def number_of_bytes(option: str, text: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    from launcher.errors import UsageError
    from launcher.recipe_values import Bytes

    try:
        return TypeAdapter(Bytes).validate_python(int(text) if text.isdecimal() else text)
    except ValidationError as error:
        raise UsageError(f"{option} {text!r} is no amount of memory", hint="such as 8GiB, 500MiB or 40GB") from error
