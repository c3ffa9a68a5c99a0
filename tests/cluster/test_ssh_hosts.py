"""Runs over real ssh: on several hosts a run ends in good order, and whatever dies is named and ends alone nowhere."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import rundir
from launcher.errors import ExitCode
from launcher.rundir import Run
from tests.cluster.conftest import Cluster, empty, processes_of
from tests.conftest import RECIPE, Stub, wait_until
from tests.worker.runs import SPEECHCTL, numbers, speechctl, write_recipe

pytestmark = pytest.mark.cluster


@pytest.fixture
def three(stub: Stub, cluster: Cluster) -> Stub:
    """A stub of a rank on each of three hosts, started at the desk."""
    hostfile = cluster.hostfile(stub.root / "hosts", *cluster.hosts)
    launch = f"{{backend: ssh, hostfile: {hostfile}, stop_grace: 5s, relaunch: {{attempts: 1}}}}"
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))
    stub.command = cluster.desk("env", "-C", str(stub.root), *stub.command)
    stub.behave("deaf", "deaf", "deaf")
    return stub


@contextmanager
def training(stub: Stub) -> Iterator[subprocess.Popen[str]]:
    """`speechctl launch` under way, with all ranks up."""
    options: dict[str, Any] = {"env": stub.env, "cwd": stub.root, "text": True}
    command = [*stub.command, "launch", "stub.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            wait_until(lambda: stub.run.attempts() and len(list(stub.run.attempts()[0].ranks.glob("rank-*.json"))) == 3)
            yield process
        finally:
            process.kill()
            for left in processes_of(stub.run.root):
                left.kill()


def failure_of(stub: Stub) -> dict[str, Any]:
    value: dict[str, Any] = rundir.read_json(stub.run.attempts()[-1].failure)
    return dict(value.get("cause", value))


def test_a_run_on_three_hosts(three: Stub, cluster: Cluster) -> None:
    three.behave("train 50", "train 50", "train 50")
    done = three.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    (attempt,) = three.run.attempts()
    for k, (name, address) in enumerate(cluster.hosts.items()):
        assert rundir.read_json(attempt.rank(k))["host"] == name
        record = rundir.read_json(attempt.node(k))
        assert (record["host"], record["interface"], record["returncode"]) == (name, "eth0", 0)
        assert f"node {k}: the ranks meet at {cluster.hosts['node1']}" in attempt.node_log(k).read_text()
        assert record["address"] == cluster.hosts["node1"] and address
    variables = rundir.read_json(attempt.root / "torchrun-2.json")["variables"]
    assert variables["GLOO_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in variables
    assert empty(three.run.root, within_s=0)


def test_ctrl_c_stops_ranks_everywhere(three: Stub) -> None:
    three.behave("train", "train", "train")
    with training(three) as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == ExitCode.STOPPED
        assert empty(three.run.root, within_s=0)


def test_a_rank_that_is_killed_ends_the_run_and_is_named(three: Stub, cluster: Cluster) -> None:
    with training(three) as process:
        bystander = subprocess.Popen(["sleep", "60"])
        pid = rundir.read_json(three.run.attempts()[0].rank(2))["pid"]
        assert cluster.on("node3", "kill", "-KILL", str(pid)).returncode == 0
        _, stderr = process.communicate(timeout=40)
        assert process.returncode == ExitCode.NO_PROGRESS  # the recipe allows one attempt
        assert failure_of(three)["message"] == "rank 2 on node3 was ended by SIGKILL"
        assert "the last: rank 2 on node3 was ended by SIGKILL" in stderr
        assert empty(three.run.root, within_s=0)
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait()


def test_nothing_is_left_anywhere_of_a_launcher_that_is_killed(three: Stub) -> None:
    with training(three) as process:
        assert psutil.Process(process.pid).cmdline()[-2:] == ["launch", "stub.yaml"], "it is the launcher itself"
        assert processes_of(three.run.root)
        os.kill(process.pid, signal.SIGKILL)
        assert empty(three.run.root, within_s=40)


def test_a_host_that_is_cut_off_is_named_and_nothing_goes_on(three: Stub, cluster: Cluster) -> None:
    with training(three) as process:
        cluster.cut("node1")
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == ExitCode.NO_PROGRESS  # the recipe allows one attempt
        assert "the last: lost node1: Timeout, server node1 not responding." in stderr
        assert failure_of(three)["message"].startswith("lost node1: ")
        assert empty(three.run.root, within_s=10), "no word reached node1, but it reads that the lease is over"


def test_a_host_that_hears_nothing_any_more_ends_its_ranks(three: Stub, cluster: Cluster) -> None:
    """Cut off, and then the launcher is killed: nobody closes its standard input, and nobody ends the lease."""
    with training(three) as process:
        cluster.cut("node3")
        process.kill()
        assert empty(three.run.root, within_s=50)
    record = rundir.read_json(three.run.attempts()[0].node(2))
    assert record["asked"] == "nothing was heard of the launcher for 30 s"


def test_a_host_with_an_unknown_key_is_refused(three: Stub, cluster: Cluster) -> None:
    cluster.trust("node1", "node3")
    began = time.monotonic()
    done = three.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.HOST
    assert time.monotonic() - began < 20
    assert "error: cannot start a node on node2: Host key verification failed." in done.stderr
    assert "`ssh node2` asks once" in done.stderr
    assert empty(three.run.root, within_s=0)


def test_a_host_that_cannot_be_reached_is_named(three: Stub, cluster: Cluster) -> None:
    cluster.cut("node2")
    began = time.monotonic()
    done = three.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.HOST
    assert time.monotonic() - began < 20
    assert "error: cannot start a node on node2: ssh: connect to host node2 port 22: " in done.stderr
    assert empty(three.run.root, within_s=0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe of the smallest real training, packed."""
    pytest.importorskip("espeakng_loader", reason="needs the extra `demo`: pip install 'speechctl[demo]'")
    folder = tmp_path_factory.mktemp("packed")
    done = speechctl("pack", str(write_recipe(folder, folder)), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize(("nodes", "stage"), [(2, 2), (2, 3), (3, 2)])
def test_hosts_train_as_one_machine_does(
    cluster: Cluster, packed: Path, tmp_path: Path, nodes: int, stage: int
) -> None:
    """Over ssh every loss and gradient norm equals those of as many ranks here, as hex floats."""
    short = ["--set", "max_steps=12", "--set", f"zero_stage={stage}"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # everywhere: sums depend on how they are divided
    launch = ["launch", str(packed / "recipe.yaml"), *short, "--set"]
    here = [*launch, f"launch.processes={nodes}", "--set", f"run_dir={tmp_path}/here"]
    done = speechctl(*here, cwd=tmp_path, env=one_thread)
    assert done.returncode == 0, done.stderr
    names = list(cluster.hosts)[:nodes]
    hostfile = cluster.hostfile(tmp_path / "hosts", *names)
    there = [*launch, f"launch={{backend: ssh, hostfile: {hostfile}}}", "--set", f"run_dir={tmp_path}/there"]
    done = cluster.at_desk("env", "-C", str(tmp_path), *SPEECHCTL, *there, timeout=400, env=one_thread)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "there")
    assert len(numbers(run)) == 12 and numbers(run) == numbers(Run(tmp_path / "here"))
    assert [rundir.read_json(run.attempts()[0].rank(k))["host"] for k in range(nodes)] == names
    assert rundir.read_json(run.deepspeed)["zero_optimization"]["stage"] == stage
