"""Stands in for a rank: the worker's own door, signals, log and failure records, with this file's training behind.

It goes in step with the other ranks, seals checkpoints that hold nothing, and goes on from the newest.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, quote_plus

import psutil

from launcher import rundir, sealing
from launcher.errors import DataError, ExitCode
from launcher.marks import mark
from launcher.rundir import Attempt
from launcher.worker import __main__ as worker

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SEAL_EVERY = 10


def run(root: Path, stop_flag: list[bool], fresh: bool) -> None:
    attempt = Attempt(root)
    behaviour, _, number = os.environ["STUB_BEHAVIOUR"].partition(" ")
    if behaviour.startswith("leak"):
        leak(behaviour)
    if behaviour in ("raise", "data", "kill"):
        while len(list(attempt.ranks.glob("rank-*.json"))) < WORLD_SIZE and not stop_flag[0]:
            time.sleep(0.01)  # where its peers are still coming up, it is they who are slow
        time.sleep(float(number or 0))
    if behaviour == "raise":
        raise ValueError(f"boom of rank {RANK}")
    if behaviour == "data":
        raise DataError("shard 3 has changed", hint="pack it again")
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "lost":
        while not any(attempt.failures.iterdir()) and not stop_flag[0]:
            time.sleep(0.01)
        raise RuntimeError("Connection closed by peer")
    if behaviour == "child":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        rundir.write_json(root / "child.json", {"pid": child.pid})
    Training(attempt, stop_flag, behaviour, number).go()


def leak(how: str) -> None:
    """Say every secret in every way that a program might, then train on, raise or be killed."""
    names = os.environ["SPEECHCTL_SECRETS"].split(",")
    values = [os.environ[name] for name in names]
    print(dict(os.environ), flush=True)
    print(json.dumps(dict(os.environ)), file=sys.stderr, flush=True)
    subprocess.run(["env"], check=True)
    for value in values:
        for byte in os.fsencode(value):  # a chunk each
            os.write(1, bytes([byte]))
        basic = base64.b64encode(b"me:" + os.fsencode(value)).decode()
        print("\n", value, repr(value), quote(value), quote_plus(value), basic, os.fsencode(value).hex())
    said = [hashlib.sha256(os.fsencode(value)).hexdigest() for value in values]
    print("these are what they were", *said, flush=True)
    if how == "leak-raise":
        raise ValueError(f"401 for https://me:{values[0]}@hub, {values!r}")
    if how == "leak-kill":
        print("the last words", values[0], end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class Training:
    """Fifty steps a second, until asked to stop. What goes wrong at the step after the first seal:

    `exit 7` ends with that code; `stop` stops itself as by SIGSTOP; `feed` waits for data for ever; `hog FILE` takes
    memory without end, in the cgroup of that `cgroup.procs`. `deaf` hears no request to stop, waits for nobody and
    seals nothing; `slow` takes its time to seal. `wire` is told by nobody when a peer's host is gone, and waits for it.
    """

    def __init__(self, attempt: Attempt, stop_flag: list[bool], behaviour: str, number: str) -> None:
        self.attempt, self.run = attempt, attempt.run
        self.stop_flag = stop_flag
        self.asked: str | None = None
        self.behaviour, self.number = behaviour, number
        self.steps = int(number) if behaviour in ("train", "child", "deaf", "leak") and number else 10**9
        self.alone = behaviour == "deaf"
        self.meeting = os.open(attempt.root / ".meeting", os.O_RDWR | os.O_CREAT)
        self.lock = self.come()
        self.step = max(self.run.sealed_steps(), default=0)

    def go(self) -> None:
        self.event("started", step=self.step, world_size=WORLD_SIZE, utterances=12, max_steps=50, left_out={})
        stop = False
        while self.step < self.steps and not stop:
            self.step += 1
            mark("data", "step", self.step)
            if self.step % SEAL_EVERY == 2 and self.step > SEAL_EVERY:
                self.misbehave()
            mark("forward and backward")
            time.sleep(0.02)
            if RANK == 0:
                metrics = {"step": self.step, "epoch": 0, "loss": 1 / self.step, "grad_norm": 1.0}
                more = {"learning_rate": 1e-3, "audio_s": 10.0, "step_s": 0.02, "time": time.time()}
                rundir.append_line(self.attempt.metrics, {**metrics, **more})
            mark("agree")
            stop = not self.alone and self.agree()
            if not self.alone and (stop or self.step % SEAL_EVERY == 0 or self.step == self.steps):
                self.seal()
        if RANK == 0:
            code = ExitCode.STOPPED if stop else ExitCode.FINISHED
            asked = {"asked": rundir.asked_to_stop(self.run) or self.asked} if stop else {}
            rundir.write_json(self.attempt.exit, {"code": code, "step": self.step, "sealed_step": self.step, **asked})

    def misbehave(self) -> None:
        if self.behaviour == "exit":
            os._exit(int(self.number))
        if self.behaviour == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "feed":
            time.sleep(10**6)
        if self.behaviour == "hog":
            Path(self.number).write_text(str(os.getpid()))
            time.sleep(2.5)  # so that whoever looks at this process every second has seen it there
            held = []
            while True:
                held.append(b"\1" * 2**20)

    def agree(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all, which wait for each other here."""
        if RANK == 0 and self.asked is None:
            self.asked = rundir.asked_to_stop(self.run)
        asked = self.stop_flag[0] or self.asked is not None
        record = struct.Struct("qq")
        places = [record.size * (2 * rank + self.step % 2) for rank in range(WORLD_SIZE)]
        os.pwrite(self.meeting, record.pack(self.step, asked), places[RANK])
        while True:
            lost = any(map(self.is_lost, range(WORLD_SIZE)))  # asked first: one that has agreed may end
            while self.behaviour == "wire" and not is_connected():
                time.sleep(0.1)
            said = [os.pread(self.meeting, record.size, place) for place in places]
            rows = [record.unpack(data) if len(data) == record.size else (0, 0) for data in said]
            if all(step == self.step for step, _ in rows):
                return any(asked for _, asked in rows)
            if lost and self.behaviour != "wire":
                raise RuntimeError("Connection closed by peer")
            time.sleep(0.005)

    def come(self) -> int:
        """A lock that peers see for as long as this process lives, wherever they are on this machine."""
        path = self.attempt.root / f".rank-{RANK}"
        fd = os.open(path.with_suffix(".tmp"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        path.with_suffix(".tmp").rename(path)
        return fd

    def is_lost(self, rank: int) -> bool:
        if rank == RANK:
            return False
        try:
            with (self.attempt.root / f".rank-{rank}").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except OSError:  # it lives, or is yet to come
            return False

    def seal(self) -> None:
        mark("begin", "save", self.step)
        if self.behaviour == "slow":
            if self.asked is not None:
                (self.attempt.root / "seals-for-a-stop").touch()
            time.sleep(1.5)
        if RANK == 0 and not self.run.checkpoint(self.step).exists():
            self.run.checkpoints.mkdir(exist_ok=True)
            staged = self.run.checkpoints / f".attempt-{self.attempt.number:04d}"
            staged.mkdir()
            (staged / "weights").write_bytes(b"none")
            sealing.seal(staged, self.run.checkpoint(self.step), {"progress": {"step": self.step}})
            self.event("sealed", step=self.step, blocked_s=0.0)

    def event(self, event: str, **facts: object) -> None:
        if RANK == 0:
            rundir.append_line(self.attempt.events, {"event": event, "time": time.time(), **facts})


def is_connected() -> bool:
    """Whether the cable of this host is in."""
    return psutil.net_if_stats()["eth0"].isup


if __name__ == "__main__":
    module = ModuleType("launcher.worker.train")
    module.__dict__["run"] = run
    sys.modules["launcher.worker.train"] = module
    sys.exit(worker.main(["train", sys.argv[1]]))
