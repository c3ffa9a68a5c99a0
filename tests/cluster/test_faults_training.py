"""Cells of the table with real training: what was lost is trained again, and comes to the same numbers.

A rank that is killed and one that is stopped on this machine are in `tests/worker/test_train.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import rundir
from launcher.errors import ExitCode
from launcher.rundir import Run
from tests.cluster.conftest import Cluster
from tests.cluster.slurm import Slurm
from tests.conftest import Stub, wait_until
from tests.faults.cells import (
    EVERY,
    FAULTS,
    LAST_STEP,
    check_nothing_left,
    failure_of,
    follow,
    launch,
    small_cgroup,
)
from tests.faults.places import InJob, OverSsh, Place
from tests.worker.runs import RECIPE, SPEECHCTL, numbers, speechctl, write_recipe

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ranks,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not EVERY, reason="SPEECHCTL_TEST_FAULTS=all: the real training of these takes minutes"),
]

STEPS = RECIPE.replace("max_steps: 24", f"max_steps: {LAST_STEP}")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with packs for the smallest real training."""
    pytest.importorskip("espeakng_loader", reason="needs the extra `demo`: pip install 'speechctl[demo]'")
    folder = tmp_path_factory.mktemp("packed")
    done = speechctl("pack", str(write_recipe(folder, folder, STEPS)), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(packed: Path) -> Run:
    """That training, undisturbed, on this machine."""
    done = speechctl("launch", "recipe.yaml", "--set", "run_dir=whole", cwd=packed, env=one_thread())
    assert done.returncode == 0, done.stderr
    return Run(packed / "whole")


def one_thread() -> dict[str, str]:
    """Everywhere: sums depend on how they are divided."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture
def real(stub: Stub) -> Stub:
    """The same place, with nothing in place of anything."""
    stub.command = SPEECHCTL
    stub.env = one_thread()
    return stub


def prepare(place: Place, name: str, packed: Path) -> None:
    place.stop_grace_s, place.deadline_s = 5, 15
    text = STEPS.replace("{{processes: 2}}", "{launch}").format(root=packed, launch=launch(place, name))
    place.stub.recipe.write_text(f"{text}run_dir: {place.run.root}\n")


def train(place: Place, name: str, packed: Path, whole: Run) -> None:
    prepare(place, name, packed)
    follow(place, name, FAULTS[name])
    assert numbers(place.run) == numbers(whole)


@pytest.mark.parametrize("name", ["SIGKILL rank", "SIGSTOP rank", "host power-off"])
def test_ssh(name: str, real: Stub, cluster: Cluster, packed: Path, whole: Run) -> None:
    train(OverSsh(real, cluster, spare=True), name, packed, whole)


@pytest.mark.parametrize("name", ["SIGKILL rank", "SIGSTOP rank"])
def test_slurm(name: str, real: Stub, slurm: Slurm, packed: Path, whole: Run) -> None:
    train(InJob(real, slurm), name, packed, whole)


def test_memory_that_runs_out(real: Stub, packed: Path, whole: Run) -> None:
    """On this machine: a cgroup has no more than a rank uses once it trains. A person gives it more, here by leaving
    the cgroup, and asks for the run to go on."""
    place = Place(real)
    with small_cgroup() as group:
        v1 = (group / "memory.limit_in_bytes").exists()
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        (group / limit).write_text(str(2**33))
        prepare(place, "OOM by cgroup", packed)
        with place.launched():
            wait_until(lambda: place.run.attempts() and place.run.attempts()[0].rank(1).exists(), 120)
            (group / "cgroup.procs").write_text(str(rundir.read_json(place.run.attempts()[0].rank(1))["pid"]))
            wait_until(place.run.sealed_steps, 120)
            (group / limit).write_text((group / used).read_text())
            code, said = place.end()
            assert code == ExitCode.OUT_OF_MEMORY, said
        failure = failure_of(place)
        assert (failure["kind"], failure["rank"], failure["verdict"]) == ("host memory", 1, "mend")
        assert "that its cgroup may use" in failure["message"]
        assert place.run.sealed_steps()[-1] < LAST_STEP
    done = real.speechctl("resume", str(place.run.root), timeout=300)
    assert done.returncode == 0, done.stderr
    assert numbers(place.run) == numbers(whole)
    check_nothing_left(place)
