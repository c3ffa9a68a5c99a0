"""On a node: torchrun is started as planned, and whatever happens to whom, no rank stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import account, cause, rundir, shard_folder
from launcher.errors import ExitCode, HostError
from launcher.hosts import Host
from launcher.marks import VARIABLE
from launcher.node import OVER, Node, head_address, interface_to, torchrun_argv
from launcher.rundir import Attempt
from tests.conftest import Stub, gone, wait_until


def test_torchrun_is_told_everything_by_arguments_that_hold_no_value_of_the_recipe() -> None:
    hosts = [Host("a", 4), Host("b", 3)]
    meeting = {"address": "10.0.0.1", "port": 29500, "id": "0f"}
    assert torchrun_argv("/usr/bin/python3", hosts, 1, meeting, Path("/runs/x/attempts/0003"), None) == [
        "/usr/bin/python3",
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=3",
        "--rdzv-backend=speechctl",
        "--rdzv-endpoint=10.0.0.1:29500",
        "--rdzv-conf=rank=1",
        "--max-restarts=0",
        "--log-dir=/runs/x/attempts/0003/logs/torchrun",
        "-m",
        "launcher.worker",
        "train",
        "/runs/x/attempts/0003",
    ]


@contextmanager
def node(stub: Stub, attempt: Attempt, ranks: int = 2, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`launcher.node` under way, its ranks training."""
    command = (sys.executable, "-m", "launcher.node", str(attempt.root), "0")
    with stub.start(*command, stdin=subprocess.PIPE, **options) as process:
        if ranks:
            stub.wait_for_ranks(ranks)
        yield process


def let_go(process: subprocess.Popen[str]) -> None:
    """What the node sees of a launcher that is gone."""
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None


def test_torchrun_gets_the_variables_of_the_attempt_and_no_others(stub: Stub) -> None:
    stub.behave("train 1", "train 1")
    attempt = stub.attempt()
    with node(stub, attempt, ranks=0, env={**stub.env, "AWS_SECRET": "hush"}) as process:
        assert process.wait(20) == 0
    seen = rundir.read_json(attempt.root / "torchrun.json")
    meeting = rundir.read_json(attempt.rendezvous)
    hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts)]
    listening = int(next(word for word in seen["argv"] if word.startswith("--rdzv-conf")).partition("listening=")[2])
    assert seen["argv"] == torchrun_argv(sys.executable, hosts, 0, meeting, attempt.root, listening)
    assert seen["cwd"] == str(attempt.root)
    marks = {VARIABLE: seen["variables"].get(VARIABLE, "")}
    assert re.fullmatch(rf"/proc/{process.pid}/fd/\d+", marks[VARIABLE])
    given = rundir.read_json(attempt.env)["variables"] | {"PET_RDZV_ID": meeting["id"]}
    given[shard_folder.VARIABLE] = str(attempt.root / "shards-000")
    assert seen["variables"] == {**given, **marks, **lc_ctype(seen["variables"])}
    assert not [word for word in seen["argv"] if meeting["id"] in word], "all users of a machine see a command line"
    assert attempt.rendezvous.stat().st_mode & 0o777 == 0o600
    record = rundir.read_json(attempt.node(0))
    assert (record["returncode"], record["asked"], record["killed"]) == (0, None, None)


def lc_ctype(variables: dict[str, str]) -> dict[str, str]:
    """Python sets it by itself where the locale is C."""
    return {"LC_CTYPE": variables["LC_CTYPE"]} if "LC_CTYPE" in variables else {}


def test_ranks_seal_and_end_when_the_launcher_is_gone(stub: Stub) -> None:
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        pids = stub.pids()
        assert len(pids) == 3 and len({os.getsid(pid) for pid in pids}) == 3, "each has a session of its own"
        let_go(process)
        assert gone(pids, within_s=5)
        assert process.wait(5) == 0
    assert rundir.read_json(attempt.exit)["code"] == 75
    record = rundir.read_json(attempt.node(0))
    assert (record["asked"], record["killed"]) == ("the launcher went away", None)


