"""The first cause of an attempt's end, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import cause, rundir
from launcher.errors import ExitCode
from launcher.failure import KINDS, Failure
from launcher.node import SILENCE, STOP
from launcher.rundir import Attempt, Run
from launcher.worker.__main__ import lost_peer
from tests.faults.table import TABLE, Cell

GOLDEN = Path(__file__).parent / "golden" / "torchrun"
NODE = {"returncode": 1, "asked": None, "killed": None}


def record(attempt: Attempt, rank: int, time_s: float, message: str, *, lost: bool = False, **more: Any) -> None:
    value = {"rank": rank, "time": time_s, "type": "ValueError", "message": message, "hint": None, "code": 1}
    rundir.write_json(attempt.rank_failure(rank), {**value, "lost_peer": lost, **more})


@pytest.fixture
def ended(tmp_path: Path) -> Attempt:
    """An attempt on two hosts of two ranks, whose every process is gone and which has said nothing yet."""
    root = tmp_path / "run"
    root.mkdir()
    attempt = Run(root).new_attempt()
    rundir.write_json(attempt.hosts, [{"name": "a", "slots": 2}, {"name": "b", "slots": 2}])
    for k in range(2):
        rundir.write_json(attempt.node(k), {"host": "here", **NODE})
    return attempt


def verdict(attempt: Attempt, *returncodes: int, order: tuple[int, ...] = (0, 1)) -> tuple[str, int | None, str]:
    code = cause.conclude(attempt, returncodes or (1, 1), order)
    found = rundir.read_json(attempt.failure)
    assert found["code"] == code == KINDS[found["kind"]][0] and found["hint"] and found["evidence"]
    assert Failure.from_json(found).to_json() == found
    return found["kind"], found["rank"], found["message"]


def test_the_table_of_faults_and_the_kinds_of_failure_agree() -> None:
    cells = [cell for row in TABLE.values() for cell in row.values() if isinstance(cell, Cell)]
    assert cells and all(KINDS[cell.kind] == (cell.code, cell.verdict) for cell in cells)


@pytest.mark.parametrize(("code", "returncode"), [(0, 0), (75, 0), (0, 1), (75, 1), (0, -9)])
def test_exit_json_is_the_truth_once_it_is_there(ended: Attempt, code: int, returncode: int) -> None:
    ended.run.stop_request.parent.mkdir()
    ended.run.stop_request.touch()
    rundir.write_json(ended.exit, {"code": code, "step": 5, "sealed_step": 5})
    assert cause.conclude(ended, [returncode]) == code
    assert not ended.failure.exists()


def test_ranks_that_sealed_because_a_node_was_lost_are_not_a_stop(ended: Attempt) -> None:
    """The launcher had told the others to end, and they still could seal. The run ended there, as if asked to."""
    rundir.write_json(ended.exit, {"code": 75, "step": 5, "sealed_step": 5})
    rundir.write_json(ended.node(1), {"host": "here", "returncode": None, "asked": None, "killed": None})
    assert verdict(ended, 0, -9, order=(1, 0))[0] == "node lost"
    ended.failure.unlink()
    ended.run.stop_request.parent.mkdir()
    ended.run.stop_request.touch()
    assert cause.conclude(ended, [0, -9], (1, 0)) == ExitCode.STOPPED, "here somebody had asked"


@pytest.mark.parametrize(
    ("asked", "kind", "culprit"),
    [
        ((None, "the node was sent SIGTERM, as by SLURM before it ends a job"), "node lost", "node 1 on b"),
        ((None, f"{SILENCE} for 30 s"), "node lost", "node 1 on b"),
        ((f"{SILENCE} for 30 s", f"{SILENCE} for 30 s"), "launcher lost", "all nodes"),
        ((None, None), "killed", "SIGTERM"),
    ],
)
def test_ranks_that_sealed_though_nobody_asked_for_a_stop_go_on(
    ended: Attempt, asked: tuple[str | None, ...], kind: str, culprit: str
) -> None:
    """A host was rebooted, a rank was sent SIGTERM, a launcher lay suspended: all ranks sealed, the run ended as
    "stopped on request", and nobody started it again."""
    rundir.write_json(ended.exit, {"code": 75, "step": 5, "sealed_step": 5})
    for k in range(2):
        rundir.write_json(ended.node(k), {"host": "here", **NODE, "returncode": 0, "asked": asked[k]})
    found, _, message = verdict(ended, 0, 0)
    assert found == kind and culprit in message
    assert KINDS[kind][1] == "again"
    ended.failure.unlink()
    ended.srun_log(0).touch()
    if kind != "launcher lost":
        assert cause.conclude(ended, [0, 0]) == ExitCode.STOPPED, "the batch script has such a job queued again"
    ended.srun_log(0).unlink()
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "returncode": 0, "asked": STOP})
    assert cause.conclude(ended, [0, 0]) == ExitCode.STOPPED, "it was asked for, and the file is gone since"


@pytest.mark.parametrize("returncode", [0, 1, -9, 127])
def test_without_exit_json_it_is_never_a_success(ended: Attempt, returncode: int) -> None:
    for k in range(2):
        rundir.write_json(ended.node(k), {"host": "here", **NODE, "returncode": returncode})
    assert verdict(ended, returncode, returncode)[0] in ("node failed", "killed")
    ended.failure.unlink()
    record(ended, 0, 1.0, "it says that all is well", code=0)
    assert verdict(ended, returncode, returncode)[0] == "bug"


def test_the_earliest_cause_wins_and_a_lost_peer_is_none(ended: Attempt) -> None:
    record(ended, 0, 1.0, "Connection reset by peer", lost=True, code=76)
    record(ended, 2, 3.0, "late")
    record(ended, 3, 2.0, "early")
    assert verdict(ended) == ("training", 3, "rank 3 on b: ValueError: early")


def test_clocks_of_two_hosts_are_not_compared(ended: Attempt) -> None:
    """Host a is an hour behind; what the launcher saw end first is first."""
    record(ended, 0, 1.0, "late, by a clock that is slow")
    record(ended, 2, 3600.0, "early")
    assert verdict(ended, order=(1, 0))[1] == 2
    assert verdict(ended, order=(0, 1))[1] == 0


def test_only_lost_peers_are_reported_as_that(ended: Attempt) -> None:
    record(ended, 1, 1.0, "Connection reset by peer", lost=True, code=76)
    record(ended, 0, 2.0, "Broken pipe", lost=True, code=76)
    assert verdict(ended) == ("lost peer", 1, "rank 1 on a lost its peers: Connection reset by peer")


def test_a_killed_rank_is_read_from_the_summary_of_the_real_torchrun(ended: Attempt) -> None:
    summary = (GOLDEN / "rank-killed.txt").read_text()
    ended.node_log(0).write_text(summary)
    record(ended, 0, 1.0, "Connection closed by peer", lost=True, code=76)
    killed = ("killed", 1, "rank 1 on a was ended by SIGKILL")
    assert verdict(ended) == killed
    # A peer that names its loss in words that we do not know is no cause either, here or elsewhere.
    record(ended, 0, 1.0, "Something about a connection")
    assert verdict(ended) == killed
    record(ended, 3, 0.5, "Something about a connection")
    assert verdict(ended, order=(1, 0)) == killed
    # But a rank that raised and then died on its way out has said why.
    ended.rank_failure(3).unlink()
    record(ended, 1, 1.0, "the true reason")
    assert verdict(ended)[2] == "rank 0 on a: ValueError: Something about a connection"
    ended.rank_failure(0).unlink()
    assert verdict(ended)[2] == "rank 1 on a: ValueError: the true reason"


def test_ranks_that_torchrun_ended_are_not_the_cause(ended: Attempt) -> None:
    """It terminates the others, and kills those that do not end in 30 s; both are in its summary."""
    summary = (GOLDEN / "rank-killed.txt").read_text()
    summary = summary.replace("-9 (pid: 8762)  (SIGKILL)", "1 (pid: 8762)").replace("-15 (pid", "-9 (pid")
    ended.node_log(0).write_text(summary)
    record(ended, 1, 1.0, "boom")
    assert verdict(ended) == ("training", 1, "rank 1 on a: ValueError: boom")


def test_ranks_that_their_node_or_torchrun_killed_after_a_death_are_not_the_cause(ended: Attempt) -> None:
    """All that rank 0 said is that it lost somebody, on the other node; rank 1 was blocked, and killed for that."""
    record(ended, 0, 1.0, "Connection reset by peer", lost=True, code=76)
    ended.node_log(1).write_text(summary_of((2, -11, 7)))
    words = "Unable to shutdown process 6 via SIGTERM, forcefully exiting via SIGKILL\n"
    for silenced, said in (([6], ""), ([], words)):
        ended.node_log(0).write_text(said + summary_of((0, 1, 5), (1, -9, 6)))
        rundir.write_json(ended.node(0), {"host": "here", **NODE, "silenced": silenced})
        assert verdict(ended, order=(0, 1))[:2] == ("killed", 2)


def test_an_abort_for_want_of_a_peer_is_not_the_cause(ended: Attempt) -> None:
    ended.node_log(0).write_text((GOLDEN / "rank-killed.txt").read_text().replace("-9 (pid", "-6 (pid"))
    assert verdict(ended) == ("killed", 1, "rank 1 on a was ended by SIGABRT")
    record(ended, 0, 1.0, "boom")
    assert verdict(ended) == ("training", 0, "rank 0 on a: ValueError: boom")


def summary_of(*rows: tuple[int, int, int]) -> str:
    """torchrun's summary of a node's ranks, each (rank, code, pid); the first is its root cause."""
    made = [f"  rank      : {rank} (local_rank: 0)\n  exitcode  : {code} (pid: {pid}) x\n" for rank, code, pid in rows]
    return "Failures:\n" + "".join(made[1:]) + "Root Cause (first observed failure):\n" + made[0]


def test_an_abort_on_the_node_that_ends_first_is_not_taken_for_the_death_it_followed(ended: Attempt) -> None:
    """The kernel killed rank 2 for want of memory; NCCL's watchdog then aborted ranks 0 and 1 on the other node, which
    ended first. The run was said to have been killed by SIGABRT, and was started again into the same end."""
    ended.node_log(0).write_text(summary_of((0, -6, 5), (1, -6, 6)))
    ended.node_log(1).write_text(summary_of((2, -9, 7)))
    memory = {"oom_kills": 1, "limit": 2**34, "peak_rss": {"2": 2**34}}
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "asked": "another node had ended", "memory": memory})
    assert verdict(ended, order=(0, 1))[:2] == ("host memory", 2)


NCCL = "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)"


def test_an_error_of_a_connection_is_a_cause_only_where_there_is_no_other(ended: Attempt) -> None:
    """Rank 2 was killed; rank 0 lost it in words of NCCL that we did not know, and training code was blamed."""
    record(ended, 0, 1.0, NCCL, type="DistBackendError")
    ended.node_log(0).write_text(summary_of((0, 1, 5)))
    assert verdict(ended)[:2] == ("training", 0)
    ended.node_log(1).write_text(summary_of((2, -9, 7)))
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "asked": "another node had ended"})
    assert verdict(ended)[:2] == ("killed", 2)


def test_peers_that_lost_a_node_whose_torchrun_was_killed_are_not_named(ended: Attempt) -> None:
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "returncode": -9})
    record(ended, 2, 5.0, "Failed to recv, got 0 bytes. Connection was likely closed.", lost=True, code=76)
    assert verdict(ended) == ("killed", None, "torchrun of node 0 on a was ended by SIGKILL")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RuntimeError", "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"),
        ("RuntimeError", "Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:145] no error"),
        ("DistBackendError", "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"),
        ("DistBackendError", "ncclRemoteError: A call failed possibly due to a network error"),
        ("DistBackendError", "Last error:\nsocketProgress: Connection closed by remote peer gpu-1<41234>"),
        ("DistNetworkError", "Failed to recv, got 0 bytes. Connection was likely closed."),
        ("DistNetworkError", "The client socket has failed to connect to [gpu-1]:29500"),
        ("DistStoreError", "wait timeout: Broken pipe"),
    ],
)
def test_the_words_for_a_lost_peer_are_known(kind: str, said: str) -> None:
    assert lost_peer(type(kind, (RuntimeError,), {})(said))
    assert not lost_peer(ValueError(said)) and not lost_peer(RuntimeError("shapes differ"))


def test_a_rank_that_ends_by_its_own_code_is_named_with_it(ended: Attempt) -> None:
    ended.node_log(0).write_text(
        (GOLDEN / "rank-killed.txt").read_text().replace("-9 (pid: 8762)  (SIGKILL)", "7 (pid: 8762)")
    )
    ended.rank_log(1).write_text("loading\nlicence server said no\n")
    assert verdict(ended) == (
        "training",
        1,
        "rank 1 on a ended with code 7 and without a word: licence server said no",
    )
    assert rundir.read_json(ended.failure)["evidence"] == [str(ended.rank_log(1))]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"code": 77, "type": "OutOfMemoryError", "message": "CUDA out of memory."}, "device memory"),
        ({"code": 77, "type": "MemoryError"}, "host memory"),
        ({"code": 5, "hint": "pack it again"}, "data"),
        ({"code": 74, "hint": "make room"}, "storage"),
        ({"code": 76, "hint": "see the other attempt"}, "superseded"),
        ({"code": 1, "message": "CUDA error: uncorrectable ECC error encountered"}, "device"),
    ],
)
def test_what_a_rank_says_decides_the_kind(ended: Attempt, said: dict[str, Any], kind: str) -> None:
    record(ended, 1, 1.0, **{"message": "boom", **said})
    found, _, message = verdict(ended)
    assert found == kind and message.startswith("rank 1 on a: ")


def test_a_taken_port_is_another_attempt_and_not_a_riddle(ended: Attempt) -> None:
    rundir.write_json(ended.rendezvous, {"address": "127.0.0.1", "port": 29500})
    ended.node_log(0).write_text((GOLDEN / "port-taken.txt").read_text())
    kind, rank, message = verdict(ended)
    assert (kind, rank) == ("port", None)
    assert message.startswith("node 0 on a could not listen at 127.0.0.1 port 29500, which somebody else had taken: ")
    assert message.endswith("address already in use")


def test_ranks_that_the_node_killed_are_told_from_those_that_died(ended: Attempt) -> None:
    node = {"host": "here", "returncode": -9, "asked": "a stop was asked for"}
    rundir.write_json(ended.node(0), {**node, "killed": "a stop was asked for, and launch.stop_grace, 2 s, was over"})
    kind, _, message = verdict(ended)
    assert kind == "stopped by force" and message.startswith("the ranks were killed before their work was sealed: a st")
    rundir.write_json(ended.node(0), {**node, "killed": None})
    message = "the ranks ended before their work was sealed: a stop was asked for"
    assert verdict(ended) == ("stopped by force", None, message)
    ended.run.stop_request.parent.mkdir()
    rundir.write_json(ended.run.stop_request, {"why": "SLURM's warning", "kind": "time limit"})
    assert verdict(ended)[0] == "time limit"
    record(ended, 1, 1.0, "boom")
    assert verdict(ended) == ("training", 1, "rank 1 on a: ValueError: boom")


def test_nodes_that_were_ended_because_another_failed_are_no_cause(ended: Attempt) -> None:
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "asked": "another node had ended", "killed": "at once"})
    record(ended, 0, 1.0, "Connection closed by peer", lost=True, code=76)
    assert verdict(ended) == ("lost peer", 0, "rank 0 on a lost its peers: Connection closed by peer")
    ended.rank_failure(0).unlink()
    ended.node_log(0).write_text("RuntimeError: no more threads\n")
    assert verdict(ended)[2] == "the ranks of node 0 on a ended without a word: RuntimeError: no more threads"


def over_ssh(attempt: Attempt, *said: str) -> None:
    for k, words in enumerate(said):
        attempt.ssh_log(k).write_text(words)


def test_a_node_that_failed_first_comes_before_one_that_was_still_on_its_way(ended: Attempt) -> None:
    """The login to b took long, and we killed it when a had failed: "cannot start a node on b"."""
    over_ssh(ended, "", "")
    ended.node(1).unlink()
    error = {"message": "a shows 1 GPU(s)", "hint": "set slots=1", "code": 4, "node_rank": 0}
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "error": error})
    for returncode in (-9, 255):
        assert verdict(ended, 1, returncode, order=(0, 1)) == ("preflight", None, "a shows 1 GPU(s)")
    assert verdict(ended, 1, 255, order=(1, 0))[0] == "host refused"
    rundir.write_json(ended.node(0), {"host": "here", **NODE})
    assert verdict(ended, 1, 255, order=(0, 1))[0] == "host refused"
    record(ended, 0, 1.0, "boom")
    assert verdict(ended, 1, 255, order=(0, 1))[0] == "training"


def test_the_head_that_was_waited_for_is_named(ended: Attempt) -> None:
    """The node that had waited for it was blamed, and left out of the next attempts."""
    error = {"message": "a, the head node, has not said", "hint": "look", "code": 3, "node_rank": 0}
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "error": error})
    verdict(ended, order=(1, 0))
    found = rundir.read_json(ended.failure)
    assert (found["host"], found["node_rank"]) == ("a", 0)
    assert found["evidence"] == [str(ended.node_log(0)), str(ended.node_log(1))]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("client_loop: send disconnect: Broken pipe", "lost b: {}"),
        ("Timeout, server b not responding.", "lost b: {}"),
        ("Connection to b closed by remote host.", "lost b: {}"),
        ("Read from remote host b: Connection reset by peer", "lost b: {}"),
        ("** The server may need to be upgraded.", "the agent of node 1 on b was ended by a signal, and its ranks wi"),
    ],
)
def test_a_banner_is_no_sign_of_a_lost_host(ended: Attempt, said: str, message: str) -> None:
    """Any text in ssh's log made of an agent that was killed "lost b: ** The server may need to be upgraded"."""
    over_ssh(ended, "", f"Welcome to b\n{said}\nHave a nice day\n")
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "returncode": None})
    assert verdict(ended, 1, 255, order=(1, 0))[2].startswith(message.format(said))


