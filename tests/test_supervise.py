"""One attempt, from start to exit code: nothing is called a success that is none, and the first cause is named."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import environment, lock, recipe_file, recovery, report, rundir, supervise
from launcher.backends import BACKENDS
from launcher.errors import ExitCode
from launcher.events import Follower
from launcher.failure import KINDS, Failure
from launcher.hosts import Host
from launcher.recipe_launch import Launch
from launcher.rundir import Attempt
from tests.conftest import Stub, gone, wait_until


@contextmanager
def launched(stub: Stub, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`speechctl launch` under way, its ranks training."""
    with stub.start(*stub.command, "launch", "stub.yaml", **options) as process:
        stub.wait_for_ranks()
        yield process


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    os.kill(process.pid, number)


def failure_of(stub: Stub) -> dict[str, Any]:
    """What the first attempt failed of."""
    value: dict[str, Any] = rundir.read_json(stub.run.attempts()[0].failure)
    return value


# Good ends ------------------------------------------------------------------------------------------------------------


def test_a_run_to_its_last_step(stub: Stub) -> None:
    stub.behave("train 50", "train 50")
    done = stub.speechctl("launch", "stub.yaml", env={**stub.env, "AWS_SECRET": "hush", "HF_HOME": "/hub"})
    assert done.returncode == ExitCode.FINISHED, done.stderr
    (attempt,) = stub.run.attempts()
    assert not attempt.failure.exists()
    assert [row["event"] for row in rundir.read_lines(attempt.supervisor)] == ["started", "node ended", "ended"]
    assert gone(stub.pids(), within_s=0)
    assert stub.run.root.stat().st_mode & 0o777 == 0o700
    assert attempt.env.stat().st_mode & 0o777 == 0o600
    variables = rundir.read_json(attempt.env)["variables"]
    ours = {*environment.base_variables(2), "GLOO_SOCKET_IFNAME"}
    assert {v for v in variables if not environment.PASSED_ON.fullmatch(v)} <= ours
    assert variables["HF_HOME"] == "/hub"
    written = [p for p in stub.run.root.rglob("*") if p.is_file()]
    assert not [p for p in written if b"hush" in p.read_bytes()]


def test_ctrl_c_asks_the_ranks_to_seal(stub: Stub) -> None:
    with launched(stub) as process:
        interrupt(process)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == ExitCode.STOPPED
    assert rundir.read_json(stub.run.stop_request)["why"] == "SIGINT to the launcher"
    assert "stopping: the ranks finish their step and seal it" in stderr
    assert gone(stub.pids(), within_s=0)
    # Who came back to a closed terminal could not learn whether that, scancel or a colleague had stopped the run.
    assert "stopped on request (SIGINT to the launcher), with" in stub.speechctl("status", str(stub.run.root)).stdout
    assert "the last one was stopped: SIGINT to the launcher" in stub.speechctl("why", str(stub.run.root)).stdout


def test_a_signal_that_comes_twice_at_once_is_one_wish(stub: Stub) -> None:
    """Ctrl-C reaches the launcher from the terminal, and again from `uv run` or make, which pass it on."""
    with launched(stub) as process:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            interrupt(process, number)
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == ExitCode.STOPPED
    assert "ending the ranks now" not in stderr


SLOW_DISK = """
import os, signal, sys
if "launch" in sys.orig_argv:
    from launcher import events, supervise
    place, name = {"asks": (supervise, "request_stop"), "reads": (events.Follower, "once")}[os.environ["SLOW"]]
    whole = getattr(place, name)
    def slow(*rest):
        whole(*rest)
        if os.path.exists("armed"):
            os.unlink("armed")
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            with open("gate"):  # waits here for whoever opens it to write
                pass
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    setattr(place, name, slow)
"""