def test_a_rank_that_torchrun_starts_after_the_launcher_is_gone_is_ended_too(stub: Stub) -> None:
    """torchrun takes seconds to import torch; ranks that came up after the signal used to train through the grace."""
    stub.behave("train", "train", start_s=1)
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt, ranks=0) as process:
        wait_until((attempt.root / "torchrun.json").exists)
        let_go(process)
        process.wait(10)
    assert gone(stub.pids(), within_s=0)


def test_ranks_that_do_not_end_are_killed_when_the_grace_is_over(stub: Stub) -> None:
    stub.behave("deaf", "deaf")
    attempt = stub.attempt(stop_grace_s=0.7)
    with node(stub, attempt) as process:
        pids, began = stub.pids(), time.monotonic()
        let_go(process)
        assert gone(pids, within_s=5)
        assert time.monotonic() - began > 0.7, "they were to have this time"
        assert process.wait(5) == 1
    assert rundir.read_json(attempt.node(0))["killed"] == (
        "the launcher went away, and launch.stop_grace, 0.7 s, was over"
    )


def test_a_request_to_stop_has_the_same_grace(stub: Stub) -> None:
    stub.behave("deaf", "train")
    attempt = stub.attempt(stop_grace_s=0.5)
    with node(stub, attempt) as process:
        attempt.run.stop_request.write_text("{}")
        assert process.wait(10) == 1
        assert gone(stub.pids(), within_s=1)
    assert rundir.read_json(attempt.node(0))["killed"].startswith("a stop was asked for")


def test_sigterm_lets_the_ranks_seal(stub: Stub) -> None:
    """As scancel, a preemption or the end of a time limit say it, before SIGKILL."""
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        process.terminate()
        assert gone(stub.pids(), within_s=10)
        assert process.wait(10) == 0
    assert "SIGTERM" in rundir.read_json(attempt.node(0))["asked"]
    assert rundir.read_json(attempt.exit)["code"] == ExitCode.STOPPED


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word)
    process.stdin.flush()


def test_the_launcher_can_ask_for_a_gentle_end_and_for_one_at_once(stub: Stub) -> None:
    """Signals do not cross ssh; words on its standard input do."""
    stub.behave("deaf", "deaf")
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        say(process, "end\n")
        assert not gone(stub.pids(), within_s=0.5)
        say(process, "kill\n")
        assert process.wait(5) == 1
        assert gone(stub.pids(), within_s=0)
    record = rundir.read_json(attempt.node(0))
    assert (record["asked"], record["killed"]) == ("another node had ended", "the launcher was told to end at once")


def test_both_words_are_heard_that_are_read_together(stub: Stub) -> None:
    """Of a node that was asked and then told, without time between, the record said that nobody had asked."""
    stub.behave("deaf", "deaf")
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        say(process, "end\nkill\n")
        assert process.wait(20) == 1
    record = rundir.read_json(attempt.node(0))
    assert (record["asked"], record["killed"]) == ("another node had ended", "the launcher was told to end at once")


def test_a_launcher_that_renews_no_lease_is_taken_for_gone(stub: Stub) -> None:
    """A cable that is out closes no standard input."""
    attempt = stub.attempt(stop_grace_s=100)
    rundir.write_json(attempt.env, {**rundir.read_json(attempt.env), "lease_s": 2})
    with node(stub, attempt, ranks=0) as process:
        began, beat = time.monotonic(), 0
        while time.monotonic() - began < 3 or not attempt.events.exists():
            attempt.lease.write_text(str(beat := beat + 1))
            time.sleep(0.1)
        assert process.poll() is None
        assert process.wait(20) == 0
        assert gone(stub.pids(), within_s=0)
    assert rundir.read_json(attempt.node(0))["asked"] == "nothing was heard of the launcher for 2 s"


