"""The full counts: what `make test` tries a little of, round after round with other seeds.

    python -m tests.torture [--seconds N] [--seed S] [--part NAME ...] [--list] [--fresh]

Without --seconds every part runs once. What was done is kept in .torture/state.json, for one seed and one state of the
code: started again, it goes on where it was, after SIGKILL too, and a part that was cut short runs anew with its seed.
A part runs in a process group of its own, which Ctrl-C ends. Exit code 1 as long as a round of this state has failed.

A part says what it did through `tests.conftest.count`, and draws its numbers from `tests.conftest.seed`. Each round
counts as one trial for every unit that it counted; where none of n trials fails, the rate of failures is below 3/n with
95% confidence.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher import rundir, sealing
from tests.faults.table import TABLE, Cell

ROOT = Path(__file__).parent.parent

GRACE_S = 60
"""For a part that is ended, to take down its hosts."""

LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    """The words behind `python -m`."""
    variables: dict[str, str]
    unit: str
    """What is counted. `tests` are those of pytest that passed; others, what a test said."""
    full: int
    """How many a round has. One that counted fewer has failed: something was skipped."""


def _pytest(*words: str) -> tuple[str, ...]:
    return ("pytest", "-p", "no:cacheprovider", *words)


def _saves(name: str, file: str, word: str, unit: str, full: int, n: int | None = None) -> Part:
    """Of the committer's tests, those of one kind of fault, `n` times."""
    return Part(name, _pytest(f"tests/{file}", "-k", word), {"SPEECHCTL_TEST_COUNT": str(n or full)}, unit, full)


TRAINING = "worker/test_training"

PARTS = (
    Part(
        "injections",
        _pytest("tests/test_injection.py"),
        {"SPEECHCTL_TEST_INJECTIONS": "10000"},
        "strings",
        10_000,
    ),
    Part("injections-ssh", _pytest("tests/cluster/test_injection.py"), {}, "strings", 200),
    Part("prepare", _pytest("tests/test_prepare_command.py"), {}, "hosts", 64),
    Part(
        "faults",
        _pytest("tests/faults", "tests/cluster", "-k", "faults"),
        {"SPEECHCTL_TEST_FAULTS": "all"},
        "tests",
        sum(isinstance(cell, Cell) for row in TABLE.values() for cell in row.values()),
    ),
    _saves("flips", "test_committer.py", "flipped", "flipped bits", 1000),
    _saves("orphans", "test_committer.py", "orphan_woken", "orphans", 200),
    _saves("races", "test_committer.py", "launchers", "races for the lock", 200),
    _saves("kills-in-saves", "test_commit_kills.py", "kill_at_any_call", "kills in a save", 800, 5000),
    _saves("bad-calls", "test_commit_kills.py", "call_that_fails", "failing calls in a save", 50, 90),
    _saves("full-disks", "test_commit_disks.py", "full_disk", "full disks", 50),
    _saves("power-cuts", "test_commit_disks.py", "power_cut_loses", "power cuts", 100),
    _saves("kills-in-retention", "test_commit_kills.py", "any_delete", "kills in retention", 30, 5000),
    _saves("kills-in-training", f"{TRAINING}_saves.py", "killed", "kills in a save of two real ranks", 20),
    _saves("flips-in-training", f"{TRAINING}_saves.py", "flipped", "flipped bits under two real ranks", 10),
    _saves("disks-in-training", f"{TRAINING}_saves.py", "disk", "failing disks under two real ranks", 5),
    _saves("cuts-in-training", f"{TRAINING}_power_cuts.py", "sealed", "power cuts of two real ranks", 20),
    _saves("cuts-of-deepspeed", f"{TRAINING}_power_cuts.py", "deepspeed", "power cuts of DeepSpeed's own save", 20),
    _saves("kills-in-exports", "test_staging.py", "kill", "kills of a process that seals a directory", 20, 1000),
    _saves("schedules", "test_audit.py", "any_schedule", "tests", 200),
    Part("reshard", _pytest("tests/worker/test_reshard.py"), {"SPEECHCTL_TEST_RESHARD": "all"}, "tests", 54),
    Part("modes", _pytest("tests/worker/test_modes.py"), {"SPEECHCTL_TEST_MODES": "all"}, "tests", 140),
    Part("peers", ("tests.faults.peers",), {}, "cells", 24),
    Part("kills", _pytest("tests/worker/test_train.py", "-k", "same_run"), {"SPEECHCTL_TEST_KILLS": "7"}, "kills", 21),
    Part(
        "time-limits",
        _pytest("tests/cluster/test_slurm_training.py"),
        {"SPEECHCTL_TEST_CROSSINGS": "3"},
        "crossings",
        3,
    ),
)

WIDTH = max(len(part.name) for part in PARTS)


@dataclass
class Done:
    """What came of a part so far."""

    rounds: int = 0
    cut: int = 0
    """Rounds that were ended before their end since the last whole one."""
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    """The logs of the rounds that failed."""