@pytest.mark.parametrize("slow", ["asks", "reads"])
def test_a_slow_disk_makes_no_two_wishes_of_one(stub: Stub, slow: str) -> None:
    """While the launcher waited for a disk it did nothing about the first signal, or did not hear the second until
    then: the ranks were killed in the middle of their seal."""
    stub.behave("slow", "slow")
    (stub.packages / "sitecustomize.py").write_text(SLOW_DISK)
    armed, gate = stub.root / "armed", stub.root / "gate"
    os.mkfifo(gate)
    with launched(stub, env={**stub.env, "SLOW": slow}) as process:
        armed.touch()
        if slow == "asks":
            interrupt(process)
        wait_until(lambda: not armed.exists())
        if slow == "reads":
            interrupt(process)
        time.sleep(supervise.AT_ONCE_S + 0.2)
        interrupt(process, signal.SIGTERM)
        with gate.open("w"):
            pass
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED
    assert "ending the ranks now" not in stderr


def test_a_second_ctrl_c_ends_the_ranks(stub: Stub) -> None:
    stub.behave("deaf", "deaf")
    stub.recipe.write_text(stub.recipe.read_text().replace("stop_grace: 20s", "stop_grace: 100s"))
    said = stub.root / "said"
    with said.open("w") as stderr, launched(stub, stderr=stderr) as process:
        pids = stub.pids()
        interrupt(process)
        wait_until(lambda: "Ctrl-C again ends them at once" in said.read_text())
        time.sleep(supervise.AT_ONCE_S + 0.2)
        assert not gone(pids, within_s=0)
        interrupt(process)
        assert process.wait(20) == ExitCode.INFRASTRUCTURE
    assert gone(pids, within_s=0)
    assert (
        "error: the ranks were killed before their work was sealed: the launcher was told to end at once"
        in said.read_text()
    )


def test_nohup_is_honoured(stub: Stub) -> None:
    """The launcher's own handler once replaced the ignored SIGHUP, and closing the terminal stopped the run."""
    stub.behave("train 60", "train 60")
    ignore = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    with stub.start(sys.executable, "-c", ignore, *stub.command, "launch", "stub.yaml") as process:
        stub.wait_for_ranks()
        interrupt(process, signal.SIGHUP)
        process.communicate(timeout=20)
    assert process.returncode == ExitCode.FINISHED


def test_a_run_goes_on_when_nobody_reads_its_progress(stub: Stub) -> None:
    stub.behave("train 100", "train 100")
    with launched(stub) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        assert process.wait(20) == ExitCode.FINISHED


# A launcher that is killed --------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_launcher_that_is_killed(stub: Stub) -> None:
    with launched(stub) as process:
        pids = stub.pids()
        interrupt(process, signal.SIGKILL)
        process.wait()
        assert gone(pids, within_s=10)
    wait_until(lambda: rundir.read_json(stub.run.attempts()[0].node(0))["returncode"] is not None)
    assert lock.holder(stub.run) is None
    done = stub.speechctl("status", str(stub.run.root))
    assert "state   interrupted: the launcher was gone" in done.stdout
    assert rundir.read_json(stub.run.attempts()[0].exit)["code"] == ExitCode.STOPPED, "they had the time to seal"


def test_who_asked_is_remembered_by_those_who_seal_for_it(stub: Stub) -> None:
    """The launcher was killed behind a request to stop. The next one, started while the ranks were sealing still,
    removed the request, and the run was told to have lost its launcher, for good."""
    stub.behave("slow", "slow", then=("train 12", "train 12"))
    with launched(stub) as process:
        supervise.request_stop(stub.run, "speechctl stop")
        wait_until((stub.run.attempts()[0].root / "seals-for-a-stop").exists)
        interrupt(process, signal.SIGKILL)
        process.wait()
        done = stub.speechctl("resume", str(stub.run.root))
    assert done.returncode == ExitCode.FINISHED, done.stderr
    first, _ = report.read(stub.run).history
    assert (first.state, first.asked, first.failure) == ("stopped", "speechctl stop", None)
    assert [row["event"] for row in rundir.read_lines(stub.run.attempts()[0].supervisor)] == ["started", "ended"]