def test_a_file_server_that_does_not_answer_is_no_launcher_that_is_gone(stub: Stub) -> None:
    """One that starts again is silent for longer than a lease, and healthy runs were ended by that."""
    attempt = stub.attempt(stop_grace_s=100)
    rundir.write_json(attempt.env, {**rundir.read_json(attempt.env), "lease_s": 5})
    pipe, renewed = attempt.root / "pipe", attempt.root / "renewed"
    os.mkfifo(pipe)  # who reads it waits
    with node(stub, attempt, ranks=0) as process:
        beat = 1
        while not attempt.events.exists():
            attempt.lease.write_text(str(beat := beat + 1))
            time.sleep(0.1)
        attempt.lease.write_text("1")
        time.sleep(0.7)  # so that this is what was read last
        pipe.replace(attempt.lease)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(6)
        with attempt.lease.open("w") as lease:
            lease.write("1")  # as it was before the silence
            renewed.write_text("1")
            renewed.replace(attempt.lease)
        time.sleep(0.7)
        for beat in range(40):
            attempt.lease.write_text(f"later {beat}")
            time.sleep(0.1)
        assert process.poll() is None
        assert process.wait(20) == 0
    assert rundir.read_json(attempt.node(0))["asked"] == "nothing was heard of the launcher for 5 s"


def test_a_node_that_no_word_reaches_reads_that_the_lease_is_over(stub: Stub) -> None:
    """ssh to it may be lost and the file system not."""
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        attempt.lease.write_bytes(OVER)
        assert process.wait(5) == 0
    assert rundir.read_json(attempt.node(0))["asked"] == "another node had ended"


@pytest.mark.parametrize("victim", ["node", "torchrun"])
def test_ranks_end_with_their_parents_whatever_kills_those(stub: Stub, victim: str) -> None:
    stub.behave("deaf", "deaf")
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        pids = stub.pids()
        torchrun = rundir.read_json(attempt.root / "torchrun.json")["pid"]
        os.kill(process.pid if victim == "node" else torchrun, signal.SIGKILL)
        assert gone(pids, within_s=5)
        assert process.wait(5) == (-9 if victim == "node" else 1)


def test_a_death_is_seen_although_the_other_ranks_hear_nothing(stub: Stub) -> None:
    """Blocked in a library, at the start, they never look whether SIGTERM came, and torchrun waits for 30 s. What it
    says of those that were killed for that is no cause."""
    stub.behave("deaf", "kill 0.5", patience_s=30)
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        began = time.monotonic()
        assert process.wait(20) == 1
        assert time.monotonic() - began < 15
        assert gone(stub.pids(), within_s=0)
    record = rundir.read_json(attempt.node(0))
    assert record["killed"] is None and record["silenced"] == [rundir.read_json(attempt.rank(0))["pid"]]
    assert account.of_torchrun(attempt.node_log(0)) == [(1, -9), (0, -9)]
    rundir.write_json(attempt.rank_failure(1), {"rank": 1, "time": 1.0, "lost_peer": True, "message": "", "type": ""})
    assert cause.conclude(attempt, [1]) == 76
    assert rundir.read_json(attempt.failure)["rank"] == 1


def test_a_rank_that_came_to_its_end_is_no_death(stub: Stub) -> None:
    """The others may be sealing, and have the time for it."""
    stub.behave("deaf 5", "deaf 350")
    attempt = stub.attempt(stop_grace_s=100)
    with node(stub, attempt) as process:
        assert process.wait(30) == 0
    assert rundir.read_json(attempt.node(0))["silenced"] == []


def test_what_a_rank_started_ends_with_the_ranks(stub: Stub) -> None:
    stub.behave("child 150", "train 150")
    attempt = stub.attempt()
    with node(stub, attempt) as process:
        child = rundir.read_json(attempt.root / "child.json")["pid"]
        assert not gone({child}, within_s=0)
        assert process.wait(30) == 0
        assert gone({child}, within_s=1)


