"""Following a run from outside, on any machine that sees its directory; and starting one that needs no terminal."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from typing import Any

from launcher import jobs, lock, logs, report, rundir, ui, views
from launcher.errors import ExitCode, InfrastructureError, UsageError
from launcher.events import Follower
from launcher.rundir import Run

POLL_S = 0.2
ASK_S = 5.0
"""Between questions to SLURM."""

ON_ITS_NODES = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING")
"""A job that begins or ends: there is nothing to wait for yet, or any more, that is worth a word."""

LEFT = 130
"""The exit code of one that was following and was told to leave by Ctrl-C: the run has not ended with it."""


def print_logs(run: Run, selection: logs.Selection, view: logs.View, *, follow: bool, as_json: bool) -> None:
    """Not through rich, which takes a hundred times as long for a line."""
    report.read(run)  # refuses what is no run
    follow = follow and lock.holder(run) is not None
    lines = logs.follow(run, selection, view) if follow else logs.show(run, selection, view, ui.say)
    try:
        for line in lines:
            print(json.dumps(line.to_json()) if as_json else line.render(), flush=follow)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it any more; typer would make a failure of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


# Attach --------------------------------------------------------------------------------------------------------------


def attach(run: Run) -> int:
    """Print what the launcher of a running run prints, until nobody has the run any more and no job of it is there;
    then how it ended.

    Returns:
        What `launch` ends with.
    """
    value = report.read(run)
    try:
        holder = lock.holder(run)
        held, last = holder is not None, value.history[-1].number if value.history else 0
        if holder is not None and last:
            if (value.history[-1].started or math.inf) >= holder.get("since", math.inf):
                last -= 1
            else:  # which the launcher before had made
                who = f"`{holder['command']}`" if "command" in holder else "a new launcher"
                ui.say(f"waiting: {who} has {run.root}, and no attempt yet; Ctrl-C leaves it alone")
        while held or wait_for_job(run):
            last, held = follow_attempts(run, ui.Progress(value.max_steps), last), False
    except KeyboardInterrupt:
        root = shlex.quote(str(run.root))
        ui.say(f"\nleft {run.root} to itself: `speechctl attach {root}` comes back, `speechctl stop {root}` ends it")
        return LEFT
    return tell_end(run)


def wait_for_job(run: Run) -> bool:
    """Until a launcher has the run again; False: none will, as far as SLURM knows."""
    told = ""
    while lock.holder(run) is None:
        value = report.read(run)
        comes_again = value.exit_code in (None, ExitCode.STOPPED, ExitCode.INFRASTRUCTURE)
        job = jobs.current(run) if comes_again else None
        if job is None:
            return False
        if job.is_gone and not value.attempts:
            ui.say(f"job {job} is over and did not begin with the run; its log is {value.jobs[-1]['log']}")
        if job.is_gone or not (job.is_there or job.reason == jobs.UNREACHABLE or not value.attempts):
            return False
        quiet = job.state in ON_ITS_NODES and told == ""
        if not quiet and job.state != told:
            ui.say(f"waiting for job {job}; Ctrl-C leaves it alone")
        told = job.state
        until = time.monotonic() + (1 if quiet else ASK_S)
        while time.monotonic() < until and lock.holder(run) is None:
            time.sleep(POLL_S)
    return True


def follow_attempts(run: Run, progress: ui.Progress, number: int = 0) -> int:
    """What the ranks report, attempt after attempt, until nobody has the run any more.

    Args:
        number: of the last attempt that was followed already.

    Returns:
        that of the last one now.
    """
    follower: Follower | None = None
    while True:
        held = lock.holder(run) is not None  # asked first: what was written before the end is read after it
        attempts = run.attempts()
        for attempt in attempts if follower is not None else attempts[-1:]:
            if attempt.number <= number:
                continue
            if follower is None:
                past: list[dict[str, Any]] = []
                follower = Follower(attempt, past.append)
                follower.once()
                progress.catch_up(past)
                follower.tell = progress
            else:
                follower.once()  # the last words of the one before
                failure = rundir.read_json(run.attempts_dir / f"{number:04d}" / "failure.json")
                ui.say(f"attempt {number} failed: {failure['message']}" if failure else f"attempt {number} is over")
                follower = Follower(attempt, progress)
            number = attempt.number
        if follower is not None:
            follower.once()
        if not held:
            return number
        time.sleep(POLL_S)


def tell_end(run: Run) -> int:
    """Say how a run has ended, in the words of its launcher.

    Returns:
        The exit code that it ended with.

    Raises:
        UsageError: it was never started.
        InfrastructureError: its launcher was killed.
    """
    value = report.read(run)
    if value.state == "created":
        raise UsageError(f"{run.root} is not running, and never was", hint=f"`speechctl resume {run.root}` starts it")
    if value.state == "interrupted":
        raise InfrastructureError(
            f"the launcher of {run.root} is gone; it could not say how its ranks ended",
            hint=f"`speechctl why {run.root}` shows what is known, `speechctl resume {run.root}` goes on",
        )
    if value.state == "failed" and value.failure is not None:
        ui.failed(value.failure)
    else:
        views.show(run, value)
    return value.exit_code or 0


# Detach --------------------------------------------------------------------------------------------------------------


def is_needed(backend: str) -> bool:
    """Whether there is something to detach; says so where there is not."""
    if backend == "slurm":
        ui.say("--detach changes nothing: a SLURM job needs no terminal")
    return backend != "slurm"


def detach(run: Run, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start `speechctl resume` as a session of its own, which no terminal ends, and wait until it has the run's lock
    or has ended. What it prints goes to the end of `launcher.log`.

    Returns:
        The process, and what it had printed when it ended; nothing while it runs.
    """
    argv = [sys.executable, "-P", "-m", "launcher.cli", "resume", str(run.root), *options]
    with rundir.storage_errors(run.launcher_log):
        log = os.open(run.launcher_log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        before = os.fstat(log).st_size
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            while child.poll() is None and (lock.holder(run) or {}).get("pid") != child.pid:
                time.sleep(POLL_S / 4)
        except KeyboardInterrupt:
            child.terminate()
            raise
        said = "" if child.returncode is None else os.pread(log, 1 << 20, before).decode(errors="backslashreplace")
    finally:
        os.close(log)
    return child, said


def tell_detached(run: Run, *options: str) -> int:
    """Detach, and say what to type next; or how it ended, where it has ended by then."""
    child, said = detach(run, *options)
    if child.returncode is not None:
        ui.error(said.strip())
        return child.returncode if child.returncode >= 0 else ExitCode.INFRASTRUCTURE
    root = shlex.quote(str(run.root))
    ui.answer(f"{run.root} goes on by itself: pid {child.pid} on {socket.gethostname()}, prints to {run.launcher_log}")
    ui.answer("\nnext:")
    for command in (f"attach {root}", f"logs {root} -f", f"stop {root}"):
        ui.answer(f"  speechctl {command}")
    return ExitCode.FINISHED
