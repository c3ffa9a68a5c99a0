"""A new run's directory: what was asked, what it came to, and what it was made from. Whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher import lock, ownership, redact, rundir, sealing
from launcher.errors import DataError, UsageError
from launcher.plan import Plan
from launcher.rundir import Run


def create(run: Run, recipe: Path, resolved: Path, made: Plan, facts: Mapping[str, Any]) -> None:
    """
    Args:
        recipe: the file that the user named, kept as it is.
        resolved: the same with every value filled in and overrides applied.

    Raises:
        UsageError: something is there already.
        StorageError: the place cannot be written.
    """
    ownership.only_we_write()
    with rundir.storage_errors(run.root):
        run.root.parent.mkdir(parents=True, exist_ok=True)
        staged = Run(tempfile.mkdtemp(prefix=f".{run.root.name}.", dir=run.root.parent))  # 0700, like the run
    try:
        for folder in (staged.checkpoints, staged.attempts_dir, staged.stop_request.parent):
            folder.mkdir()
        rundir.write_bytes(staged.recipe, recipe.read_bytes())
        rundir.write_bytes(staged.resolved, resolved.read_bytes())
        rundir.write_json(staged.plan, made.to_json())
        if made.deepspeed is not None:
            rundir.write_json(staged.deepspeed, made.deepspeed)
        rundir.write_json(staged.provenance, provenance(facts) | {"resolved": sealing.digest_file(staged.resolved)})
        try:
            os.rename(staged.root, run.root)
        except OSError as error:  # another launch was quicker
            raise in_the_way(run) from error
        rundir.sync_dir(run.root.parent)
    finally:
        shutil.rmtree(staged.root, ignore_errors=True)


def is_of(run: Run, resolved: Path) -> bool:
    """Whether there is a run, made from this recipe."""
    return run.exists() and run.resolved.read_bytes() == resolved.read_bytes()


def in_the_way(run: Run) -> UsageError:
    """Why no new run can be made here."""
    if lock.holder(run) is not None:
        return lock.in_use(run)
    if run.exists():
        hint = f"go on with `speechctl resume {run.root}`, or start another run with --set name=… or --set run_dir=…"
    else:
        hint = "it is no run; move it away, or start the run elsewhere with --set name=… or --set run_dir=…"
    return UsageError(f"{run.root} exists already", hint=hint)


def provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What this run was made from: code, packages, packs, command."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    names = ("speechctl", "torch", "torchaudio", "deepspeed", "accelerate", "transformers", "mosaicml-streaming")
    return {
        "id": secrets.token_hex(16),
        "command": [redact.current.text(word) for word in sys.argv],
        "code": {"revision": git("rev-parse", "HEAD") or None, "changed": git("status", "--porcelain").splitlines()},
        "packages": {n: metadata.version(n) for n in names},
        "python": sys.version.split()[0],
        "packs": facts["packs"],
        "host": os.uname().nodename,
        "created": time.time(),
    }


def refuse_edited(run: Run) -> None:
    """
    Raises:
        UsageError: resolved.yaml is not what the run was launched with; half a run would be of another recipe.
        DataError: nothing says which run this is, and every checkpoint would be taken for one of another run.
    """
    known = rundir.read_json(run.provenance) or {}
    if "id" not in known and run.sealed_steps():
        raise DataError(
            f"{run.provenance} {'has no id' if known else 'is missing'}, and without it no checkpoint is known to be of"
            " this run",
            hint="restore it from a copy; the checkpoints are as they were",
        )
    recorded = known.get("resolved")
    # One from before is that of a resume which was killed while it wrote another.
    if recorded is not None and sealing.digest_file(run.resolved) not in (recorded, *known.get("resolved_before", [])):
        raise UsageError(
            f"{run.resolved} was changed after the run was launched",
            hint="restore it; for other values launch another run, with --set run_dir=…",
        )