def test_a_person_can_start_a_node_by_hand_from_anywhere(stub: Stub, tmp_path: Path) -> None:
    """Also from a directory that has a `launcher` or a `torch` of its own."""
    stub.behave("train 1", "train 1")
    attempt = stub.attempt()
    for name in ("launcher", "torch", "psutil"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not me')")
    with stub.start("bash", str(attempt.node_script), "0", stdin=subprocess.PIPE) as process:
        assert process.wait(20) == 0, process.communicate()[1]
    assert rundir.read_json(attempt.exit)["code"] == 0


def test_another_node_waits_for_the_head_node_and_says_what_it_waited_for(stub: Stub) -> None:
    attempt = stub.attempt()
    rundir.write_json(attempt.env, {**rundir.read_json(attempt.env), "rendezvous_timeout_s": 0.3})
    rundir.write_json(attempt.hosts, [{"name": "a", "slots": 1}, {"name": "b", "slots": 1}])
    head, other = Node(attempt, 0), Node(attempt, 1)
    other.stdin_is_open = False  # it is pytest's
    with pytest.raises(HostError, match=r"a, the head node, has not said .*: b found no .*rendezvous\.json in 0\.3 s"):
        other.meet()
    assert other.culprit == 0, "the one that waited is not to be avoided for that"
    meeting = head.meet()
    assert other.meet() == meeting
    assert 1024 <= meeting["port"] < 65536 and meeting["address"] == "127.0.0.1"
    assert json.loads(attempt.rendezvous.read_text()) == meeting


@pytest.mark.parametrize(
    ("hosts", "address"),
    [
        ([Host("localhost", 2)], "127.0.0.1"),
        ([Host("192.0.2.7", 1), Host("b", 1)], "192.0.2.7"),
        ([Host("2001:db8::7", 1), Host("b", 1)], "2001:db8::7"),
        ([Host("localhost", 1, address="192.0.2.9"), Host("b", 1)], "192.0.2.9"),
    ],
)
def test_the_head_has_an_address_that_the_others_reach(hosts: list[Host], address: str) -> None:
    assert head_address(hosts) == address


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("localhost", "on localhost, its own name means .*, where no other host"), ("no-such.invalid", "cannot resolve")],
)
def test_a_head_that_others_cannot_reach_says_so(name: str, complaint: str) -> None:
    """Debian gives a machine's own name 127.0.1.1, and the others waited there for minutes."""
    with pytest.raises(HostError, match=complaint) as caught:
        head_address([Host(name, 2), Host("b", 2)])
    assert f"{name} slots=2 address=" in caught.value.hint


def test_in_a_job_the_head_is_where_it_has_the_way_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Debian's `127.0.1.1 NAME` a job on several nodes was told to edit a hostfile, and SLURM has none."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(HostError, match="where no other host reaches it") as caught:
        head_address([Host("localhost", 2), Host("127.0.0.1", 2)])
    assert caught.value.hint == "have /etc/hosts on localhost give it the address at which 127.0.0.1 reaches it"
    found = [a.address for some in psutil.net_if_addrs().values() for a in some if a.family == socket.AF_INET]
    ours = next((a for a in found if not a.startswith("127.")), None)
    if ours is None:
        pytest.skip("this machine has no network")
    assert head_address([Host("localhost", 2), Host(ours, 2)]) == ours


def test_the_interface_is_the_one_with_the_way() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no address") is None


def test_what_failed_on_a_node_before_torchrun_is_in_its_record(stub: Stub) -> None:
    attempt = stub.attempt()
    rundir.write_json(attempt.env, {**rundir.read_json(attempt.env), "address": "192.0.2.1"})
    with node(stub, attempt, ranks=0) as process:
        assert process.wait(10) == 1
    error = rundir.read_json(attempt.node(0))["error"]
    assert error["message"].startswith("localhost cannot listen at 192.0.2.1: ") and error["code"] == 3
    assert "error: localhost cannot listen" in attempt.node_log(0).read_text()
