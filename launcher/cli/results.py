"""Commands on what a run came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import AsJson, Average, RunPath, Step, Subsets, chosen, run_named


def evaluate(
    context: typer.Context,
    run: RunPath,
    checkpoint: Step = "best",
    average: Average = None,
    subset: Subsets = [],  # noqa: B006
    lm: Annotated[
        Path | None,
        typer.Option("--lm", metavar="ARPA", help="CTC beam search with this word n-gram.", show_default=False),
    ] = None,
    beam: Annotated[int, typer.Option(min=1, help="With --lm: hypotheses kept at each frame.")] = 50,
    lm_weight: Annotated[float, typer.Option(help="With --lm: how much the n-gram counts.")] = 2.0,
    word_score: Annotated[float, typer.Option(help="With --lm: added for each word.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compute the WER of a sealed checkpoint, in one process and in fp32.

    Greedy decoding, as in training; with --lm a beam search, which needs the extra `beam`.
    """
    import math
    import re

    from launcher import sealing, tables, ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.recipe_values import NAME
    from launcher.rundir import Run

    for option in ("beam", "lm_weight", "word_score"):
        source = context.get_parameter_source(option)
        if lm is None and source is not None and source.name == "COMMANDLINE":
            flag = "--" + option.replace("_", "-")
            raise UsageError(
                f"{flag} is for a beam search, and there is no --lm", hint=f"add --lm, or leave {flag} out"
            )
    if not (math.isfinite(lm_weight) and math.isfinite(word_score)):
        raise UsageError("--lm-weight and --word-score take finite numbers", hint="such as --lm-weight 2")
    where = Run(run)
    of, named = chosen(where, checkpoint, average)
    refuse_foreign(where)
    subset = list(dict.fromkeys(subset))
    for name in subset:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"--subset {name!r} is no subset's name", hint="such as --subset dev-clean")
    search: list[str] = []
    if lm is not None:  # a file for each n-gram and setting: tuning them keeps what was found before
        content = sealing.digest_file(lm)["xxh3_128"][:8] if lm.is_file() else ""  # the search says that there is none
        search = ["beam", lm.name[:40], content, f"{beam}", f"{lm_weight}", f"{word_score}"]
    name = "-".join([f"{named}.evaluate", *subset, *search])
    options = [x for s in subset for x in ("--subset", s)] + of
    if lm is not None:
        options += ["--lm", str(lm.absolute()), "--beam", str(beam)]
        options += [f"--lm-weight={lm_weight}", f"--word-score={word_score}"]
    target = where.evaluations / f"{name}.json"
    answer = verbs.answer_of("evaluate", str(where.root), "--target", str(target), *options)
    if as_json:
        ui.answer(json.dumps(answer, indent=1))
        return
    tables.evaluation(answer)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs, or files of their evaluations/. Of several: compared.", show_default=False
        ),
    ],
    checkpoint: Step = "best",
    as_json: AsJson = False,
) -> None:
    """Show what an evaluation of training has counted, or compare runs. Computes nothing.

    Word and character errors as sclite has them: in all, by subset, speaker, sex and duration; the worst utterances
    word by word; an interval by drawing speakers. Runs under different normalizers or on different packs are not
    compared (exit 2).
    """
    from launcher import evaluations, tables, ui
    from launcher.rundir import Run

    named = [
        (str(path), evaluations.at(path) if path.is_file() else evaluations.chosen(Run(run_named(path)), checkpoint))
        for path in runs
    ]
    evaluations.refuse_mixed(named)
    if as_json:
        ui.answer(json.dumps(named[0][1] if len(named) == 1 else dict(named), indent=1))
    elif len(named) == 1:
        tables.evaluation(named[0][1])
    else:
        tables.comparison(named)


def export(
    run: RunPath,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="TARGET", help="A directory to make. Default: RUN/exports/step-….", show_default=False),
    ] = None,
    checkpoint: Step = "best",
    average: Average = None,
) -> None:
    """Write a checkpoint's model as a directory that other programs load.

    Of a run with optimizer.ema it has the moving average of the weights, which is what the run's WERs are of.
    """
    from launcher import ui, verbs
    from launcher.errors import UsageError
    from launcher.ownership import refuse_foreign
    from launcher.rundir import Run

    where = Run(run)
    of, named = chosen(where, checkpoint, average)
    refuse_foreign(where)
    folder = (target or where.exports / named).absolute()
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="remove it or name another directory")
    verbs.said_by("export", str(where.root), "--target", str(folder), *of)
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
