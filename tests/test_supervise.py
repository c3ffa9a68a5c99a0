"""One attempt, from start to exit code: nothing is called a success that is none, and the first cause is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import environment, rundir, supervise
from launcher.errors import ExitCode
from launcher.rundir import Attempt, Run
from tests.conftest import Stub, gone, wait_until

GOLDEN = Path(__file__).parent / "golden" / "torchrun"


@contextmanager
def launched(stub: Stub, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`speechctl launch` under way, its ranks training."""
    with stub.start(*stub.command, "launch", "stub.yaml", **options) as process:
        stub.wait_for_ranks()
        yield process


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    os.kill(process.pid, number)


def failure_of(stub: Stub) -> dict[str, Any]:
    value: dict[str, Any] = rundir.read_json(stub.run.attempts()[-1].failure)
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
    assert rundir.read_json(stub.run.stop_request)["why"] == "signal 2 to the launcher"
    assert "stopping: the ranks finish their step and seal it" in stderr
    assert gone(stub.pids(), within_s=0)


def test_a_signal_that_comes_twice_at_once_is_one_wish(stub: Stub) -> None:
    """Ctrl-C reaches the launcher from the terminal, and again from `uv run` or make, which pass it on."""
    with launched(stub) as process:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            interrupt(process, number)
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == ExitCode.STOPPED
    assert "ending the ranks now" not in stderr


def test_a_second_ctrl_c_ends_the_ranks(stub: Stub) -> None:
    stub.behave("deaf", "deaf")
    stub.recipe.write_text(stub.recipe.read_text().replace("stop_grace: 2s", "stop_grace: 100s"))
    with launched(stub) as process:
        pids = stub.pids()
        interrupt(process)
        time.sleep(supervise.AT_ONCE_S + 0.2)
        assert not gone(pids, within_s=0)
        interrupt(process)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == ExitCode.INFRASTRUCTURE
    assert gone(pids, within_s=0)
    assert "error: the ranks were killed before their work was sealed: the launcher was told to end at once" in stderr


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
    assert rundir.holder(stub.run) is None
    done = stub.speechctl("status", str(stub.run.root))
    assert "state   stopped on request, with its work sealed" in done.stdout  # the ranks had the time to seal


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "code", "rank", "message"),
    [
        (("raise", "lost"), 1, 0, "rank 0: ValueError: boom of rank 0"),
        (("lost", "raise 0.3"), 1, 1, "rank 1: ValueError: boom of rank 1"),
        (("raise 1", "data 0.3"), 5, 1, "shard 3 has changed"),
        (("lost", "kill 0.5"), 76, 1, "rank 1 was ended by SIGKILL; the kernel does that when memory runs out"),
        # torchrun ends the deaf one by SIGKILL in the end, which is not what went wrong.
        (("deaf", "raise 0.3"), 1, 1, "rank 1: ValueError: boom of rank 1"),
        (("no import", "no import"), 76, None, "rank 0 ended with code 1 without a word: "),
    ],
)
def test_the_first_cause_is_named(stub: Stub, ranks: tuple[str, str], code: int, rank: int, message: str) -> None:
    stub.behave(*ranks, patience_s=0.5)
    done = stub.speechctl("launch", "stub.yaml")
    failure = failure_of(stub)
    assert (done.returncode, failure["code"]) == (code, code), done.stderr
    assert failure["rank"] == rank
    assert failure["message"].startswith(message)
    assert done.stderr.count("error: ") == 1 and f"error: {message}" in done.stderr
    assert Path(failure["evidence"]).exists() and failure["evidence"] in done.stderr
    assert "hint: " in done.stderr
    assert gone(stub.pids(), within_s=0)


def test_a_worker_that_cannot_be_imported_is_explained_by_its_exception(stub: Stub) -> None:
    stub.behave("no import", "no import")
    stub.speechctl("launch", "stub.yaml")
    assert failure_of(stub)["message"].endswith("No module named no_such_worker")


