"""Saves without torch: real processes that commit files of known content, for tests that do harm to them.

    python -m tests.saving

Reads one job a line from stdin, and forks a process for each: a fork is quick where starting an interpreter is not.
That process becomes rank 0, forks the other ranks, and says what came of each save in the job's report.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launcher import lock, rundir, sealed
from launcher.committer import Committer, File, Outcome, Sink
from launcher.errors import DataError, SpeechctlError
from launcher.retention import Rules
from launcher.rundir import Attempt, Run

T = TypeVar("T")


# What is saved --------------------------------------------------------------------------------------------------------


def content(step: int, rank: int, size: int = 20_000) -> dict[str, bytes]:
    """The files of one rank, by name; different at every step and rank."""
    dice = random.Random(1000 * step + rank)
    return {
        f"deepspeed/rank-{rank}.pt": dice.randbytes(size),
        f"deepspeed/deep/er/rank-{rank}.pt": dice.randbytes(3),
        f"rank-{rank:05d}.rng.json": b"",
    }


def files(step: int, rank: int, size: int = 20_000, fails: bool = False) -> list[File]:
    def write(data: bytes, sink: Sink) -> None:
        if fails:
            raise ValueError("no such thing")
        for start in range(0, len(data), 8000):
            sink.write(data[start : start + 8000])

    return [
        File(name, len(data), lambda sink, data=data: write(data, sink))  # type: ignore[misc]
        for name, data in content(step, rank, size).items()
    ]


def new_run(root: Path) -> Run:
    run = Run(root)
    run.checkpoints.mkdir(parents=True)
    rundir.write_json(run.provenance, {"id": root.name})
    run.new_attempt()
    return run


def alone(run: Run, *steps: int, rules: Rules | None = None) -> Committer:
    """Commits these steps in this process, as the only rank of the newest attempt; each must be sealed."""
    committer = Committer(run.attempts()[-1], Alone(), rules or Rules(last=9))
    for step in steps:
        outcome = committer.settle(committer.save(step, files(step, 0), {"world_size": 1}), Alone())
        assert not outcome.error, outcome
    return committer


def good(run: Run, size: int = 20_000) -> list[int]:
    """Steps that a resume would accept. Fails where one of them holds anything but what was saved."""
    found = []
    for step in run.sealed_steps():
        try:
            manifest = sealed.verify(run, step)
        except DataError:
            continue
        wanted = {n: d for rank in range(manifest["world_size"]) for n, d in content(step, rank, size).items()}
        assert sorted(manifest["files"]) == sorted(wanted), f"step {step} holds other files"
        for name, data in wanted.items():
            assert (run.checkpoint(step) / name).read_bytes() == data, f"{name} of step {step} is another"
        found.append(step)
    return found


# Ranks ----------------------------------------------------------------------------------------------------------------


class Alone:
    rank = 0
    world_size = 1

    def gather(self, value: T) -> list[T]:
        return [value]


class Wired:
    """Ranks over socket pairs, of which rank 0 has all the ends. What JSON makes of a value is what all get."""

    def __init__(self, rank: int, ends: list[socket.socket], timeout_s: float) -> None:
        self.rank = rank
        self.world_size = len(ends) + 1
        self.mine = ends if rank == 0 else [ends[rank - 1]]
        for end in self.mine:
            end.settimeout(timeout_s)
        self.streams = [end.makefile("rwb") for end in self.mine]

    def gather(self, value: T) -> list[T]:
        if self.rank != 0:
            self._say(self.streams[0], value)
            return list(self._hear(self.streams[0]))
        values = [value, *[self._hear(stream) for stream in self.streams]]
        for stream in self.streams:
            self._say(stream, values)
        return [json.loads(json.dumps(v)) for v in values]

    def _say(self, stream: Any, value: Any) -> None:
        stream.write(json.dumps(value).encode() + b"\n")
        stream.flush()

    def _hear(self, stream: Any) -> Any:
        if not (line := stream.readline()):
            raise ConnectionError("a rank is gone")
        return json.loads(line)


# Jobs -----------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    run: str
    attempt: int
    steps: list[int]
    report: str
    world_size: int = 1
    size: int = 20_000
    timeout_s: float = 20.0
    keep_last: int = 2
    waits: bool = False
    """Stop (SIGSTOP) before the first save."""
    stop_before_rename: bool = False
    """Stop before the rename that would seal the first step."""
    fails: list[int] = field(default_factory=list)
    """A rank, and a step at which its files cannot be written."""
    mute: list[int] = field(default_factory=list)
    """A rank, and a step at which it stops (SIGSTOP) instead of voting."""
    fence: bool = False
    lock: bool = False
    """Take the run's lock and make a new attempt first, as a launcher does."""


