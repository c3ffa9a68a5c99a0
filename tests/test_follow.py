"""A run without a terminal, and those who come by to watch it: nothing they do ends it, and its end is told to all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launcher import lock, rundir
from launcher.errors import ExitCode
from launcher.recovery import note
from tests.conftest import Golden, Stub, gone, made_run, wait_until
from tests.test_cli import Transcript, compare, speechctl
from tests.test_rundir import held
from tests.test_why import submitted

__all__ = ["speechctl"]  # a fixture


@pytest.fixture
def detached(stub: Stub) -> Iterator[Stub]:
    """A stub whose launcher is ended with the test, by its own record in the lock."""
    yield stub
    for pid in [(lock.holder(stub.run) or {}).get("pid"), *stub.pids()]:
        if pid is not None and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def launcher_of(stub: Stub) -> int:
    wait_until(lambda: (lock.holder(stub.run) or {}).get("pid"))
    return int((lock.holder(stub.run) or {})["pid"])


@contextmanager
def holding(run: rundir.Run) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher that has the run, and the newest attempt is its own."""
    with held(run, "speechctl launch stub.yaml") as process:
        note(run.attempts()[-1], "started", sealed=-1, by_hand=True)
        yield process


@contextmanager
def attached(stub: Stub) -> Iterator[subprocess.Popen[str]]:
    """`speechctl attach` under way, and it has said something: in a file, which `heard` reads."""
    command = [*stub.command, "attach", "stub"]
    with (stub.root / "heard").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=stub.root, env=stub.env, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    with process:
        try:
            wait_until(lambda: heard(stub))
            yield process
        finally:
            process.kill()


def heard(stub: Stub) -> str:
    return (stub.root / "heard").read_text()


# Detach ---------------------------------------------------------------------------------------------------------------


SHELL = """
import fcntl, pathlib, subprocess, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
code = subprocess.run(sys.argv[1:]).returncode
pathlib.Path("code").write_text(str(code))
time.sleep(60)
"""
"""The leader of a terminal's session. It stays there, as a shell does, until the terminal is closed."""


def test_a_detached_run_survives_its_terminal(detached: Stub) -> None:
    """The terminal goes away as after an ssh logout: its shell's session gets SIGHUP and every descriptor is dead."""
    detached.behave("train 400", "train 400")
    command = [*detached.command, "launch", "stub.yaml", "--detach"]
    terminal, other = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SHELL, *command],
        cwd=detached.root,
        env=detached.env,
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    ) as shell:
        os.close(other)
        code = detached.root / "code"
        wait_until(lambda: code.exists() and code.read_text())
        assert code.read_text() == "0"
        launcher = launcher_of(detached)
        assert os.getsid(launcher) == launcher
        detached.wait_for_ranks()
        os.close(terminal)
        assert shell.wait(10) == -signal.SIGHUP
    with attached(detached) as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == ExitCode.FINISHED
        assert "\nstate   finished\n" in said
    printed = detached.run.launcher_log.read_text()
    assert "step 1/50" in printed and "state   finished" in printed
    assert detached.run.launcher_log.stat().st_mode & 0o777 == 0o600
    assert rundir.read_json(detached.run.lock)["command"].endswith(f"resume {detached.run.root}")
    assert gone({launcher, *detached.pids()}, within_s=5)


def test_what_to_type_after_detaching(detached: Stub, golden: Golden) -> None:
    made_run(detached.run.root, "stopped")
    done = detached.speechctl("launch", "stub.yaml", "--detach", "--set", "name=other")
    run = rundir.Run(detached.root / "runs" / "other")
    launcher = (lock.holder(run) or {})["pid"]
    told = done.stdout.replace(f"pid {launcher} on {os.uname().nodename}", "pid PID on HOST")
    text = f"[exit {done.returncode}]\n--- stdout\n{told}--- stderr\n{done.stderr}"
    golden("cli/launch-detached.txt", text.replace(str(detached.root), "TMP"))
    assert detached.speechctl("stop", "other").stdout == f"{run.root}: stopped\n"
    assert gone({launcher}, within_s=10)