# Attempt after attempt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "kind"), [("agent", "node lost"), ("rank", "killed")])
def test_a_run_that_nobody_asked_to_stop_goes_on(stub: Stub, victim: str, kind: str) -> None:
    """A host that went down told its agent by SIGTERM, all ranks sealed, and the run was over: "stopped on request"."""
    stub.behave("train", "train", then=("train 20", "train 20"))
    with launched(stub) as process:
        first = stub.run.attempts()[0]
        record = first.node(0) if victim == "agent" else first.rank(1)
        os.kill(rundir.read_json(record)["pid"], signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == ExitCode.FINISHED, stderr
    assert failure_of(stub)["kind"] == kind and rundir.read_json(first.exit)["code"] == ExitCode.STOPPED


def test_ctrl_c_in_the_wait_is_heard(stub: Stub) -> None:
    stub.recipe.write_text(stub.recipe.read_text().replace("wait: 0.1s", "wait: 100s"))
    stub.behave("train", "kill")
    with stub.start(*stub.command, "launch", "stub.yaml") as process:
        assert process.stderr is not None
        assert any(line.startswith("starting again in 100 s from step 0") for line in process.stderr)
        interrupt(process)
        process.communicate(timeout=10)
    assert process.returncode == ExitCode.INFRASTRUCTURE
    assert len(stub.run.attempts()) == 1


def test_a_person_starts_the_count_anew_and_a_requeued_job_goes_on_counting(stub: Stub) -> None:
    stub.behave("train", "kill", patience_s=0.3)
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.NO_PROGRESS
    assert len(stub.run.attempts()) == 3
    assert failure_of(stub)["kind"] == "killed" and "cause" not in failure_of(stub)
    last = rundir.read_json(stub.run.attempts()[-1].failure)
    assert (last["kind"], last["cause"]["kind"], last["rank"]) == ("no progress", "killed", 1)
    root = str(stub.run.root)
    requeued = {**stub.env, "SLURM_RESTART_COUNT": "1"}
    assert stub.speechctl("resume", root, env=requeued).returncode == ExitCode.NO_PROGRESS
    assert len(stub.run.attempts()) == 3, "it is not even started"
    assert rundir.read_json(stub.run.attempts()[-1].failure) == last
    assert stub.speechctl("resume", root).returncode == ExitCode.NO_PROGRESS
    assert len(stub.run.attempts()) == 6


def test_a_host_that_was_lost_and_then_refuses_has_its_job_queued_again(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slurmd was back before its file system: the attempt ended with 3, which the batch script takes for the end,
    though another node was to take the place."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    value = recipe_file.load(stub.recipe, ["launch.backend=slurm", "launch.nodes=1", "launch.processes=2"])
    first = stub.attempt()
    recovery.note(first, "started", sealed=-1, by_hand=True)
    rundir.write_json(first.failure, Failure("node lost", "lost n1", "resume", host="n1", node_rank=0).to_json())
    recovery.note(first, "ended", code=76, sealed=10)

    def refuse(attempt: Attempt, node_rank: int, _: Host) -> subprocess.Popen[bytes]:
        attempt.srun_log(node_rank).write_text("srun: error: n1: task 0: Exited with exit code 127\n")
        return subprocess.Popen(["false"], stdin=subprocess.PIPE)

    monkeypatch.setitem(BACKENDS, "slurm", refuse)
    plan = replace(stub.plan(), backend="slurm", hosts=[Host("n1", 2)])
    assert supervise.to_the_end(stub.run, value, plan, lambda _: None, by_hand=False) == ExitCode.INFRASTRUCTURE
    assert rundir.read_json(stub.run.attempts()[1].failure)["kind"] == "host refused"


def test_a_fresh_start_that_failed_before_it_began_is_fresh_again(stub: Stub) -> None:
    """Or the second attempt would go on from the checkpoints that were to be put aside."""
    stub.behave("train 12", "train 12")
    assert stub.speechctl("launch", "stub.yaml").returncode == 0
    stub.behave("kill", "kill", then=("kill", "kill"))
    done = stub.speechctl("resume", str(stub.run.root), "--fresh")
    assert done.returncode == ExitCode.NO_PROGRESS, "what was sealed before is no progress"
    assert "starting again in 0.1 s from step 0 " in done.stderr
    assert [rundir.read_json(a.env)["fresh"] for a in stub.run.attempts()] == [False, True, True, True]


def test_ranks_that_a_lost_launcher_left_are_waited_for(stub: Stub) -> None:
    """They may be sealing. Their agent holds a lock for as long as it lives."""
    stub.behave("deaf", "deaf", then=("train 12", "train 12"))
    stub.recipe.write_text(stub.recipe.read_text().replace("stop_grace: 20s", "stop_grace: 4s"))
    with launched(stub) as process:
        interrupt(process, signal.SIGKILL)
        process.wait()
        began = time.time()
        done = stub.speechctl("resume", str(stub.run.root))
    assert done.returncode == ExitCode.FINISHED, done.stderr
    first, second = stub.run.attempts()
    over = rundir.read_json(first.node(0))["time"]
    assert over - began > 3, "they had their grace"
    assert rundir.read_lines(second.supervisor)[0]["time"] >= over
    assert failure_of(stub)["kind"] == "launcher lost"


def test_they_are_waited_for_as_long_as_they_may_take(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a network they first have to miss their launcher. A resume began while they held the GPUs' memory."""
    monkeypatch.setattr(supervise, "LEASE_S", 0.5)
    monkeypatch.setattr(supervise, "TO_BE_KILLED_S", 0.3)
    attempt = stub.attempt()
    with attempt.alive.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        began = time.monotonic()
        assert supervise.wait_for_the_last(stub.run, 0.2, [])
        assert time.monotonic() - began >= 1
        assert not supervise.wait_for_the_last(stub.run, 100, [signal.SIGINT]), "Ctrl-C is heard meanwhile"
        stub.run.stop_request.touch()
        assert not supervise.wait_for_the_last(stub.run, 100, [])


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "kind", "rank", "message"),
    [
        (("raise", "lost"), "training", 0, "rank 0 on localhost: ValueError: boom of rank 0"),
        (("lost", "raise 0.3"), "training", 1, "rank 1 on localhost: ValueError: boom of rank 1"),
        (("raise 1.5", "data 0.3"), "data", 1, "rank 1 on localhost: shard 3 has changed"),
        (("lost", "kill 0.5"), "killed", 1, "rank 1 on localhost was ended by SIGKILL"),
        # torchrun ends the deaf one by SIGKILL in the end, which is not what went wrong.
        (("deaf", "raise 0.3"), "training", 1, "rank 1 on localhost: ValueError: boom of rank 1"),
        (("train", "exit 7"), "training", 1, "rank 1 on localhost ended with code 7 and without a word: "),
        (("no import", "no import"), "training", 0, "rank 0 on localhost ended with code 1 and without a word: "),
    ],
)
def test_the_first_cause_is_named(stub: Stub, ranks: tuple[str, str], kind: str, rank: int, message: str) -> None:
    stub.behave(*ranks, patience_s=0.5 if "deaf" in ranks else 3, then=("train 12", "train 12"))
    done = stub.speechctl("launch", "stub.yaml")
    failure = failure_of(stub)
    code, verdict = KINDS[kind]
    assert (failure["kind"], failure["code"], failure["verdict"]) == (kind, code, verdict), done.stderr
    assert (failure["rank"], failure["host"], failure["node_rank"]) == (rank, "localhost", 0)
    assert failure["message"].startswith(message)
    assert Path(failure["evidence"][0]).exists()
    if verdict == "again":
        assert done.returncode == ExitCode.FINISHED
        assert f"attempt 1 failed: {message}" in done.stderr
    else:
        assert done.returncode == code
        assert done.stderr.count("error: ") == 1 and f"error: {message}" in done.stderr
        assert failure["evidence"][0] in done.stderr and "hint: " in done.stderr
        assert len(stub.run.attempts()) == 1
    assert gone(stub.pids(), within_s=0)


def test_a_worker_that_cannot_be_imported_is_explained_by_its_exception(stub: Stub) -> None:
    stub.behave("no import", "no import")
    stub.speechctl("launch", "stub.yaml")
    assert failure_of(stub)["message"].endswith("No module named no_such_worker")


def test_a_node_that_is_killed_is_said_to_be(stub: Stub) -> None:
    with launched(stub) as process:
        pids = stub.pids()
        node = rundir.read_json(stub.run.attempts()[0].node(0))["pid"]
        os.kill(node, signal.SIGKILL)
        wait_until(stub.run.attempts()[0].failure.exists)
        assert gone(pids, within_s=5)
        interrupt(process)
        process.communicate(timeout=30)
    assert failure_of(stub)["message"] == "the agent of node 0 on localhost was ended by SIGKILL, and its ranks with it"


def test_without_bash_there_is_an_error_and_not_a_traceback(stub: Stub) -> None:
    done = stub.speechctl("launch", "stub.yaml", env={**stub.env, "PATH": "/nowhere"})
    assert done.returncode == ExitCode.HOST
    assert done.stderr.endswith(
        "error: localhost cannot start bash: No such file or directory\n\nhint: install bash there, or mend PATH\n"
    )


@pytest.mark.parametrize(
    ("damage", "kind", "complaint"),
    [
        (lambda a: (a.root / "interpreter").write_text("/no/such/python\n"), "host refused", "/no/such/python"),
        (lambda a: (a.root / "interpreter").unlink(), "host refused", "interpreter: No such file or directory"),
        (lambda a: a.node_script.unlink(), "host refused", "node.sh: No such file or directory"),
        (lambda a: a.env.unlink(), "node failed", "TypeError"),
    ],
)
def test_a_node_that_cannot_start_is_explained_by_its_log(stub: Stub, damage: Any, kind: str, complaint: str) -> None:
    attempt = stub.attempt()
    damage(attempt)
    told: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", stub.env["PYTHONPATH"])
        code, failed = supervise.run_attempt(attempt, stub.plan(), Launch(), told.append, [])
    assert failed is not None and (failed.kind, failed.code) == (kind, code)
    assert "node 0 on localhost" in failed.message
    assert complaint in failed.message + attempt.node_log(0).read_text()
    assert failed.evidence == [str(attempt.node_log(0))]


# What is told meanwhile -----------------------------------------------------------------------------------------------


def test_each_line_is_told_once_and_only_when_it_is_whole(stub: Stub) -> None:
    told: list[dict[str, Any]] = []
    ended = stub.attempt()
    follow = Follower(ended, told.append)
    follow.once()
    rundir.append_line(ended.events, {"event": "started", "time": 1.0})
    rundir.append_line(ended.metrics, {"step": 1, "time": 3.0})
    with ended.events.open("ab") as file:
        file.write(b'{"event": "sealed", "ti')
        file.flush()
        follow.once()
        assert [row["time"] for row in told] == [1.0, 3.0]
        file.write(b'me": 2.0}\nnot json\n')
    follow.once()
    follow.once()
    assert [row["time"] for row in told] == [1.0, 3.0, 2.0]


def test_one_bad_answer_of_the_file_server_is_not_worth_a_run(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single ESTALE while the launcher read what rank 0 reports ended a healthy run with 70."""
    told: list[dict[str, Any]] = []
    attempt = stub.attempt()
    follow = Follower(attempt, told.append)
    for row in ({"step": 1, "time": 1.0}, {"step": 2}, {"time": None}):
        rundir.append_line(attempt.metrics, row)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", stale)
        patch.setattr(rundir, "append_line", stale)
        follow.once()
        supervise.remember(attempt, "node ended", node=0)
        assert told == []
    follow.once()
    assert [row["step"] for row in told] == [1]


def stale(*_: Any, **__: Any) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")