@dataclass
class Report:
    """What rank 0 said of each save, and of its end."""

    outcomes: list[Outcome] = field(default_factory=list)
    ended: str = ""
    whole: bool = False

    @staticmethod
    def read(path: Path) -> Report:
        report = Report()
        for row in rundir.read_lines(path) if path.exists() else []:
            if "outcome" in row:
                report.outcomes.append(Outcome(**row["outcome"]))
            else:
                report.ended, report.whole = row["ended"], True
        return report


def work(job: Job) -> None:
    run = Run(job.run)
    fd = os.open(job.report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at = 0

    def say(row: dict[str, Any]) -> None:
        nonlocal at
        if rank == 0:  # not by `write`, which may be made to fail
            at += os.pwrite(fd, json.dumps(row).encode() + b"\n", at)

    if job.waits:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.02)  # whoever traces us has its hands full yet
    pairs = [socket.socketpair() for _ in range(job.world_size - 1)]
    rank = next((r for r in range(1, job.world_size) if os.fork() == 0), 0)
    peers = Wired(rank, [pair[rank != 0] for pair in pairs], job.timeout_s)
    for pair in pairs:
        pair[rank == 0].close()
    ended = ""
    try:
        if job.lock:
            with lock.RunLock(run, f"saver {os.getpid()}"):
                _save(job, run.new_attempt(), peers, say)
        else:
            _save(job, Attempt(run.attempts_dir / f"{job.attempt:04d}"), peers, say)
    except SpeechctlError as error:
        ended = f"{type(error).__name__}: {error.message}"
    say({"ended": ended})
    if rank == 0:
        for _ in pairs:
            with suppress(ChildProcessError):
                os.wait()


def _save(job: Job, attempt: Attempt, peers: Wired, say: Callable[[dict[str, Any]], None]) -> None:
    committer = Committer(attempt, peers, Rules(last=job.keep_last))
    if job.fence and peers.rank == 0:
        committer.fence()
    rename = os.rename

    def stopping_rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-"):
            os.rename = rename
            os.kill(os.getpid(), signal.SIGSTOP)
        rename(source, target)

    if job.stop_before_rename:
        os.rename = stopping_rename  # type: ignore[assignment]
    for step in job.steps:
        here = [peers.rank, step]
        if job.mute == here:
            os.kill(os.getpid(), signal.SIGSTOP)
        mine = committer.save(
            step, files(step, peers.rank, job.size, job.fails == here), {"world_size": job.world_size}
        )
        say({"outcome": asdict(committer.settle(mine, peers))})


def serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            try:
                work(Job(**order))
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)


class Server:
    """Where jobs are started."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.saving"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, job: Job) -> int:
        """Returns its pid."""
        return self._ask(asdict(job))

    def wait(self, pid: int) -> int:
        """Its exit code, negative where a signal ended it."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def server() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.close()


def stopped(pid: int, within_s: float = 20) -> bool:
    """Waits until the process has stopped; False where it ended first."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        state = state_of(pid)
        if state in "Tt":
            return True
        if state in "ZX":
            return False
        time.sleep(0.002)
    raise AssertionError(f"{pid} did not stop")


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


# strace ---------------------------------------------------------------------------------------------------------------


@contextmanager
def traced(pid: int, *options: str) -> Iterator[None]:
    """strace on a process that stops itself, which then goes on."""
    assert stopped(pid)
    command = ["strace", "-f", "-q", "-p", str(pid), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tracer:
        deadline = time.monotonic() + 20
        while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, "strace does not trace here"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(pid, signal.SIGCONT)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                if state_of(pid) in "ZX":
                    tracer.wait(20)
                else:
                    tracer.terminate()


if __name__ == "__main__":
    serve()
