"""What a checkpoint of a training run holds, when its state is taken, and how a run comes back from it.

`launcher.committer` writes and seals it, or does not. There is no `latest` file: the newest is the one with the
highest step that verifies. Nothing is unpickled before all ranks have checked it against its manifest.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher import rundir, sealed
from launcher.committer import Committer, File, Outcome
from launcher.errors import DataError, NotFoundError, StorageError, UsageError
from launcher.marks import mark
from launcher.recipe import Checkpoint as CheckpointOptions
from launcher.retention import Rules
from launcher.rundir import Attempt, Run
from launcher.worker import reshard
from launcher.worker.cadence import Patience
from launcher.worker.engine import Engine
from launcher.worker.host_memory import HostMemory
from launcher.worker.ranks import TIMEOUT_S, Ranks
from launcher.worker.sampler import Cursor


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
    left_out: int = 0
    """Steps whose loss or gradient was not finite."""
    left_out_in_row: int = 0
    """Those just before `step`, as far as they count."""
    patience: Patience = field(default_factory=Patience)
    """Of early stopping."""
    awaiting: list[int] = field(default_factory=list)
    """Steps whose evaluation beside training was asked for and has not come in yet."""

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": self.cursor.to_json(),
            "evaluated_step": self.evaluated_step,
            "evaluation_due": self.evaluation_due,
            "best_wer": None if math.isinf(self.best_wer) else self.best_wer,
            "best_step": self.best_step,
            "left_out": self.left_out,
            "left_out_in_row": self.left_out_in_row,
            "lowest_wer": None if math.isinf(self.patience.lowest) else self.patience.lowest,
            "in_vain": self.patience.in_vain,
            "awaiting": list(self.awaiting),
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Progress:
        value = dict(value)
        best, lowest = (math.inf if w is None else w for w in (value["best_wer"], value.pop("lowest_wer", None)))
        patience = Patience(lowest, value.pop("in_vain", 0))
        cursor = Cursor.from_json(value["cursor"])
        return Progress(**{**value, "cursor": cursor, "best_wer": best, "patience": patience})


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
            "backbone": "the model changed, or what of it learns or is averaged; start a new run for another model",
            "packs": "the packs changed; start a new run on other data",
            "evaluation": "the packs to evaluate on changed, and its WER cannot be compared; start a new run on others",
            "order": "the seed, data, augment, or what batch says of lengths changed, or another version of speechctl"
            " began this run; go on with what it was begun with, or start a new run",
        }
        for name, hint in hints.items():
            mine, its = getattr(self, name), manifest["identity"][name]
            if mine != its:
                raise UsageError(f"{folder} was trained with {name} {its}; this attempt has {mine}", hint=hint)


class Checkpoints:
    """Saves and restores one run's checkpoints, as one of its ranks.

    A save begins with a copy of the state, on all ranks; the committer then works with the copy, in a thread while
    training goes on, and `settle` has the ranks agree on what came of it. One save is in flight at a time.

    Args:
        on_sealed: called on rank 0 when a checkpoint is durable; in that thread.
        first: what must be durable before a checkpoint is; in that thread, on all ranks.
    """

    def __init__(
        self,
        attempt: Attempt,
        engine: Engine,
        ranks: Ranks,
        identity: Identity,
        options: CheckpointOptions,
        vote_timeout_s: float = TIMEOUT_S,
        on_sealed: Callable[[Outcome], object] = lambda _: None,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        self.run: Run = attempt.run
        self.engine = engine
        self.ranks = ranks
        self.identity = identity
        self.asynchronous = options.asynchronous
        self.vote_timeout_s = vote_timeout_s
        rules = Rules(options.keep_last, options.keep_best, options.keep_every_steps)
        self.committer = Committer(attempt, ranks.apart(vote_timeout_s), rules, on_sealed, first)
        self.memory = HostMemory(copies=self.asynchronous)
        self.outcome = Outcome(-1)
        self.fenced: list[str] = []
        """What was wrong with checkpoints that were put aside by `fence`."""
        self.lost = 0
        """Steps that had been sealed and are to be done again, as `restore` found it."""
        self.thread: threading.Thread | None = None
        self.copy_s = 0.0
        """How long training waited for the last copy, where saves are asynchronous."""

    def fence(self) -> None:
        """
        Raises:
            StorageError: what an older attempt left cannot be taken away.
        """
        problems: list[str] = []
        if self.ranks.rank == 0:
            with rundir.storage_errors(self.run.checkpoints):
                problems = self.committer.fence()
        self.fenced = self.ranks.gather(problems)[0]

    def warm(self) -> None:
        """Take the memory for the copies, by all ranks. Where that is left to the first save, training waits for it
        five times as long as for the copy (measured on a CPU)."""
        if self.asynchronous:
            mark("memory")
            with suppress(Exception):  # every save tries again, and its failure is one of all ranks together
                self.engine.snapshot(self.memory)

    # Saving ----------------------------------------------------------------------------------------------------------

    def begin(self, progress: Progress) -> None:
        """Save this moment, by all ranks; the one before was settled. Training may change the state when this returns.

        Asynchronous: only the copy is waited for. Otherwise everything is done when this returns.
        """
        assert self.thread is None
        self.outcome = Outcome(progress.step, f"rank {self.ranks.rank}: the save did not come to its end")
        began = time.monotonic()
        mark("copy")
        files: list[File] | Exception
        try:
            state = json.dumps(rng_state()).encode()
            mine = File(f"rank-{self.ranks.rank:05d}.rng.json", len(state), lambda sink: sink.write(state))
            files = [*self.engine.snapshot(self.memory), mine]
        except Exception as error:  # no memory for the copy, or whatever it was: the others must hear of it
            files = error
        facts = {"identity": vars(self.identity), "progress": progress.to_json()}
        save = partial(self.committer.save, progress.step, files, facts, progress.best_step)
        if not self.asynchronous:
            self.outcome = save(said=mark)
            return

        def work() -> None:
            self.outcome = save()

        self.copy_s = time.monotonic() - began
        self.thread = threading.Thread(target=work, name="committer", daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        """Whether a save has ended on this rank and waits to be settled."""
        return self.thread is not None and not self.thread.is_alive()

    def settle(self) -> Outcome:
        """What became of the save that was begun, the same on all ranks; waits for it.

        Raises:
            StorageError: on all ranks, when this was the third failure in a row.
            InfrastructureError: on all ranks, when a newer attempt has taken over the run.
        """
        if self.thread is not None:
            mark("wait")
            self.thread.join()
            self.thread = None
        mark("settle")
        outcome = self.committer.settle(self.outcome, self.ranks)
        if outcome.torn:
            self.committer.peers = self.ranks.apart(self.vote_timeout_s)
        return outcome

    # Restoring -------------------------------------------------------------------------------------------------------

    def restore(self, fresh: bool) -> tuple[Progress | None, list[str]]:
        """Bring engine and RNG to the newest checkpoint that verifies on all ranks.

        Returns:
            where training stands (None where nothing was ever sealed), and what had to be put aside on the way, by
            `fence` too.

        Raises:
            DataError: this run has sealed checkpoints before and none of them verifies now (unless `fresh`).
            StorageError: one cannot be read at all, which is no reason to put it aside; or it cannot be put aside.
            UsageError: the checkpoint is of another ZeRO stage, precision, model or data.
        """
        put_aside = list(self.fenced)
        seen = (self.run.sealed_steps()[::-1], sealed.newest_said(self.run), bool(self._put_aside()))
        steps, known, aside = self.ranks.gather(seen)[0]
        self.lost = 0
        if fresh:
            if self.ranks.rank == 0:
                with rundir.storage_errors(self.run.checkpoints):
                    for folder in (*map(self.run.checkpoint, steps), *self._put_aside()):
                        sealed.rename_aside(folder, "before-fresh")
                    if self.run.evaluations.exists():  # steps come again, and are to be judged by their own
                        sealed.rename_aside(self.run.evaluations, "before-fresh")
                rundir.append_line(self.committer.attempt.events, {"event": "fresh", "time": time.time()})
            self.ranks.barrier()
            return None, []
        for step in steps:
            folder = self.run.checkpoint(step)
            share = slice(self.ranks.rank, None, self.ranks.world_size)
            problem = unreadable = ""
            mark("verify")
            reading = ExitStack()
            try:
                reading.enter_context(sealed.lease(folder))
                manifest = sealed.verify(self.run, step, share)
            except (DataError, NotFoundError) as error:
                problem = error.message
            except StorageError as error:
                unreadable = error.message
            except OSError as error:
                unreadable = f"{folder} cannot be read: {error}"
            problems = self.ranks.gather((problem, unreadable))
            if unreadable := next((u for _, u in problems if u), ""):
                raise StorageError(unreadable, hint="mend the file system, then `speechctl resume` again")
            if problem := next((p for p, _ in problems if p), ""):
                put_aside.append(problem)
                reading.close()
                if self.ranks.rank == 0 and folder.exists():
                    with rundir.storage_errors(self.run.checkpoints):
                        sealed.rename_aside(folder, "bad")
                self.ranks.barrier()
                continue
            self.identity.refuse(folder, manifest)
            mark("load")
            if (saved_by := manifest["identity"]["world_size"]) == self.ranks.world_size:
                self.engine.load(folder)
                set_rng_state(json.loads((folder / f"rank-{self.ranks.rank:05d}.rng.json").read_bytes()))
            else:
                reshard.restore(self.engine, self.ranks, self.run, step, saved_by, manifest["digest"])
            self.committer.whole.add(step)
            reading.close()
            self.lost = max(known, *steps) - step
            return Progress.from_json(manifest["progress"]), put_aside
        if steps or known >= 0 or aside:  # a power cut may have taken the event of the seal
            raise DataError(
                f"{self.run.root} has sealed checkpoints before, and none verifies now"
                + "".join(f"\n  {p}" for p in put_aside),
                hint=f"restore one from a copy, or start over with `speechctl resume --fresh {self.run.root}`",
            )
        return None, put_aside

    def _put_aside(self) -> list[Path]:
        return [manifest.parent for manifest in self.run.checkpoints.glob(f".bad-step-*/{rundir.MANIFEST}")]


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