def test_a_taken_port_is_explained_by_what_torchrun_said(stub: Stub) -> None:
    stub.behave(says=(GOLDEN / "port-taken.txt").read_text())
    assert stub.speechctl("launch", "stub.yaml").returncode == ExitCode.INFRASTRUCTURE
    message = failure_of(stub)["message"]
    assert message.startswith(
        "the ranks ended without a word: torch.distributed.DistNetworkError: The server socket has"
    )
    assert message.endswith("address already in use")


def test_a_node_that_is_killed_is_said_to_be(stub: Stub) -> None:
    with launched(stub) as process:
        pids = stub.pids()
        (node,) = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(node), signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode == ExitCode.INFRASTRUCTURE
    assert failure_of(stub)["message"].startswith("the process of node 0 was ended by SIGKILL")
    assert gone(pids, within_s=5)


def test_without_bash_there_is_an_error_and_not_a_traceback(stub: Stub) -> None:
    done = stub.speechctl("launch", "stub.yaml", env={**stub.env, "PATH": "/nowhere"})
    assert done.returncode == ExitCode.HOST
    assert done.stderr.endswith(
        "error: localhost cannot start bash: No such file or directory\n\nhint: install bash there, or mend PATH\n"
    )


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda a: (a.root / "interpreter").write_text("/no/such/python\n"), "/no/such/python"),
        (lambda a: (a.root / "interpreter").unlink(), "interpreter: No such file or directory"),
        (lambda a: a.node_script.unlink(), "node.sh: No such file or directory"),
        (lambda a: a.env.unlink(), "TypeError"),
    ],
)
def test_a_node_that_cannot_start_is_explained_by_its_log(stub: Stub, damage: Any, complaint: str) -> None:
    attempt = stub.attempt()
    damage(attempt)
    told: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", stub.env["PYTHONPATH"])
        code = supervise.run_attempt(attempt, stub.plan(), told.append)
    assert code == ExitCode.INFRASTRUCTURE
    assert complaint in failure_of(stub)["message"] + attempt.node_log(0).read_text()
    assert failure_of(stub)["evidence"] == str(attempt.node_log(0))
    assert "without a word: " in failure_of(stub)["message"]


# The verdict, from files alone ----------------------------------------------------------------------------------------


def record(attempt: Attempt, rank: int, time_s: float, message: str, *, lost: bool = False, code: int = 1) -> None:
    value = {"rank": rank, "time": time_s, "type": "ValueError", "message": message, "hint": None}
    rundir.write_json(attempt.rank_failure(rank), {**value, "code": code, "lost_peer": lost})


@pytest.fixture
def ended(tmp_path: Path) -> Attempt:
    """An attempt whose every process is gone and which has said nothing yet."""
    root = tmp_path / "run"
    root.mkdir()
    attempt = Run(root).new_attempt()
    rundir.write_json(attempt.node(0), {"host": "here", "returncode": 1, "asked": None, "killed": None})
    return attempt


def verdict(attempt: Attempt, *returncodes: int) -> tuple[int, int | None, str]:
    code = supervise.conclude(attempt, returncodes or (1,))
    failure = rundir.read_json(attempt.failure)
    assert failure["code"] == code and failure["hint"]
    return code, failure["rank"], failure["message"]


@pytest.mark.parametrize(("code", "returncode"), [(0, 0), (75, 0), (0, 1), (75, 1), (0, -9)])
def test_exit_json_is_the_truth_once_it_is_there(ended: Attempt, code: int, returncode: int) -> None:
    rundir.write_json(ended.exit, {"code": code, "step": 5, "sealed_step": 5})
    assert supervise.conclude(ended, [returncode]) == code
    assert not ended.failure.exists()


@pytest.mark.parametrize("returncode", [0, 1, -9, 127])
def test_without_exit_json_it_is_never_a_success(ended: Attempt, returncode: int) -> None:
    rundir.write_json(ended.node(0), {"host": "here", "returncode": returncode, "asked": None, "killed": None})
    assert verdict(ended, returncode)[0] == ExitCode.INFRASTRUCTURE
    ended.failure.unlink()
    record(ended, 0, 1.0, "it says that all is well", code=0)
    assert verdict(ended, returncode)[0] == ExitCode.BUG


