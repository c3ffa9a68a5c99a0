"""The backend ssh against a small `ssh` on PATH that notes how it was called and runs the command here."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from launcher import environment, recipe_file, rundir, supervise
from launcher.backends import ssh
from launcher.errors import ExitCode, PreflightError, UsageError
from launcher.hosts import Host
from launcher.prepare.session import Session, Unanswered, here_argv
from launcher.recipe_file import RecipeError
from launcher.rundir import Attempt, Run
from tests.conftest import RECIPE, Stub, gone, simulated_python, wait_until

FAKE = """\
#!/usr/bin/env bash
host="${@:$#-1:1}"
case "${@:$#}" in
"exec python3 -c "*) export STUB_HOST="{\\"name\\": \\"$host\\"}" PATH="$SSH_PYTHON:$PATH" ;;
*) printf '%s\\n' "$@" >"$SSH_CALLS/$$" ;;
esac
if [ "$host" = "$SSH_REFUSED" ]; then
  echo "No ED25519 host key is known for $host and you have requested strict checking." >&2
  echo "Host key verification failed." >&2
  exit 255
fi
bash -c "${@:$#}" <&0 &
child=$!
if [ "$host" = "$SSH_LOST" ]; then
  attempt=${@:$#} attempt=${attempt%/node.sh*} attempt=${attempt##* }
  until [ -e "$attempt/node-001.json" ]; do sleep 0.05; done
  sleep 2
  echo "Timeout, server $host not responding." >&2
  kill -KILL $child
  exit 255
fi
wait $child
"""


@pytest.fixture
def two_hosts(stub: Stub) -> Stub:
    """A stub whose recipe names two hosts, of one and of two ranks, both here by way of the small ssh."""
    (stub.root / "bin").mkdir()
    (stub.root / "calls").mkdir()
    fake = stub.root / "bin" / "ssh"
    fake.write_text(FAKE)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    python = simulated_python(stub.root / "python")
    stub.env |= {"SSH_CALLS": str(stub.root / "calls"), "SSH_PYTHON": str(python), "SSH_REFUSED": "", "SSH_LOST": ""}
    stub.env["PATH"] = f"{fake.parent}:{stub.env['PATH']}"
    (stub.root / "hosts").write_text("alpha slots=1 address=127.0.0.1\ntrainer@beta slots=2 port=2222\ngamma slots=1\n")
    launch = "{backend: ssh, hostfile: hosts, exclude: [gamma], stop_grace: 2s, relaunch: {wait: 0.1s}}"
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))
    stub.behave("train", "train", "train")
    return stub


def test_ssh_is_called_so_that_it_fails_closed(tmp_path: Path) -> None:
    """Frozen: a person who reads this list knows all that the options do."""
    (tmp_path / "attempts").mkdir()
    attempt = Attempt(tmp_path / "attempts" / "0003")
    assert ssh.argv(attempt, 1, Host("gpu-02", 8, user="trainer", port=2222)) == [
        *("ssh", "-T"),
        *("-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=yes"),
        *("-o", "ConnectTimeout=10"),
        *("-o", "ServerAliveInterval=5"),
        *("-o", "ServerAliveCountMax=3"),
        *("-o", "ForwardAgent=no"),
        *("-o", "ForwardX11=no"),
        *("-o", "ClearAllForwardings=yes"),
        *("-o", "PermitLocalCommand=no"),
        *("-o", "RemoteCommand=none"),
        *("-o", "ControlMaster=no"),
        *("-o", "ControlPath=none"),
        *("-o", "LogLevel=INFO"),
        *("-l", "trainer"),
        *("-p", "2222"),
        "--",
        "gpu-02",
        f"bash {tmp_path}/attempts/0003/node.sh 1",
    ]
    assert ssh.argv(attempt, 0, Host("2001:db8::1", 8))[-3:-1] == ["--", "2001:db8::1"]


def test_not_more_logins_at_once_than_sshd_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen behind one jump host some were dropped by its sshd, and one such ended the launch."""
    fake = tmp_path / "ssh"
    fake.write_text("#!/bin/sh\nexec cat\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ssh, "LOGIN_S", 60.0)
    run = Run(tmp_path / "run")
    run.root.mkdir()
    made = run.new_attempt()
    nodes = [ssh.start(made, k, Host(f"gpu-{k}", 1)) for k in range(ssh.AT_ONCE)]
    try:
        for k, seen in ((8, lambda: made.node(3).touch()), (9, nodes[5].kill)):
            timer = threading.Timer(0.5, seen)
            timer.start()
            nodes.append(ssh.start(made, k, Host(f"gpu-{k}", 1)))
            assert timer.finished.is_set(), "it waited until one was in, or had ended"
        monkeypatch.setattr(ssh, "LOGIN_S", 0.2)
        nodes.append(ssh.start(made, 10, Host("gpu-10", 1)))  # those that take long are not waited for
    finally:
        for node in nodes:
            node.kill()
            node.communicate()


def test_a_look_that_a_crowded_sshd_drops_is_tried_again(tmp_path: Path) -> None:
    """`prepare` of many hosts behind one jump host called some of them dead that were well."""
    count, closed = tmp_path / "count", "kex_exchange_identification: Connection closed by remote host"
    script = f'echo >>"$0"; [ "$(wc -l <"$0")" -ge "$1" ] && exec "${{@:2}}"; echo "{closed}" >&2; exit 255'
    session = Session(Host("gpu-1", 1), ["bash", "-c", script, str(count), "3", *here_argv()])
    try:
        assert session.connect(time.monotonic() + 30)["python"].startswith("3.")
        assert session.said() == "" and count.read_text() == "\n" * 3
    finally:
        session.close()
    session = Session(Host("gpu-1", 1), ["bash", "-c", script, str(count), "9"])
    try:
        with pytest.raises(Unanswered, match="Connection closed"):
            session.connect(time.monotonic() + 30)
        assert count.read_text() == "\n" * 7, "four tries in all"
    finally:
        session.close()


def test_a_run_on_two_hosts(two_hosts: Stub) -> None:
    two_hosts.behave("train 50", "train 50", "train 50")
    done = two_hosts.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    (attempt,) = two_hosts.run.attempts()
    calls = sorted(path.read_text().splitlines() for path in (two_hosts.root / "calls").iterdir())
    hosts = [Host("alpha", 1, address="127.0.0.1"), Host("beta", 2, user="trainer", port=2222)]
    assert calls == sorted(ssh.argv(attempt, k, host)[1:] for k, host in enumerate(hosts))
    assert rundir.read_json(attempt.hosts) == [host.to_json() for host in hosts]
    argv = rundir.read_json(attempt.root / "torchrun-1.json")["argv"]
    assert argv[3:5] == ["--nnodes=2", "--nproc-per-node=2"] and "--rdzv-conf=rank=1" in argv
    for k in range(2):
        record = rundir.read_json(attempt.node(k))
        assert (record["interface"], record["address"], record["returncode"]) == ("lo", "127.0.0.1", 0)
        assert f"node {k}: the ranks meet at 127.0.0.1" in attempt.node_log(k).read_text()
    assert gone(two_hosts.pids(), within_s=0)


def test_when_one_node_fails_the_others_end_and_the_run_goes_on(two_hosts: Stub) -> None:
    two_hosts.behave("train", "train", "kill 0.5", then=("train 12", "train 12", "train 12"))
    done = two_hosts.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    failure = rundir.read_json(two_hosts.run.attempts()[0].failure)
    assert failure["message"].startswith("rank 2 on beta was ended by SIGKILL"), failure
    assert "attempt 1 failed: rank 2 on beta was ended by SIGKILL" in done.stderr
    assert gone(two_hosts.pids(), within_s=0)


def test_ranks_that_are_deaf_end_too_when_a_node_fails(two_hosts: Stub) -> None:
    two_hosts.behave("deaf", "train", "kill 0.5", then=("train 12", "train 12", "train 12"))
    done = two_hosts.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.FINISHED
    assert "attempt 1 failed: rank 2 on beta was ended by SIGKILL" in done.stderr
    assert gone(two_hosts.pids(), within_s=0)


def test_a_host_that_ssh_refuses_is_named(two_hosts: Stub) -> None:
    began = time.monotonic()
    done = two_hosts.speechctl("launch", "stub.yaml", env={**two_hosts.env, "SSH_REFUSED": "beta"})
    assert done.returncode == ExitCode.HOST
    assert time.monotonic() - began < 20
    assert "error: cannot start a node on beta: Host key verification failed." in done.stderr
    assert "known_hosts: `ssh trainer@beta` asks once" in done.stderr
    assert gone(two_hosts.pids(), within_s=0)


def test_a_host_that_is_lost_is_avoided_while_there_is_a_spare(two_hosts: Stub) -> None:
    """beta is lost at the first attempt; gamma, with as many slots, takes its place at the second."""
    hosts = two_hosts.root / "hosts"
    hosts.write_text(hosts.read_text().replace("gamma slots=1", "gamma slots=2"))
    recipe = two_hosts.recipe.read_text().replace("exclude: [gamma]", "nodes: 2")
    two_hosts.recipe.write_text(recipe)
    two_hosts.behave("deaf", "deaf", "deaf", then=("train 12", "train 12", "train 12"))
    done = two_hosts.speechctl("launch", "stub.yaml", env={**two_hosts.env, "SSH_LOST": "beta"})
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert "attempt 1 failed: lost beta: Timeout, server beta not responding." in done.stderr
    first, second = two_hosts.run.attempts()
    assert [[h["name"] for h in rundir.read_json(a.hosts)] for a in (first, second)] == [
        ["alpha", "beta"],
        ["alpha", "gamma"],
    ]
    (row,) = rundir.read_lines(two_hosts.run.avoided)
    assert (row["host"], row["kind"], row["attempt"]) == ("beta", "node lost", 1)
    assert gone(two_hosts.pids(), within_s=5)


def test_a_host_that_is_lost_without_a_spare_is_used_again_and_that_is_said(two_hosts: Stub) -> None:
    two_hosts.behave("deaf", "deaf", "deaf")
    two_hosts.recipe.write_text(two_hosts.recipe.read_text().replace("wait: 0.1s", "wait: 0.1s, attempts: 2"))
    done = two_hosts.speechctl("launch", "stub.yaml", env={**two_hosts.env, "SSH_LOST": "beta"})
    assert done.returncode == ExitCode.NO_PROGRESS
    assert "beta is used again: no other host can take its place" in done.stderr
    assert "makes no progress: 2 attempts in a row ended without a new checkpoint; the last: lost beta" in done.stderr
    assert gone(two_hosts.pids(), within_s=5)


def test_a_second_ctrl_c_crosses_ssh(two_hosts: Stub) -> None:
    two_hosts.behave("deaf", "deaf", "deaf")
    two_hosts.recipe.write_text(two_hosts.recipe.read_text().replace("stop_grace: 2s", "stop_grace: 100s"))
    said = two_hosts.root / "said"
    with said.open("w") as stderr, two_hosts.start(*two_hosts.command, "launch", "stub.yaml", stderr=stderr) as process:
        pids = two_hosts.wait_for_ranks(3)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "Ctrl-C again ends them at once" in said.read_text())
        time.sleep(supervise.AT_ONCE_S + 0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == ExitCode.INFRASTRUCTURE
        assert gone(pids, within_s=0)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("launch={backend: ssh}", "backend ssh needs launch.hostfile"),
        ("launch={hostfile: hosts}", "are of backend ssh, and the backend is local"),
        ("launch={backend: ssh, hostfile: hosts, processes: 2}", "launch.processes is not for backend ssh"),
    ],
)
def test_a_recipe_whose_hosts_contradict_each_other_is_refused(stub: Stub, override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe_file.load(stub.recipe, [override])


def test_the_hostfile_is_read_where_the_recipe_says(two_hosts: Stub) -> None:
    recipe = recipe_file.absolute(recipe_file.load(two_hosts.recipe), two_hosts.root)
    assert recipe.launch.hostfile == two_hosts.root / "hosts"
    assert [host.name for host in environment.machines(recipe)] == ["alpha", "beta"]
    debug = [f"launch.{word}" for word in ("backend=local", "hostfile=null", "exclude=[]", "processes=1")]
    assert recipe_file.load(two_hosts.recipe, debug).launch.backend == "local"
    spaced = recipe.model_copy(update={"run_dir": Path("/runs/my run")})
    with pytest.raises(UsageError, match="and this one is /runs/my run"):
        environment.machines(spaced)
    (two_hosts.root / "hosts").unlink()
    with pytest.raises(UsageError, match="there is no such file"):
        environment.machines(recipe)


def test_what_belongs_to_one_machine_does_not_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HOME": "/home/a",
        "CUDA_VISIBLE_DEVICES": "3",
        "HF_HOME": "/hub",
        "NCCL_DEBUG": "INFO",
    }.items():
        monkeypatch.setenv(name, value)
    variables = environment.rank_variables("ssh", 8, "auto")
    assert {"HOME", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"} & set(variables) == set()
    assert (variables["HF_HOME"], variables["NCCL_DEBUG"]) == ("/hub", "INFO")
    monkeypatch.setenv("HOME", "/home/b")
    there = environment.on_node(variables, Host("b", 1), "cpu")
    assert (there["HOME"], there["DS_ACCELERATOR"], there["CUDA_VISIBLE_DEVICES"]) == ("/home/b", "cpu", "")
    with pytest.raises(PreflightError, match=r"b shows 1 GPU\(s\), and 2 ranks"):
        environment.on_node(variables, Host("b", 2), "auto")


def test_a_dead_host_can_be_replaced_before_a_resume(two_hosts: Stub) -> None:
    two_hosts.behave("deaf", "deaf", "raise")
    assert two_hosts.speechctl("launch", "stub.yaml").returncode == ExitCode.TRAINING_RAISED
    two_hosts.behave("train 50", "train 50", "train 50")
    (two_hosts.root / "hosts").write_text("alpha slots=2 address=127.0.0.1\ngamma slots=9\ndelta slots=1\n")
    done = two_hosts.speechctl("resume", "runs/stub")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert rundir.read_json(Run(two_hosts.run.root).attempts()[1].hosts)[1]["name"] == "delta"
