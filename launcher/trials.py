"""Trials of `speechctl fit`: real steps under one budget and real batches of the run's evaluations, in processes of
their own on this machine, watched and ended.

An out of memory ends the processes, and so leaves nothing behind. They have no session of ours, are killed when this
process dies, and say what they find in files of a directory that is gone with the trial.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from launcher import account, environment, memory, rundir
from launcher.errors import AlreadyTold, ExitCode, InfrastructureError, SpeechctlError, in_bytes
from launcher.node import WORKER, die_with_parent
from launcher.recipe import Recipe

LOOK_EVERY_S = 0.05

AFTER_DEATH_S = 5.0
"""How long the ranks beside one that failed may take to say what they saw: the first to end may only have lost it."""


@dataclass(frozen=True)
class Trial:
    """What came of one budget. Bytes are those of the rank that took most."""

    max_rank_seconds: float
    fits: bool
    why: str
    """It does not fit: how that showed."""
    device: str
    limit_bytes: int
    """What a rank may use."""
    peak_bytes: int
    """At least that, where it does not fit. Of a GPU with what torch keeps for later, of a CPU the resident set."""
    needed_bytes: int
    """Without what torch keeps for later."""
    host_peak_bytes: int
    padded_s_per_s: float | None
    """Of one rank, in steps of the modal shape."""
    lasted_s: float
    shapes: list[dict[str, Any]] = field(default_factory=list)
    """Rank 0's, as they were tried: `shape`, `utterances`, `seconds`, `chars` and what each took."""
    ran_out_on: dict[str, Any] | None = None
    """The shape on which it does not fit; None also where that was before the first."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def hardest(self) -> dict[str, Any] | None:
        """The shape that took most; where it does not fit, the one that was too much."""
        if not self.fits:
            return self.ran_out_on
        return max(self.shapes, key=lambda s: s.get("allocated_bytes", s["peak_bytes"]))

    @property
    def is_for_evaluation(self) -> bool:
        """It does not fit, and what does not is an evaluation of the run."""
        return self.ran_out_on is not None and self.ran_out_on["shape"].startswith("evaluation")


class Trials:
    """One recipe's trials on this machine.

    Args:
        path: the recipe, as a file that the worker can read.
        deepspeed: its configuration; the accumulation in it does not count.
        memory_bytes: what all ranks may use of one device, on a CPU of the machine; None: of a GPU all, of a CPU what
            is free.
        headroom: share of it that is to stay free.
    """

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        deepspeed: dict[str, Any] | None,
        ranks: int,
        memory_bytes: int | None,
        headroom: float,
    ) -> None:
        self.recipe = recipe
        self.path = path
        self.deepspeed = deepspeed
        self.ranks = ranks
        self.memory_bytes = memory_bytes
        self.headroom = headroom
        self.variables = environment.base_variables(ranks, recipe.launch.device)
        self.on_gpu = self.variables["SPEECHCTL_GPUS"] != "0"
        """Torch itself sees to the limit there; on a CPU we do."""
        self.host_limit = 0
        if not self.on_gpu:
            self.host_limit = int((memory_bytes or memory.available(os.getpid())) * (1 - headroom)) // ranks

    def run(self, budget_s: float) -> Trial:
        """
        Raises:
            AlreadyTold: a rank failed in a way that it knows.
            InfrastructureError: it was killed, and not for memory; or it does not get on.
            SpeechctlError: it failed in a way that it does not know.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="speechctl-fit-") as name:
            folder = Path(name)
            rundir.write_json(folder / "deepspeed.json", self.deepspeed)
            processes: list[subprocess.Popen[bytes]] = []
            try:
                for rank in range(self.ranks):
                    processes.append(self._start(folder, rank, budget_s))
                watched = Watched(processes, folder, self.host_limit, self.recipe.launch.deadlines.start)
                watched.to_the_end()
            finally:
                for process in processes:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            return self._judged(budget_s, folder, watched, time.monotonic() - began)

    def _start(self, folder: Path, rank: int, budget_s: float) -> subprocess.Popen[bytes]:
        words = [str(self.path), str(folder), f"--budget={budget_s!r}", f"--headroom={self.headroom!r}"]
        if self.memory_bytes is not None:
            words.append(f"--memory={self.memory_bytes}")
        env = {**os.environ, **self.variables, "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
        # DeepSpeed asks for them, and so nobody takes this for MPI; the ranks meet in a file.
        env |= {"LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", WORKER, "fit", *words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours
                preexec_fn=die_with_parent,
            )

    def _judged(self, budget_s: float, folder: Path, watched: Watched, lasted_s: float) -> Trial:
        said = [rundir.read_lines(folder / f"rank-{rank}.jsonl") for rank in range(self.ranks)]
        lines = [line for of_rank in said for line in of_rank]
        refused = next((line["out_of_memory"] for line in lines if "out_of_memory" in line), "")
        measured = [line for line in lines if "peak_bytes" in line]
        host_peak = max([line["host_peak_bytes"] for line in measured] + list(watched.peaks.values()), default=0)
        peak = max([line["peak_bytes"] for line in measured], default=0) if self.on_gpu else host_peak
        over = bool(self.host_limit) and host_peak > self.host_limit
        why = refused or (f"takes more than {in_bytes(self.host_limit)}" if over else "")
        if not why and -signal.SIGKILL in watched.codes:
            why = "ended by SIGKILL, taken for the kernel's, for want of memory"
            if watched.kernel_killed:
                why = "ended by the kernel because memory ran out"
        if not why and any(watched.codes):
            self._refuse(folder, watched.codes)
        told = {name: value for line in said[0] if "device" in line for name, value in line.items()}
        timed = [line for line in said[0] if "step_s" in line]
        return Trial(
            max_rank_seconds=budget_s,
            fits=not why,
            why=why,
            device=told.get("device", "a GPU" if self.on_gpu else "cpu"),
            limit_bytes=self.host_limit or told.get("limit_bytes", 0),
            peak_bytes=peak,
            needed_bytes=max([line.get("allocated_bytes", peak) for line in measured], default=peak),
            host_peak_bytes=host_peak,
            padded_s_per_s=None if why else timed[-1]["padded_s"] / timed[-1]["step_s"],
            lasted_s=round(lasted_s, 2),
            shapes=_by_shape(said[0]),
            ran_out_on=_ran_out_on(said, self.host_limit) if why else None,
        )

    def _refuse(self, folder: Path, codes: Sequence[int]) -> NoReturn:
        """A rank failed, and not for want of memory: what it said, and an error."""
        failed = [rank for rank, code in enumerate(codes) if code]
        known = [rank for rank in failed if codes[rank] in set(ExitCode) - {ExitCode.TRAINING_RAISED}]
        rank = (known or failed)[0]  # the others may only have lost it
        said = (folder / f"rank-{rank}.log").read_text(errors="replace").rstrip()
        if codes[rank] < 0:
            raise InfrastructureError(
                f"rank {rank} of a trial was ended by {account.name_of(-codes[rank])}",
                hint="look at what else runs on this machine, then try again",
            )
        if known:
            print(said[max(0, said.rfind("error: ")) :], file=sys.stderr)
            raise AlreadyTold(codes[rank])
        print(said, file=sys.stderr)
        raise SpeechctlError(
            f"rank {rank} of a trial failed in a way that it does not expect; its traceback is above",
            hint="mend what it names if that is on this machine; otherwise it is a bug of speechctl: report it",
        )


def _by_shape(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each shape that a rank began, in that order; the last has no peak where the rank did not come back."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "begins" in line:
            rows.setdefault(line["begins"]["shape"], dict(line["begins"]))
        elif "shape" in line:
            row = rows[line["shape"]]
            row |= {k: max(v, row.get(k, 0)) if k.endswith("_bytes") else v for k, v in line.items()}
    return list(rows.values())


def _ran_out_on(said: Sequence[Sequence[dict[str, Any]]], limit: int) -> dict[str, Any] | None:
    """What the ranks had in hand when memory ran out: a shape that is known to have taken more than the limit, whatever
    began before that was seen; or one that a rank did not come back from; or the first, which is also timed at last."""
    rows = [row for of_rank in said for row in _by_shape(of_rank)]
    over = [row for row in rows if limit and row.get("host_peak_bytes", 0) > limit]
    unfinished = [row for row in rows if "peak_bytes" not in row]
    return next(iter(over + unfinished + rows), None)


class Watched:
    """The ranks of one trial while they are at work.

    Args:
        limit: of each rank's resident set; 0: none.
        patience_s: how long all of them together may say nothing.
    """

    def __init__(
        self, processes: Sequence[subprocess.Popen[bytes]], folder: Path, limit: int, patience_s: float
    ) -> None:
        self.processes = processes
        self.folder = folder
        self.limit = limit
        self.patience_s = patience_s
        self.memory = memory.Watch()
        self.peaks: dict[str, int] = {}
        """The largest resident set of each rank."""
        self.is_over = False
        """Whether a rank takes more than it may."""
        self.codes: list[int] = []
        """How each rank had ended before we ended any; 0 of those that were at work."""
        self.kernel_killed = False

    def to_the_end(self) -> None:
        """Until all ranks have ended, or one has failed or takes too much: the others are then still at work."""
        heard, heard_at, death = 0, time.monotonic(), math.inf
        while True:
            self.codes = [process.poll() or 0 for process in self.processes]
            self._look()
            now = time.monotonic()
            if any(self.codes):
                death = min(death, now)
            running = any(process.returncode is None for process in self.processes)
            if self.is_over or not running or now - death > AFTER_DEATH_S:
                return
            size = sum(path.stat().st_size for path in self.folder.glob("rank-*"))
            if size != heard:
                heard, heard_at = size, now
            if death == math.inf and now - heard_at > self.patience_s:
                raise InfrastructureError(
                    f"a trial has not got on for launch.deadlines.start, {self.patience_s:g} s",
                    hint="look at what else runs here; a model that takes so long to load needs a longer one",
                )
            time.sleep(LOOK_EVERY_S)

    def _look(self) -> None:
        seen = self.memory.look({str(r): p.pid for r, p in enumerate(self.processes)})
        for rank, peak in seen["peak_rss"].items():
            self.peaks[rank] = max(peak, self.peaks.get(rank, 0))
        self.kernel_killed = seen["oom_kills"] > 0 or seen["oom_kills_on_machine"] > 0
        self.is_over = bool(self.limit) and max(self.peaks.values(), default=0) > self.limit