def test_the_earliest_cause_wins_and_a_lost_peer_is_none(ended: Attempt) -> None:
    record(ended, 0, 1.0, "Connection reset by peer", lost=True, code=76)
    record(ended, 1, 3.0, "late")
    record(ended, 2, 2.0, "early")
    assert verdict(ended) == (1, 2, "rank 2: ValueError: early")


def test_only_lost_peers_are_reported_as_that(ended: Attempt) -> None:
    record(ended, 1, 1.0, "Connection reset by peer", lost=True, code=76)
    record(ended, 0, 2.0, "Broken pipe", lost=True, code=76)
    assert verdict(ended) == (76, 1, "rank 1 lost its peers: Connection reset by peer")


def test_a_killed_rank_is_read_from_the_summary_of_the_real_torchrun(ended: Attempt) -> None:
    summary = (GOLDEN / "rank-killed.txt").read_text()
    ended.node_log(0).write_text(summary)
    record(ended, 0, 1.0, "Connection closed by peer", lost=True, code=76)
    killed = (76, 1, "rank 1 was ended by SIGKILL; the kernel does that when memory runs out")
    assert verdict(ended) == killed
    # A peer that names its loss in words that we do not know is no cause either.
    record(ended, 0, 1.0, "Something about a connection")
    assert verdict(ended) == killed
    # But a rank that raised and then died on its way out has said why.
    record(ended, 1, 1.0, "the true reason")
    assert verdict(ended)[2] == "rank 0: ValueError: Something about a connection"
    ended.rank_failure(0).unlink()
    assert verdict(ended)[2] == "rank 1: ValueError: the true reason"


def test_ranks_that_torchrun_ended_are_not_the_cause(ended: Attempt) -> None:
    """It terminates the others, and kills those that do not end in 30 s; both are in its summary."""
    summary = (GOLDEN / "rank-killed.txt").read_text()
    summary = summary.replace("-9 (pid: 8762)  (SIGKILL)", "1 (pid: 8762)").replace("-15 (pid", "-9 (pid")
    ended.node_log(0).write_text(summary)
    record(ended, 1, 1.0, "boom")
    assert verdict(ended) == (1, 1, "rank 1: ValueError: boom")


def test_an_abort_for_want_of_a_peer_is_not_the_cause(ended: Attempt) -> None:
    ended.node_log(0).write_text((GOLDEN / "rank-killed.txt").read_text().replace("-9 (pid", "-6 (pid"))
    assert verdict(ended) == (76, 1, "rank 1 was ended by SIGABRT")
    record(ended, 0, 1.0, "boom")
    assert verdict(ended) == (1, 0, "rank 0: ValueError: boom")


def test_ranks_that_the_node_killed_are_told_from_those_that_died(ended: Attempt) -> None:
    node = {"host": "here", "returncode": -9, "asked": "a stop was asked for", "killed": "the grace was over"}
    rundir.write_json(ended.node(0), node)
    assert verdict(ended) == (76, None, "the ranks were killed before their work was sealed: the grace was over")
    rundir.write_json(ended.node(0), {**node, "killed": None})
    assert verdict(ended) == (76, None, "the ranks ended before their work was sealed: a stop was asked for")
    record(ended, 1, 1.0, "boom")
    assert verdict(ended) == (1, 1, "rank 1: ValueError: boom")


def test_torchrun_itself_can_be_killed(ended: Attempt) -> None:
    rundir.write_json(ended.node(0), {"host": "here", "returncode": -9, "asked": None, "killed": None})
    assert verdict(ended)[2].startswith("torchrun on here was ended by SIGKILL")


# What is told meanwhile -----------------------------------------------------------------------------------------------


def test_each_line_is_told_once_and_only_when_it_is_whole(ended: Attempt) -> None:
    told: list[dict[str, Any]] = []
    follow = supervise.Follower(ended, told.append)
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
