"""Commands before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import (
    AsJson,
    Backend,
    Overrides,
    RecipePath,
    length_of_time,
    number_of_bytes,
)


def check(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a recipe with every value filled in, or every mistake in it."""
    from launcher import recipe_file, ui

    ui.answer(recipe_file.dump(recipe_file.load(recipe, overrides)).rstrip())


def prepare(
    recipe: RecipePath,
    hosts: Annotated[
        list[str], typer.Argument(metavar="[HOST]...", help="For --write-hostfile: lines of it.", show_default=False)
    ] = [],  # noqa: B006
    backend: Backend = None,
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
    from launcher import recipe_file, start, ui, views
    from launcher.errors import UsageError
    from launcher.prepare import new_hostfile, run

    with recipe_file.resolved(recipe, [*start.for_backend(backend), *overrides]) as (value, path):
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


def plan(
    recipe: RecipePath,
    backend: Backend = None,
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

    mtbf_s = None if mtbf is None else length_of_time("--mtbf", mtbf)
    with recipe_file.resolved(recipe, [*start.for_backend(backend), *overrides]) as (value, path):
        made, _ = start.planned(value, path)
        saving = measured.planned(value, made, mtbf_s)
    if as_json:
        ui.answer(json.dumps({**made.to_json(), "saving": saving.to_json()}, indent=1))
    else:
        views.plan(made, saving)


def fit(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of a trial, all on this machine.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of a GPU, or all ranks on a CPU: use no more than this, such as 40GiB. Default: all of a GPU; what"
            " the machine has free.",
            show_default=False,
        ),
    ] = None,
    headroom: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of it that stays free.")] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Find the largest batch.max_rank_seconds that fits this machine, by trying.

    Each budget is tried in processes of its own: some training steps on the micro-batches that take most memory (the
    longest utterances, most utterances, most sound, most attention, most text) and on the most usual one, and the
    largest batches of evaluations that the ranks compute. Changes nothing: the last line is for the recipe. What a rank
    takes at ZeRO 1 to 3 depends on their number: --ranks.

    Exit codes: 0 found, 77 not even the longest utterance fits, or the evaluation does not.
    """
    from launcher import fit as fits
    from launcher import recipe_file, ui

    memory_bytes = None if memory is None else number_of_bytes("--memory", memory)
    with recipe_file.resolved(recipe, overrides) as (value, path):
        found = fits.fit(value, path, ranks, memory_bytes, headroom, ui.say)
    if as_json:
        ui.answer(json.dumps(found.to_json(), indent=1))
    else:
        fits.show(found, value, headroom)
