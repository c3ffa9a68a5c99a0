"""Commands on what a run came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import AsJson, Average, RunPath, Step, Subsets, chosen


def evaluate(
    run: RunPath,
    checkpoint: Step = "best",
    average: Average = None,
    subset: Subsets = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compute the WER of a sealed checkpoint, in one process and in fp32."""
    import re

    from launcher import ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.recipe_values import NAME
    from launcher.rundir import Run

    where = Run(run)
    steps, named = chosen(where, checkpoint, average)
    refuse_foreign(where)
    subset = list(dict.fromkeys(subset))
    for name in subset:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"--subset {name!r} is no subset's name", hint="such as --subset dev-clean")
    name = "-".join([f"{named}.evaluate", *subset])
    options = [x for s in subset for x in ("--subset", s)] + [x for s in steps for x in ("--step", str(s))]
    target = where.evaluations / f"{name}.json"
    answer = verbs.answer_of("evaluate", str(where.root), "--target", str(target), *options)
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    for title, row in [*answer["subsets"].items(), ("all", answer)]:
        ui.answer(
            f"{title}: WER {row['wer']:.2%} ({row['substitutions']} sub, {row['insertions']} ins,"
            f" {row['deletions']} del of {row['words']} words in {row['utterances']} utterances)"
        )


def export(
    run: RunPath,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="TARGET", help="A directory to make. Default: RUN/exports/step-….", show_default=False),
    ] = None,
    checkpoint: Step = "best",
    average: Average = None,
) -> None:
    """Write a checkpoint's model as a directory that other programs load."""
    from launcher import ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.rundir import Run

    where = Run(run)
    steps, named = chosen(where, checkpoint, average)
    refuse_foreign(where)
    folder = (target or where.exports / named).absolute()
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="remove it or name another directory")
    options = [x for s in steps for x in ("--step", str(s))]
    verbs.said_by("export", str(where.root), "--target", str(folder), *options)
    ui.answer(str(folder))


def transcribe(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A directory made by `export`.", show_default=False)],
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Sound files, and folders of them.", show_default=False)
    ],
    format: Annotated[
        list[str],
        typer.Option(metavar="FORMAT", help="txt; or with times: json, srt. With --output repeatable."),
    ] = ["txt"],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a file for each sound file, by its path.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a model hears in sound files."""
    from launcher import verbs
    from launcher.errors import UsageError

    for name in format:
        if name not in ("txt", "json", "srt"):
            raise UsageError(f"--format {name!r} is not known", hint="txt, json or srt")
    options = [x for name in (["json"] if as_json else format) for x in ("--format", name)] + (
        ["--output", str(output)] if output else []
    )
    verbs.shown("transcribe", *options, "--", str(model), *map(str, paths))
