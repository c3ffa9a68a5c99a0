"""Sharded checkpoints: sealed or absent, resumed from the newest that verifies, kept by rule.

The ranks write into `checkpoints/.attempt-N`, vote, and rank 0 seals it as `checkpoints/step-…`: that rename is the
commit point. There is no `latest` file: the newest is the one with the highest step that verifies. Nothing is
unpickled before all ranks have checked it against its manifest.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher import rundir
from launcher.errors import DataError, InfrastructureError, StorageError, UsageError
from launcher.marks import mark
from launcher.rundir import Attempt, Run
from launcher.worker import reshard
from launcher.worker.engine import Engine
from launcher.worker.ranks import Ranks
from launcher.worker.sampler import Cursor

FORMAT = "speechctl.checkpoint/1"


@dataclass
class Progress:
    """Where training stands, as far as it is not in the engine."""

    step: int = 0
    cursor: Cursor = field(default_factory=lambda: Cursor(0, []))
    evaluated_step: int = -1
    """Step of the newest evaluation that was published."""
    evaluation_due: bool = False
    """An evaluation was due at `step` and a stop came first."""
    best_wer: float = math.inf
    best_step: int = -1

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": self.cursor.to_json(),
            "evaluated_step": self.evaluated_step,
            "evaluation_due": self.evaluation_due,
            "best_wer": None if math.isinf(self.best_wer) else self.best_wer,
            "best_step": self.best_step,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Progress:
        best = math.inf if value["best_wer"] is None else value["best_wer"]
        return Progress(**{**value, "cursor": Cursor.from_json(value["cursor"]), "best_wer": best})


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that resumes from it."""

    world_size: int
    zero_stage: str
    precision: str
    backbone: str
    packs: str
    evaluation: str
    order: str

    def refuse(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UsageError where `manifest` is of a run of another shape."""
        hints = {
            "zero_stage": "resume with the ZeRO stage it was trained with; ranks may be more or fewer",
            "precision": "resume in the precision it was trained in",
            "backbone": "the model changed; start a new run for another model",
            "packs": "the packs changed; start a new run on other data",
            "evaluation": "the packs to evaluate on changed, and its WER cannot be compared; start a new run on others",
            "order": "the seed, batch.step_seconds or the limits of data changed; start a new run for other values",
        }
        for name, hint in hints.items():
            mine, its = getattr(self, name), manifest["identity"][name]
            if mine != its:
                raise UsageError(f"{folder} was trained with {name} {its}; this attempt has {mine}", hint=hint)


class Checkpoints:
    """Saves and restores one run's checkpoints, as one of its ranks."""

    def __init__(self, attempt: Attempt, engine: Engine, ranks: Ranks, identity: Identity, keep_last: int) -> None:
        self.run: Run = attempt.run
        self.attempt = attempt
        self.engine = engine
        self.ranks = ranks
        self.identity = identity
        self.keep_last = keep_last
        self.staging = self.run.checkpoints / f".attempt-{attempt.number:04d}"
        self.failed_in_a_row = 0
        self.whole: set[int] = set()
        """Steps that this attempt sealed, or has read and verified."""

    def fence(self) -> None:
        """Take every unfinished checkpoint of an older attempt away: an orphan has nothing left to rename."""
        if self.ranks.rank == 0:
            for leftover in sorted(self.run.checkpoints.glob(".attempt-*")):
                _remove(leftover)
            for torn in self.run.checkpoints.glob("step-*"):
                if not (torn / rundir.MANIFEST).is_file():  # not ours to seal, and in the way of the one that will be
                    _free_name(torn.with_name(f".bad-{torn.name}"), torn)
            for leftover in self.run.checkpoints.glob(".trash-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.ranks.barrier()

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> str | None:
        """Seal a checkpoint of this moment, by all ranks.

        Returns:
            None when it is sealed; otherwise why not, the same on every rank. Nothing of it is left then, and
            training may go on.

        Raises:
            StorageError: on all ranks, when this was the third failure in a row.
            InfrastructureError: on all ranks, when a newer attempt has taken over the run.
        """
        error = self._stage() or self._commit(progress)
        if error is None:
            self.failed_in_a_row = 0
            self.whole.add(progress.step)
            return None
        self.failed_in_a_row += 1
        if self.ranks.rank == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self.failed_in_a_row == 3:
            raise StorageError(
                f"three checkpoints in a row could not be sealed; the last: {error}",
                hint="make room or mend the file system, then `speechctl resume`; sealed checkpoints are untouched",
            )
        return error

    def _stage(self) -> str | None:
        """Every rank writes and hashes its share; the vote's result."""
        error: str | None = None
        if self.ranks.rank == 0:
            try:
                with rundir.storage_errors(self.staging):
                    shutil.rmtree(self.staging, ignore_errors=True)
                    self.staging.mkdir()
            except StorageError as problem:
                error = problem.message
        self._refuse_if_superseded()
        if error := self.ranks.gather(error)[0]:
            return error
        self.mine: dict[str, Any] = {}
        mark("write")
        try:
            written = self.engine.save(self.staging)
            state = self.staging / f"rank-{self.ranks.rank:05d}.rng.json"
            rundir.write_json(state, rng_state())
            for path in [*written, state]:
                rundir.sync_file(path)
                self.mine[str(path.relative_to(self.staging))] = rundir.digest_file(path)
        except Exception as problem:  # whatever it was, the other ranks must hear of it at the vote
            error = f"rank {self.ranks.rank}: {problem}"
        mark("vote")
        return next((e for e in self.ranks.gather(error) if e), None)

    def _refuse_if_superseded(self) -> None:
        """End this attempt when a newer one exists.

        Asked after the staging directory was made: the newer attempt makes its own directory first and fences after
        that, so either it is seen here, or its fence still finds what was staged.
        """
        newest = self.run.attempts()[-1].number if self.ranks.rank == 0 else 0
        newest = self.ranks.gather(newest)[0]
        if newest > self.attempt.number:
            if self.ranks.rank == 0:
                shutil.rmtree(self.staging, ignore_errors=True)
            raise InfrastructureError(
                f"attempt {self.attempt.number} is an orphan: attempt {newest} has taken over {self.run.root}",
                hint=f"`speechctl status {self.run.root}` shows the one that counts",
            )

    def _commit(self, progress: Progress) -> str | None:
        mark("commit")
        shares = self.ranks.gather(self.mine)
        error: str | None = None
        if self.ranks.rank == 0:
            files = {name: digest for share in shares for name, digest in share.items()}
            facts = {
                "format": FORMAT,
                "attempt": self.attempt.number,
                "identity": vars(self.identity),
                "progress": progress.to_json(),
            }
            try:
                for path in rundir.files_under(self.staging):
                    name = str(path.relative_to(self.staging))
                    if name not in files or path.stat().st_size != files[name]["bytes"]:
                        raise StorageError(f"{path} is not what its rank wrote", hint="look at the file system")
                rundir.seal(self.staging, self.run.checkpoint(progress.step), facts, files)
            except Exception as problem:  # as above
                error = f"rank 0: {problem}"
        return self.ranks.gather(error)[0]

    def retain(self, progress: Progress) -> None:
        """Rank 0 removes all but the newest `keep_last` and the best; one that does not verify is not counted."""
        if self.ranks.rank == 0:
            kept = 0
            for step in reversed(self.run.sealed_steps()):
                folder = self.run.checkpoint(step)
                if kept >= self.keep_last:
                    if step != progress.best_step:
                        _remove(folder)
                elif step in self.whole or _verifies(folder):
                    self.whole.add(step)
                    kept += 1

    # Restoring -------------------------------------------------------------------------------------------------------

    def restore(self, fresh: bool) -> tuple[Progress | None, list[str]]:
        """Bring engine and RNG to the newest checkpoint that verifies on all ranks.

        Returns:
            where training stands (None where nothing was ever sealed), and what had to be put aside on the way.

        Raises:
            DataError: this run has sealed checkpoints before and none of them verifies now (unless `fresh`).
            StorageError: one cannot be read at all; that is no reason to put it aside.
            UsageError: the checkpoint is of another ZeRO stage, precision, model or data.
        """
        put_aside: list[str] = []
        steps = self.ranks.gather(self.run.sealed_steps()[::-1])[0]
        if fresh:
            if self.ranks.rank == 0:
                for folder in map(self.run.checkpoint, steps):
                    _free_name(folder.with_name(f".before-fresh-{folder.name}"), folder)
            self.ranks.barrier()
            return None, []
        for step in steps:
            folder = self.run.checkpoint(step)
            share = slice(self.ranks.rank, None, self.ranks.world_size)
            problem = unreadable = ""
            mark("verify")
            try:
                manifest = rundir.verify(folder, share)
            except DataError as error:
                problem = error.message
            except OSError as error:
                unreadable = f"{folder} cannot be read: {error}"
            problems = self.ranks.gather((problem, unreadable))
            if unreadable := next((u for _, u in problems if u), ""):
                raise StorageError(unreadable, hint="mend the file system, then `speechctl resume` again")
            if problem := next((p for p, _ in problems if p), ""):
                put_aside.append(problem)
                if self.ranks.rank == 0:
                    _free_name(folder.with_name(f".bad-{folder.name}"), folder)
                self.ranks.barrier()
                continue
            self.identity.refuse(folder, manifest)
            mark("load")
            if (saved_by := manifest["identity"]["world_size"]) == self.ranks.world_size:
                self.engine.load(folder)
                set_rng_state(json.loads((folder / f"rank-{self.ranks.rank:05d}.rng.json").read_bytes()))
            else:
                reshard.restore(self.engine, self.ranks, folder, saved_by, manifest["digest"])
            self.whole.add(step)
            return Progress.from_json(manifest["progress"]), put_aside
        if put_aside or self._has_sealed_before():
            raise DataError(
                f"{self.run.root} has sealed checkpoints before, and none verifies now"
                + "".join(f"\n  {p}" for p in put_aside),
                hint=f"restore one from a copy, or start over with `speechctl resume --fresh {self.run.root}`",
            )
        return None, put_aside

    def _has_sealed_before(self) -> bool:
        return any(e["event"] == "sealed" for a in self.run.attempts() for e in rundir.read_lines(a.events))


def _verifies(folder: Path) -> bool:
    try:
        rundir.verify(folder)
    except (DataError, OSError):
        return False
    return True


def _free_name(target: Path, folder: Path) -> Path:
    """Rename `folder` to `target`, or to `target.1`, … where that is taken."""
    candidate, number = target, 0
    while candidate.exists():
        number += 1
        candidate = target.with_name(f"{target.name}.{number}")
    os.rename(folder, candidate)
    rundir.sync_dir(folder.parent)
    return candidate


def _remove(folder: Path) -> None:
    """Rename away first, so that no reader ever finds half of a checkpoint under its name."""
    shutil.rmtree(_free_name(folder.with_name(f".trash-{folder.name.lstrip('.')}"), folder), ignore_errors=True)


# Random numbers ------------------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """State of every generator that training draws from, as JSON: nothing to unpickle. DeepSpeed saves none of it."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else None,
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
