"""200 strings with payloads through the real sshd, and canaries that must be nowhere after runs over it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import redact, rundir
from launcher.backends import ssh
from launcher.errors import ExitCode
from launcher.hosts import Host
from launcher.node import NODE_SCRIPT
from launcher.rundir import Run
from tests.canaries import Watch
from tests.cluster.conftest import Cluster, empty
from tests.conftest import RECIPE, Stub, count, seed
from tests.injections import Injections
from tests.test_injection import RECORD
from tests.test_secret import KEY, PROXY, TOKEN, sha256

pytestmark = pytest.mark.cluster

VARIABLES, PATHS = 160, 40


@pytest.fixture
def two(stub: Stub, cluster: Cluster) -> Stub:
    hostfile = cluster.hostfile(stub.root / "hosts", "node1", "node2")
    key = stub.root / "key"
    key.write_text(f"{KEY}\n")
    key.chmod(0o600)
    launch = f"{{backend: ssh, hostfile: {hostfile}, stop_grace: 2s, secrets: [HF_TOKEN, DEPLOY={key}]}}"
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))
    stub.command = cluster.desk("env", "-C", str(stub.root), *stub.command)
    stub.env |= {"HF_TOKEN": TOKEN, "https_proxy": PROXY}
    return stub


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Injections]:
    (tmp_path / "trap").mkdir()
    made = Injections(tmp_path / "trap", seed=seed(200))
    before = set(made.canaries(tmp_path))
    yield made
    assert set(made.canaries(tmp_path)) == before == set()
    count("strings", made.made)


def test_variables_cross_byte_by_byte(two: Stub, make: Injections) -> None:
    two.behave("train 5", "train 5")
    values = {f"HF_X{k}{'_TOKEN' if k % 5 == 0 else ''}": make(without="\0") for k in range(VARIABLES)}
    done = two.speechctl("launch", "stub.yaml", env={**two.env, **values})
    assert done.returncode == ExitCode.FINISHED, done.stderr
    (attempt,) = two.run.attempts()
    for k in range(2):
        there = rundir.read_json(attempt.root / f"torchrun{'-1' * k}.json")["variables"]
        for name, value in values.items():
            assert there[name] in (value, f"sha256:{sha256(value)}"), name
        assert there["HF_TOKEN"] == f"sha256:{sha256(TOKEN)}"
    assert make.made == VARIABLES
    assert empty(two.run.root, within_s=5)


def test_paths_cross_byte_by_byte(cluster: Cluster, make: Injections, tmp_path: Path) -> None:
    """More than `machines` lets through: what is asked of the shell over there is the same whatever it holds."""
    recorder = tmp_path / "python"
    recorder.write_text(RECORD.replace('"$RECORD"', f"{tmp_path}/record"))
    recorder.chmod(0o700)
    for k in range(PATHS):
        name = make(without="/\0", around=" -.ab")
        root = tmp_path / (name if name.strip(".") else f"x{name}")
        Run(root).attempts_dir.mkdir(parents=True)
        attempt = Run(root).new_attempt()
        attempt.node_script.write_text(NODE_SCRIPT)
        (attempt.root / "interpreter").write_text(f"{recorder}\n")
        (attempt.root / "pythonpath").touch()
        command = cluster.desk(*ssh.argv(attempt, k, Host(f"node{k % 3 + 1}", 1)))
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (name, done.stderr)
        words = (tmp_path / "record").read_bytes().split(b"\0")
        assert words == [b"-m", b"launcher.node", os.fsencode(attempt.root), str(k).encode(), b"", b""]
        (tmp_path / "record").unlink()
    assert make.made == PATHS


@pytest.mark.parametrize(
    ("how", "code"),
    [("leak 30", ExitCode.FINISHED), ("leak-raise", ExitCode.TRAINING_RAISED), ("leak-kill", ExitCode.NO_PROGRESS)],
)
def test_no_canary_is_anywhere_after_a_run(two: Stub, how: str, code: ExitCode) -> None:
    """The command lines of all hosts are seen: their processes are in namespaces below the test's own."""
    two.behave("train 30" if code == ExitCode.FINISHED else "deaf", how, patience_s=0.3)
    with Watch([TOKEN, PROXY, KEY]).running() as watch:
        done: Any = two.speechctl("launch", "stub.yaml", "--set", "launch.relaunch.attempts=1")
    assert done.returncode == code, done.stderr
    (two.root / "key").unlink()
    assert watch.in_files(two.root) == [] and watch.files > 20
    assert watch.in_command_lines() == []
    assert any(b"torch.distributed.run" in line for line in watch.seen)
    assert not watch.redactor.found((done.stdout + done.stderr).encode())
    (attempt,) = two.run.attempts()
    assert sha256(KEY) in attempt.rank_log(1).read_text()
    if how == "leak-kill":
        assert attempt.rank_log(1).read_text().endswith(f"the last words {redact.MASK}")
        assert "rank 1 on node2 was ended by SIGKILL" in done.stderr
    assert empty(two.run.root, within_s=5)