def test_torchrun_itself_can_be_killed(ended: Attempt) -> None:
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "returncode": -9})
    assert verdict(ended, 0, 1) == ("killed", None, "torchrun of node 1 on b was ended by SIGKILL")


def test_an_agent_that_said_nothing_of_its_end_is_a_lost_node(ended: Attempt) -> None:
    rundir.write_json(ended.node(1), {"host": "here", **NODE, "returncode": None})
    record(ended, 0, 1.0, "Connection reset by peer", lost=True, code=76)
    message = "the agent of node 1 on b was ended by SIGKILL, and its ranks with it"
    assert verdict(ended, 1, -9, order=(1, 0)) == ("node lost", None, message)
    assert verdict(ended, 1, -9, order=(0, 1)) == ("node lost", None, message), "its peers only noticed it first"


def test_memory_that_ran_out_is_told_from_other_kills(ended: Attempt) -> None:
    ended.node_log(0).write_text((GOLDEN / "rank-killed.txt").read_text())
    memory = {"oom_kills": 1, "oom_kills_on_machine": 1, "limit": 2**29, "machine": 2**35, "peak_rss": {"1": 2**28}}
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "memory": memory})
    assert verdict(ended) == (
        "host memory",
        1,
        "rank 1 on a was ended by the kernel because memory ran out; it had used 0.25 GiB at least of the 0.50 GiB that"
        " its cgroup may use",
    )
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "memory": {**memory, "oom_kills": 0}})
    assert verdict(ended) == (
        "host memory",
        1,
        "rank 1 on a was ended by SIGKILL, and the kernel ended processes there at that time because memory ran out; it"
        " had used 0.25 GiB at least of the machine's 32.00 GiB",
    )
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "memory": {"oom_kills": 0, "oom_kills_on_machine": 0}})
    assert verdict(ended)[0] == "killed"


def test_a_lost_launcher_is_told_from_an_end_that_somebody_asked_for(ended: Attempt) -> None:
    lost = cause.of_lost_launcher(ended)
    assert lost is not None and (lost.kind, lost.code) == ("launcher lost", ExitCode.INFRASTRUCTURE)
    assert lost.message == "the launcher of attempt 1 went away without a word"
    rundir.write_json(ended.exit, {"code": 75, "step": 5, "sealed_step": 5})
    assert cause.of_lost_launcher(ended) is None
    rundir.write_json(ended.node(0), {"host": "here", **NODE, "asked": "the launcher went away"})
    lost = cause.of_lost_launcher(ended)
    assert lost is not None and lost.message.endswith("; its ranks sealed step 5 and ended")
    rundir.write_json(ended.failure, lost.to_json())
    assert cause.of_lost_launcher(ended) is None