def test_a_detached_launcher_that_cannot_start_says_why(stub: Stub) -> None:
    run = made_run(stub.run.root, "stopped")
    run.launcher_log.write_text("of an earlier launcher\n")
    with held(run, "speechctl launch elsewhere"):
        done = stub.speechctl("resume", "stub", "--detach")
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {run.root} is in use by `speechctl launch elsewhere` (pid ")
    assert f"of an earlier launcher\n{done.stderr}" == run.launcher_log.read_text()


def test_resume_goes_on_detached_and_anew(detached: Stub) -> None:
    detached.behave("raise", "lost")
    assert detached.speechctl("launch", "stub.yaml").returncode == ExitCode.TRAINING_RAISED
    detached.run.launcher_log.write_text("error: an old one\n")
    detached.behave("train 20", "train 20")
    done = detached.speechctl("resume", "stub", "--detach", "--fresh")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert detached.speechctl("attach", "stub").returncode == ExitCode.FINISHED
    assert detached.run.launcher_log.read_text().startswith("error: an old one\n")
    assert rundir.read_json(detached.run.attempts()[-1].env)["fresh"] is True


def test_a_slurm_job_needs_no_detaching(stub: Stub) -> None:
    """Only what is said: the run goes the way of its backend."""
    code = "from launcher import follow; print(follow.is_needed('slurm'), follow.is_needed('ssh'))"
    done = subprocess.run([sys.executable, "-c", code], env=stub.env, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    assert done.stderr == "--detach changes nothing: a SLURM job needs no terminal\n"


# Attach ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "code"), [("created", 2), ("finished", 0), ("stopped", 75), ("failed", 1), ("interrupted", 76)]
)
def test_a_run_that_is_not_running_says_how_it_ended(
    state: str, code: int, speechctl: Transcript, tmp_path: Path, golden: Golden
) -> None:
    made_run(tmp_path / "runs" / "stub", state)
    compare(f"attach-{state}", "attach stub", code, speechctl, tmp_path, golden)


def test_ctrl_c_leaves_the_run_to_itself(stub: Stub) -> None:
    with stub.start(*stub.command, "launch", "stub.yaml") as launch:
        stub.wait_for_ranks()
        with attached(stub) as process:
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=10)
            assert process.returncode == 130
            assert (said, heard(stub).splitlines()[-1]) == (
                "",
                f"left {stub.run.root} to itself: `speechctl attach {stub.run.root}` comes back,"
                f" `speechctl stop {stub.run.root}` ends it",
            )
        assert not stub.run.stop_request.exists()
        with attached(stub) as process:
            assert launch.poll() is None
            launch.send_signal(signal.SIGINT)
            assert process.wait(20) == launch.wait(20) == ExitCode.STOPPED


def test_a_launcher_that_is_killed_while_we_follow(detached: Stub) -> None:
    """Its ranks do not seal: deaf to being asked, they are killed when launch.stop_grace is over."""
    detached.behave("deaf", "deaf")
    detached.recipe.write_text(detached.recipe.read_text().replace("stop_grace: 20s", "stop_grace: 1s"))
    assert detached.speechctl("launch", "stub.yaml", "-d").returncode == 0
    ranks = detached.wait_for_ranks()
    with attached(detached) as process:
        os.kill(launcher_of(detached), signal.SIGKILL)
        said, _ = process.communicate(timeout=20)
    error = heard(detached)
    assert (process.returncode, said) == (ExitCode.INFRASTRUCTURE, "")
    assert f"error: the launcher of {detached.run.root} is gone; it could not say how its ranks ended" in error
    assert "hint: `speechctl why " in error
    assert gone(ranks, within_s=20)


def test_ranks_that_sealed_alone_were_asked_by_nobody(detached: Stub) -> None:
    """A launcher that was killed read as `stopped on request` until somebody resumed, since its ranks had sealed."""
    assert detached.speechctl("launch", "stub.yaml", "-d").returncode == 0
    ranks = detached.wait_for_ranks()
    os.kill(launcher_of(detached), signal.SIGKILL)
    assert gone(ranks, within_s=20)
    assert rundir.read_json(detached.run.attempts()[0].exit)["code"] == ExitCode.STOPPED
    assert "\nstate   interrupted: the launcher was gone" in detached.speechctl("status", "stub").stdout
    assert "launcher lost" in detached.speechctl("why", "stub").stdout
    assert detached.speechctl("attach", "stub").returncode == ExitCode.INFRASTRUCTURE


def test_a_failure_ends_those_who_follow_with_its_code(stub: Stub) -> None:
    stub.behave("raise 2", "lost")
    with stub.start(*stub.command, "launch", "stub.yaml") as launch:
        launcher_of(stub)
        with stub.start(*stub.command, "attach", "stub") as process:
            _, error = process.communicate(timeout=30)
        _, own = launch.communicate(timeout=20)
    assert process.returncode == launch.returncode == ExitCode.TRAINING_RAISED
    assert error.partition("error: ")[2] == own.partition("error: ")[2] != ""


def test_another_attempt_of_the_same_launcher_is_followed(tmp_path: Path, stub: Stub) -> None:
    run = made_run(stub.run.root, "failed")
    with holding(run) as holder, attached(stub) as process:
        attempt = run.new_attempt()
        rundir.append_line(attempt.events, {"event": "stopped", "step": 5, "time": 1.0})
        wait_until(lambda: "step 5: " in heard(stub))
        rundir.write_json(attempt.exit, {"code": 75, "step": 5, "sealed_step": 5})
        holder.kill()
        assert process.wait(20) == ExitCode.STOPPED
    lines = heard(stub).splitlines()
    assert lines[-2:] == ["attempt 2 failed: rank 1 on localhost: ValueError: boom", "step 5: stopped, and sealed"]


