"""200 strings with payloads through the real sshd and as many through a real SLURM, and secret canaries that must be
nowhere after runs over both."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import jobs, redact, rundir, secret
from launcher.backends import slurm as slurm_backend
from launcher.backends import ssh
from launcher.errors import ExitCode
from launcher.hosts import Host
from launcher.node import NODE_SCRIPT
from launcher.recipe_file import RecipeError, load
from launcher.rundir import Run
from tests.canaries import Watch
from tests.cluster.conftest import Cluster, empty
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import Two
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


# SLURM ----------------------------------------------------------------------------------------------------------------

HELD = 40
"""Jobs that wait: of each, what SLURM has of a comment, a name and the run's path."""


@pytest.fixture
def job(stub: Stub, slurm: Slurm) -> Iterator[Two]:
    yield Two(stub, slurm)
    slurm.at_desk("scancel", "--user=root")


def test_options_and_paths_reach_slurm_byte_by_byte(job: Two, make: Injections, tmp_path: Path) -> None:
    held = 0
    while held < HELD:
        assert make.made < 100 * HELD
        options = ["--hold", f"--comment={make()}", f"--job-name={make()}"]
        root = tmp_path / f"r{make(without='/' + chr(92))}"
        launch = {"backend": "slurm", "nodes": 2, "slurm": {"options": options}}
        try:
            overrides = {"launch": launch, "run_dir": str(root)}
            recipe = load(job.stub.recipe, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        except RecipeError:
            continue
        if re.search(r"[\x00-\x1f]", str(root)):
            continue  # refused by `jobs.submit`
        (root / "slurm").mkdir(parents=True)
        number = job.slurm.sbatch(*slurm_backend.sbatch(recipe, Run(root))[2:], env=jobs.environment_of_a_job())
        held += 1
        for field, word in (("%k", options[1]), ("%j", options[2])):
            there = job.slurm.at_desk("squeue", "--noheader", f"--jobs={number}", f"--format={field}").stdout
            assert there == word.partition("=")[2] + "\n"
        shown = job.slurm.at_desk("scontrol", "show", "job", number).stdout
        assert f"\n   Command={slurm_backend.SCRIPT} {root}\n" in shown
        assert f"\n   WorkDir={root}\n" in shown and f"\n   StdOut={root}/slurm/job-{number}.log\n" in shown


def test_variables_and_a_path_cross_a_job_byte_by_byte(job: Two, make: Injections, tmp_path: Path) -> None:
    job.stub.behave("train 5", "train 5")
    values = {f"HF_X{k}": make(without="\0") for k in range(60)}
    root = tmp_path / "runs" / make(without="/\0\\\udcff\udcfe\x1b\x07\x9b\x85\r\n", around=" ab")
    run_dir = ("--set", f"run_dir={json.dumps(str(root))}")
    done = job.stub.speechctl("launch", "stub.yaml", *run_dir, env={**job.stub.env, **values})
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[1]
    assert job.slurm.wait_for(number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    (attempt,) = Run(root).attempts()
    for k in range(2):
        record = rundir.read_json(attempt.root / f"torchrun{'-1' * k}.json")
        assert record["argv"][-1] == str(attempt.root)
        for name, value in values.items():
            assert record["variables"].get(name) == (None if secret.implied(name, value) else value), name
    assert empty(root, within_s=5)


def test_no_canary_is_anywhere_after_a_job(job: Two) -> None:
    """Nor while it waits: the state that SLURM keeps, its daemons' logs and spools, what it shows of the job."""
    stub, mine = job.stub, "a canary by name alone"
    for name, value in (("key", KEY), ("mine", mine)):
        (stub.root / name).write_text(f"{value}\n")
        (stub.root / name).chmod(0o600)
    named = f"secrets: [DEPLOY={stub.root}/key, HF_MINE={stub.root}/mine], "
    stub.recipe.write_text(stub.recipe.read_text().replace("launch: {", "launch: {" + named))
    stub.env |= {"HF_TOKEN": TOKEN, "https_proxy": PROXY, "HF_MINE": mine}
    stub.behave("train", "leak 2000")
    with Watch([TOKEN, PROXY, KEY, mine]).running(on=job.slurm) as watch:
        number = job.launch()
        attempt = job.attempt(1)
        shows = [("show", "job", "--details", number), ("write", "batch_script", number, "-")]
        shown = [job.slurm.at_desk("scontrol", *words).stdout for words in shows]
        assert watch.in_files(job.slurm.folder) == []
        assert stub.speechctl("stop", str(job.run.root)).returncode == 0
        job.ended(number, "FAILED")
    assert number in shown[0] and "speechctl resume" in shown[1]
    assert not watch.redactor.found("".join([*shown, job.log(number)]).encode())
    assert sha256(KEY) in attempt.rank_log(1).read_text() and sha256(mine) in attempt.rank_log(1).read_text()
    for name in ("key", "mine"):
        (stub.root / name).unlink()
    assert watch.in_files(stub.root) == [] and watch.in_files(job.slurm.folder) == []
    assert watch.in_command_lines() == [] and any(b"torch.distributed.run" in line for line in watch.seen)
    # What the shell had and no file gives is in no process of a node.
    watch.redactor = redact.Redactor([TOKEN, PROXY])
    assert watch.in_environments() == [] and any(b"\0DEPLOY=" in one for one in watch.environments)
