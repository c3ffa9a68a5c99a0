"""The published evaluations of runs, as values: one of them to look at, or several that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import report, rundir
from launcher.errors import NotFoundError, UsageError
from launcher.rundir import Run


def chosen(run: Run, which: str) -> dict[str, Any]:
    """One evaluation of training.

    Args:
        which: `best`, `last`, or a step.

    Raises:
        NotFoundError: there is none of that step; lists those that there are.
    """
    found = {e["step"]: e for e in report.read(run).evaluations}
    if not found:
        raise NotFoundError(
            f"{run.root} has no evaluation yet",
            hint=f"`speechctl status {run.root}` shows where it stands; `speechctl evaluate {run.root}` makes one",
        )
    best = min(found.values(), key=lambda e: (deciding(e), e["step"]))["step"]
    step = {"best": best, "last": max(found)}.get(which, int(which) if which.isascii() and which.isdigit() else None)
    if step not in found:
        raise NotFoundError(
            f"{run.root} has no evaluation {which}", hint=f"take best, last, or one of: {', '.join(map(str, found))}"
        )
    return found[step]


def at(path: Path) -> dict[str, Any]:
    """The result in one file, such as `speechctl evaluate` writes.

    Raises:
        NotFoundError: there is no such file.
    """
    value: dict[str, Any] | None = rundir.read_json(path)
    if value is None:
        raise NotFoundError(f"{path}: no such file", hint="give a run, or a file of its evaluations/")
    return value


def deciding(result: dict[str, Any]) -> float:
    """The WER by which checkpoints are compared: of all, or of the subset that the recipe names."""
    wer = float(result.get("criterion", result)["wer"])
    return wer if wer == wer else float("inf")


def refuse_mixed(named: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Refuse to put numbers beside each other that are of different words, or of different sound.

    Raises:
        UsageError: says which two differ, and in what.
    """
    (first, one), *others = named
    for name, other in others:
        for key, what in (("normalizer", "normalizer"), ("packs", "utterances (digest of the packs)")):
            if one.get(key) != other.get(key):
                raise UsageError(
                    f"these cannot be compared: they differ in their {what}: {first} has {one.get(key)}, {name} has"
                    f" {other.get(key)}",
                    hint="evaluate both in the same way, or look at each by itself",
                )
