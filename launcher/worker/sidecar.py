"""Evaluation beside training: rank 0 has a process evaluate sealed checkpoints, one at a time, while training goes on.

Nothing that becomes of that process reaches training: an exception, a hang, a lack of memory is an outcome like a WER.
It computes on what no rank trains on, the kernel takes it first where memory runs out, and it dies with rank 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from launcher import marks, redact, rundir, sealed, sealing
from launcher.errors import DataError, SpeechctlError
from launcher.recipe import Evaluate
from launcher.recipe_launch import Deadlines
from launcher.rundir import Attempt

OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SPEECHCTL_GPUS", "ACCELERATE_USE_DEEPSPEED"),
)
"""What would make a process that inherits it take itself for a rank."""


@dataclass(frozen=True)
class Outcome:
    """What came of the evaluation of one checkpoint: a result, or why there is none."""

    step: int
    result: dict[str, Any] | None
    error: str = ""


@dataclass
class _Work:
    """One evaluation under way."""

    step: int
    lease: ExitStack
    process: subprocess.Popen[bytes]
    slots: marks.Slots
    log_start: int
    seen: int = 0
    """Marks that it had made when we looked last."""
    moved: float = field(default_factory=time.monotonic)
    """When that number had changed."""


class Sidecar:
    """Rank 0's. One evaluation is under way, and one may wait; a newer one takes the place of that which waits.

    No method raises for anything that has to do with the evaluation. Checkpoints are leased from `give` until their
    outcome was taken.
    """

    COMMAND = (sys.executable, "-m", "launcher.worker", "sidecar")

    def __init__(self, attempt: Attempt, options: Evaluate, deadlines: Deadlines) -> None:
        self.attempt = attempt
        self.device = options.sidecar_device
        self.deadlines = {"start": deadlines.start, "evaluate": deadlines.step}
        self.log = attempt.evaluation_log
        self.work: _Work | None = None
        self.queued: tuple[int, ExitStack] | None = None
        self.outcomes: deque[Outcome] = deque()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, waits, or has yet to be taken."""
        return self.work is None and self.queued is None and not self.outcomes

    def give(self, step: int) -> None:
        """Have the sealed checkpoint of `step` evaluated. Its result may be there from before a restart."""
        folder, lease = self.attempt.run.checkpoint(step), ExitStack()
        try:
            lease.enter_context(sealed.lease(folder))
            if (result := self._published(step)) is not None:
                self.outcomes.append(Outcome(step, result))
                lease.close()
                return
        except (SpeechctlError, OSError) as error:
            self.outcomes.append(Outcome(step, None, f"its checkpoint cannot be read: {error}"))
            lease.close()
            return
        if self.queued is not None:
            older, its = self.queued
            its.close()
            self.outcomes.append(Outcome(older, None, f"the one before it was not done when that of step {step} came"))
        self.queued = step, lease
        self._begin()

    def _published(self, step: int) -> dict[str, Any] | None:
        """The result for this very checkpoint, where there is one."""
        digest = sealing.manifest_of(self.attempt.run.checkpoint(step))["digest"]
        try:
            result = rundir.read_json(self.attempt.run.evaluation(step))
        except DataError:
            return None
        return result if result is not None and result.get("checkpoint") == digest else None

    def _begin(self) -> None:
        if self.work is not None or self.queued is None:
            return
        (step, lease), self.queued = self.queued, None
        slots = marks.Slots(1)
        env = {k: v for k, v in os.environ.items() if k not in OF_A_RANK and not k.startswith("TORCHELASTIC_")}
        env |= {marks.VARIABLE: slots.path, "CUDA_VISIBLE_DEVICES": "" if self.device == "cpu" else str(self.device)}
        command = [*self.COMMAND, str(self.attempt.root), "--step", str(step)]
        try:
            with self.log.open("ab") as log:
                start = log.tell()
                # In our session, which the node ends as a whole.
                process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            os.close(slots.fd)
            lease.close()
            self.outcomes.append(Outcome(step, None, f"its process could not be started: {error}"))
            return
        self.work = _Work(step, lease, process, slots, start)

    def look(self) -> Outcome | None:
        """What has ended since, each once. Also where the deadline of one that makes no progress is held."""
        if (work := self.work) is not None:
            code, now = work.process.poll(), work.slots.read(0)
            if now.count != work.seen:
                work.seen, work.moved = now.count, time.monotonic()
            silent_s = time.monotonic() - work.moved
            if code is not None:
                self._end(work, self._outcome(work, code))
            elif silent_s > self.deadlines.get(now.phase, self.deadlines["start"]):
                work.process.kill()
                work.process.wait()
                where = f"at {now.at}" if now.at else "at its first lines"
                self._end(work, Outcome(work.step, None, f"it made no progress for {silent_s:.0f} s, {where}; killed"))
        return self.outcomes.popleft() if self.outcomes else None

    def _outcome(self, work: _Work, code: int) -> Outcome:
        try:
            if code == 0 and (result := self._published(work.step)) is not None:
                return Outcome(work.step, result)
        except (SpeechctlError, OSError) as error:
            return Outcome(work.step, None, f"its result cannot be read: {error}")
        if code == -signal.SIGKILL:
            return Outcome(work.step, None, "it was killed by SIGKILL, as the kernel does where memory runs out")
        if code < 0:
            return Outcome(work.step, None, f"it was ended by {signal.Signals(-code).name}")
        return Outcome(work.step, None, f"it ended with exit code {code}{self._last_words(work)}")

    def _last_words(self, work: _Work) -> str:
        """The last line of its log, which of a traceback is the exception."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(work.log_start, file.seek(0, os.SEEK_END) - 4096))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
        return f": {redact.current.text(said.strip())[:300]}" if said else ""

    def _end(self, work: _Work, outcome: Outcome) -> None:
        os.close(work.slots.fd)
        work.lease.close()
        self.work = None
        self.outcomes.append(outcome)
        self._begin()

    def close(self) -> None:
        """End what is under way. What was not taken is evaluated after the next start."""
        if self.queued is not None:
            self.queued[1].close()
            self.queued = None
        if (work := self.work) is not None:
            work.process.kill()
            work.process.wait()
            work.lease.close()
            os.close(work.slots.fd)
            self.work = None