def test_what_was_before_is_told_in_a_few_lines(stub: Stub) -> None:
    run = made_run(stub.run.root, "interrupted")
    attempt = run.new_attempt()
    for step in range(1, 1001):
        rundir.append_line(attempt.events, {"event": "sealed", "step": step, "blocked_s": 1.0, "time": float(step)})
        values = {"epoch": 0, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "audio_s": 1.0, "step_s": 1.0}
        rundir.append_line(attempt.metrics, {"step": step, "time": float(step), **values})
    with holding(run), attached(stub):
        wait_until(lambda: heard(stub).count("\n") == 6)
    lines = heard(stub).splitlines()
    assert lines[:5] == [f"step {step}: sealed a checkpoint; training waited 1.0 s for it" for step in range(996, 1001)]
    assert lines[5].startswith("step 1000/6  epoch 0")


def test_of_the_launcher_before_nothing_is_told(stub: Stub) -> None:
    """One that has the run may wait for what the last one left before it has an attempt of its own: to whoever came by
    then, the last steps of the attempt before were told as this one's."""
    run = made_run(stub.run.root, "stopped")
    with held(run, "speechctl resume"), stub.start(*stub.command, "attach", "stub") as process:
        assert process.stderr is not None
        said = f"waiting: `speechctl resume` has {run.root}, and no attempt yet; Ctrl-C leaves it alone\n"
        assert process.stderr.readline() == said
        time.sleep(0.5)
        attempt = run.new_attempt()
        rundir.append_line(attempt.events, {"event": "stopped", "step": 5, "time": 1.0})
        assert process.stderr.readline() == "step 5: stopped, and sealed\n"


def test_a_job_in_the_queue_is_waited_for(stub: Stub) -> None:
    run = made_run(stub.run.root, "created")
    submitted(run)
    squeue_says(stub, "PENDING|Priority")
    with stub.start(*stub.command, "attach", "stub") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "waiting for job 1234 PENDING (Priority); Ctrl-C leaves it alone\n"
        with held(run, "speechctl supervise"):
            attempt = run.new_attempt()
            rundir.append_line(attempt.events, {"event": "stopped", "step": 5, "time": 1.0})
            assert process.stderr.readline() == "step 5: stopped, and sealed\n"
            rundir.write_json(attempt.exit, {"code": 75, "step": 5, "sealed_step": 5})
            squeue_says(stub, "COMPLETED|None")
        assert process.wait(20) == ExitCode.STOPPED


def squeue_says(stub: Stub, text: str) -> None:
    folder = stub.root / "squeue"
    folder.mkdir(exist_ok=True)
    (folder / "said").write_text(f"{text}\n")
    (folder / "squeue").write_text(f"#!/bin/sh\nexec cat '{folder}/said'\n")
    (folder / "squeue").chmod(0o755)
    stub.env["PATH"] = f"{folder}:{os.environ['PATH']}"


def test_a_job_that_is_gone_is_not_waited_for(stub: Stub) -> None:
    """`attach` waited for ever for a job that was cancelled while it was in the queue."""
    run = made_run(stub.run.root, "created")
    submitted(run)
    squeue_says(stub, "CANCELLED|None")
    done = stub.speechctl("attach", "stub")
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith(
        f"job 1234 CANCELLED is over and did not begin with the run; its log is {run.slurm / 'job-1234.log'}\n"
        f"error: {run.root} is not running, and never was\n"
    )


def test_between_two_lives_of_a_job_it_is_waited_for(stub: Stub) -> None:
    """At the time limit the run was said to be stopped on request, and whoever watched it was sent away, though its job
    was in the queue again."""
    run = made_run(stub.run.root, "stopped")
    submitted(run)
    squeue_says(stub, "RUNNING|None")
    with stub.start(*stub.command, "attach", "stub") as process:
        assert process.stderr is not None
        squeue_says(stub, "PENDING|BeginTime")
        assert process.stderr.readline() == "waiting for job 1234 PENDING (BeginTime); Ctrl-C leaves it alone\n"
        with held(run, "speechctl resume"):
            time.sleep(0.5)  # its launcher waits for what the last one left; the attempt before is not told again
            attempt = run.new_attempt()
            rundir.append_line(attempt.events, {"event": "stopped", "step": 5, "time": 1.0})
            assert process.stderr.readline() == "step 5: stopped, and sealed\n"
            rundir.write_json(attempt.exit, {"code": 0, "step": 6, "sealed_step": 6})
        assert process.wait(20) == ExitCode.FINISHED
