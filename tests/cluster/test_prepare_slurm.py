"""`prepare` through a real SLURM: nodes looked at inside a job, which is given back however that ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from launcher.errors import ExitCode
from tests.canaries import Watch
from tests.cluster.slurm import Slurm
from tests.cluster.test_prepare import changed, over, pack_of_a_kind, planted
from tests.cluster.test_slurm import Two
from tests.conftest import Stub, wait_until
from tests.test_secret import PROXY, TOKEN
from tests.worker.runs import SPEECHCTL

pytestmark = pytest.mark.cluster


@pytest.fixture
def two(stub: Stub, slurm: Slurm) -> Iterator[Two]:
    made = Two(stub, slurm)
    stub.recipe.write_text(stub.recipe.read_text().replace("launch: {", "launch: {device: cpu, "))
    yield made
    slurm.at_desk("scancel", "--user=root")


def jobs_left(slurm: Slurm) -> list[str]:
    """Jobs that wait or run."""
    return slurm.at_desk("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%j %T").stdout.splitlines()


def test_two_nodes_in_good_order_are_green(two: Two, tmp_path: Path) -> None:
    """With the real worker, whose ranks meet and compute a sum; and no secret of the shell comes to a node."""
    pack_of_a_kind(two.stub.root)
    env = {**os.environ, "HF_TOKEN": TOKEN, "https_proxy": PROXY, "HF_MINE": "a canary by name", "NO_COLOR": "1"}
    (two.stub.root / "mine").write_text("a canary by name\n")
    (two.stub.root / "mine").chmod(0o600)
    secrets = f"launch.secrets=[HF_MINE={two.stub.root}/mine]"
    command = [*SPEECHCTL, "prepare", "stub.yaml", "--json", "--set", secrets]
    with Watch([TOKEN, PROXY, "a canary by name"]).running(on=two.slurm) as watch:
        done = two.slurm.at_desk("env", "-C", str(tmp_path), *command, timeout=200, env=env)
    value = json.loads(done.stdout)
    assert [c for c in value["checks"] if c["verdict"] != "ok"] == [], done.stderr
    assert done.returncode == ExitCode.FINISHED
    sums = {c["host"]: c["found"] for c in value["checks"] if c["name"] == "all-reduce"}
    assert set(sums) == {"node1", "node2"}
    assert all(re.fullmatch(r"gloo: [\d.]+ ms for 4.0 MiB, [\d.]+ Gbit/s; met in [\d.]+ s", s) for s in sums.values())
    assert value["proposed"] == dict.fromkeys(sums, "NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0")
    assert jobs_left(two.slurm) == []
    assert watch.in_command_lines() == [] and watch.in_environments() == []
    assert any(b"allreduce" in line for line in watch.seen) and len(watch.environments) > 5
    (two.stub.root / "mine").unlink()
    assert watch.in_files(two.slurm.folder) == [] and watch.in_files(two.stub.root) == []
    assert not watch.redactor.found((done.stdout + done.stderr).encode())


def test_a_node_that_differs_is_named(two: Two, tmp_path: Path) -> None:
    """And limits are those that a job will have, which SLURM takes from where it was submitted."""
    info = metadata.distribution("pydantic")._path / "METADATA"  # type: ignore[attr-defined]
    package = changed(tmp_path, info, f"Version: {metadata.version('pydantic')}", "Version: 1.2.3")
    with planted(two.slurm, "node2", over(package, info)):
        two.stub.command = ["prlimit", "--nofile=700:", *two.stub.command]
        done = two.stub.speechctl("prepare", "stub.yaml", "--json")
    assert done.returncode == ExitCode.PREFLIGHT, done.stderr
    red = [c for c in json.loads(done.stdout)["checks"] if c["verdict"] == "fail"]
    limits = [("limits", "node1"), ("limits", "node2")]
    assert [(c["name"], c["host"]) for c in red] == [("packages", "node2"), *limits]
    assert [c["found"] for c in red[1:]] == ["open files: 700"] * 2
    assert red[0]["found"] == f"pydantic 1.2.3, the others {metadata.version('pydantic')}" and red[0]["hint"]
    assert jobs_left(two.slurm) == []


def test_nodes_that_cannot_be_had_are_one_error_with_the_reason(two: Two) -> None:
    """And a hostfile of SLURM has those alone that can."""
    two.slurm.at_desk("scontrol", "update", "nodename=node2", "state=drain", "reason=a fan is loud")
    began = time.monotonic()
    done = two.stub.speechctl("prepare", "stub.yaml")
    assert done.returncode == ExitCode.HOST and time.monotonic() - began < 50, done.stderr
    assert re.search(r"(?m)^waiting for nodes: job \d+ PENDING", done.stderr)
    assert re.search(r"(?m)^error: SLURM gave no nodes to look at in \d+ s: job \d+ PENDING \(.*DRAINED", done.stderr)
    assert "\nnode2 drained: a fan is loud\n\nhint: nodes must be free" in done.stderr
    assert jobs_left(two.slurm) == []
    file = two.stub.root / "hosts"
    command = ("prepare", "stub.yaml", "--set", "launch.device=auto", "--write-hostfile", str(file), "--from-slurm")
    done = two.stub.speechctl(*command)
    assert (done.stdout, file.read_text()) == ("node1 slots=2\n", "node1 slots=2\n"), done.stderr
    file.unlink()
    two.slurm.at_desk("scontrol", "update", "nodename=node2", "state=resume")
    state = ("sinfo", "--noheader", "--nodes=node2", "--format=%t")
    wait_until(lambda: two.slurm.at_desk(*state).stdout.split() == ["idle"])
    assert two.stub.speechctl(*command).stdout == "node1 slots=2\nnode2 slots=2\n"
    file.unlink()
    done = two.stub.speechctl(*command, "--set", "launch.slurm.exclude=node[1-9]")
    assert done.returncode == ExitCode.HOST and "sinfo: it lists no node that is up" in done.stderr


@pytest.mark.parametrize("when", ["asked for", "waited for", "looked into"])
def test_ctrl_c_leaves_no_job(two: Two, when: str) -> None:
    """At three moments of the job; at the first SLURM has it, and nobody here knows its number yet."""
    if when == "asked for":
        slow = two.stub.root / "bin" / "sbatch"
        slow.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >"{two.stub.root}/number"\nexec sleep 60\n')
        slow.chmod(0o755)
    elif when == "waited for":
        two.slurm.at_desk("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    with two.stub.start(*two.stub.command, "prepare", "stub.yaml") as process:
        if when == "asked for":
            wait_until(lambda: (two.stub.root / "number").exists() and (two.stub.root / "number").read_text())
        elif when == "waited for":
            assert process.stderr is not None and process.stderr.readline().startswith("waiting for nodes: job ")
        else:
            wait_until(lambda: "srun" in children(process.pid))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130, stderr
    wait_until(lambda: jobs_left(two.slurm) == [])
    wait_until(lambda: two.slurm.at_desk("squeue", "--noheader").stdout == "")
    assert "Traceback" not in stderr


def children(pid: int) -> set[str]:
    """The names of the programs that it runs."""
    found = set()
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.add(child.name())
        except psutil.Error:
            continue
    return found