class Torture:
    def __init__(self, parts: Sequence[Part], folder: Path, seed: int, code: str, *, fresh: bool) -> None:
        self.parts, self.folder, self.seed, self.code = parts, folder, seed, code
        self.file = folder / "state.json"
        kept = rundir.read_json(self.file) or {}
        goes_on = not fresh and kept.get("seed") == seed and kept.get("code") == code
        if kept and not goes_on:
            print("begins anew: " + ("--fresh" if fresh else "what was done was of another seed or of other code"))
        self.done = {name: Done(**value) for name, value in kept["parts"].items()} if goes_on else {}
        for part in parts:
            self.done.setdefault(part.name, Done())
        self._keep()

    def run(self, seconds: float | None) -> None:
        """Until the seconds are over, or until every part has as many rounds as one of them has next.

        Raises:
            KeyboardInterrupt: the part that ran is ended.
        """
        until = float("inf") if seconds is None else time.monotonic() + seconds
        goal = float("inf") if seconds is not None else 1 + min(self.done[part.name].rounds for part in self.parts)
        while time.monotonic() < until:
            part = min(self.parts, key=lambda p: (self.done[p.name].rounds, self.done[p.name].cut))
            if self.done[part.name].rounds >= goal:
                return
            self.round(part, until)

    def round(self, part: Part, until: float) -> None:
        done = self.done[part.name]
        seed = int(hashlib.sha256(f"{self.seed} {part.name} {done.rounds}".encode()).hexdigest()[:8], 16)
        log, counts = self.folder / f"{part.name}-{seed}.log", self.folder / "counts"
        counts.unlink(missing_ok=True)
        print(f"{part.name}: round {done.rounds + 1}, seed {seed}", end=" ", flush=True)
        began = time.monotonic()
        variables = {"SPEECHCTL_TEST_SEED": str(seed), "SPEECHCTL_TEST_COUNTS": str(counts), **part.variables}
        try:
            code = _run([sys.executable, "-m", *part.command], variables, log, until)
        except (KeyboardInterrupt, subprocess.TimeoutExpired) as error:
            print(f"... cut short after {time.monotonic() - began:.0f} s", flush=True)
            done.cut += 1
            self._keep()
            if isinstance(error, KeyboardInterrupt):
                raise
            return
        counted: dict[str, int] = {}
        for row in rundir.read_lines(counts):
            counted[row["name"]] = counted.get(row["name"], 0) + row["n"]
        units = ", ".join(f"{n:,} {name}" for name, n in counted.items()) or "nothing counted"
        done.rounds, done.cut = done.rounds + 1, 0
        done.counts = {name: done.counts.get(name, 0) + counted.get(name, 0) for name in {**done.counts, **counted}}
        if code == 0 and counted.get(part.unit, 0) >= part.full:
            print(f"passed in {time.monotonic() - began:.0f} s: {units}", flush=True)
            log.unlink()
        else:
            why = f"exit {code}" if code else f"only {counted.get(part.unit, 0):,} of {part.full:,} {part.unit}"
            print(f"FAILED in {time.monotonic() - began:.0f} s ({why}; {units}): {log}", flush=True)
            done.failed.append(str(log))
        self._keep()

    def _keep(self) -> None:
        parts = {name: asdict(done) for name, done in self.done.items()}
        rundir.write_json(self.file, {"seed": self.seed, "code": self.code, "parts": parts})

    def report(self) -> None:
        said = "rounds  failed  counts (and, where none failed, the bound 3/n on the rate of failures)"
        print(f"\n{'part':<{WIDTH}} {said}")
        for part in self.parts:
            done = self.done[part.name]
            counts = [f"{n:,} {name}" for name, n in done.counts.items()]
            if done.counts.get(part.unit) and not done.failed:
                counts.append(f"{part.unit} fail at less than {3 / done.counts[part.unit]:.2g}")
            print(f"{part.name:<{WIDTH}} {done.rounds:>6}  {len(done.failed):>6}  {', '.join(counts) or '-'}")
        for part in self.parts:
            for log in self.done[part.name].failed:
                print(f"failed: {log}")


def _run(argv: list[str], variables: dict[str, str], log: Path, until: float) -> int:
    """Exit code of a command, which ends when we do.

    Raises:
        TimeoutExpired, KeyboardInterrupt: it was ended before its end.
    """
    env = {**os.environ, **variables}
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_end_with_us,
        )
    try:
        return process.wait(None if until == float("inf") else max(0.0, until - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.send_signal(signal.SIGINT)  # pytest takes down what its fixtures made
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_us() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    LIBC.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def digest_of_the_code() -> str:
    files = [p for name in ("launcher", "tests", "recipes") for p in sealing.files_under(ROOT / name)]
    files = [p for p in files if "__pycache__" not in p.parts]
    return sealing.digest_json({str(p.relative_to(ROOT)): sealing.digest_file(p) for p in files})


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS, folder: Path | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="begin new rounds, and cut the last one short, at this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", action="append", choices=[part.name for part in parts], help="only this; repeatable")
    parser.add_argument("--list", action="store_true", help="print the parts and how each is run by hand, and stop")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    options = parser.parse_args(arguments)
    if options.list:
        for part in parts:
            words = [*(f"{name}={value}" for name, value in part.variables.items()), "python", "-m", *part.command]
            print(f"{part.name:<{WIDTH}} {part.full:,} {part.unit} a round: {shlex.join(words)}")
        return 0
    folder = folder or ROOT / ".torture"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: another one uses {folder}", file=sys.stderr)
            return 2
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        torture = Torture(parts, folder, options.seed, digest_of_the_code(), fresh=options.fresh)
        if options.part:
            torture.parts = [part for part in parts if part.name in options.part]
        try:
            torture.run(options.seconds)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        torture.report()
    failed = any(torture.done[part.name].failed for part in torture.parts)
    return 1 if failed else 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
