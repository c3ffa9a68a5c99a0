"""Real training in a real job, across a time limit again and again: nothing is computed twice, and nothing is lost."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from launcher import rundir
from launcher.errors import ExitCode
from launcher.rundir import Run
from tests.cluster.conftest import empty
from tests.cluster.slurm import Slurm
from tests.conftest import count, wait_until
from tests.worker.runs import SPEECHCTL, events, numbers, speechctl, trained_on, write_recipe

CROSSINGS = int(os.environ.get("SPEECHCTL_TEST_CROSSINGS", "0"))

LAUNCH = "launch={backend: slurm, nodes: 2, processes: 1, stop_grace: 20s, slurm: {time: 2m, warning: 45s}}"


@pytest.mark.cluster
@pytest.mark.ranks
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CROSSINGS, reason="SPEECHCTL_TEST_CROSSINGS=3: minutes, since SLURM's limits are minutes")
def test_a_time_limit_of_two_minutes(tmp_path: Path, slurm: Slurm) -> None:
    recipe = str(write_recipe(tmp_path, tmp_path))
    assert speechctl("pack", recipe, cwd=tmp_path).returncode == 0
    steps = ["--set", "max_steps=100k", "--set", "evaluate.every_steps=1000", "--set", "checkpoint.every_steps=1000"]
    command = [*SPEECHCTL, "launch", recipe, "--set", LAUNCH, *steps, "--set", f"run_dir={tmp_path}/run"]
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = slurm.at_desk("env", "-C", str(tmp_path), *command, timeout=400, env=env)
    assert done.returncode == 0, done.stderr
    match = re.match(r"job  (\d+)\n", done.stdout)
    assert match
    run = Run(tmp_path / "run")

    def has_begun(number: int) -> bool:
        return len(run.attempts()) >= number and run.attempts()[number - 1].metrics.exists()

    for number in range(1, CROSSINGS + 2):
        wait_until(lambda number=number: has_begun(number), 300)  # type: ignore[misc]
        print(f"{time.monotonic() - began:.0f} s: attempt {number} trains")
    time.sleep(10)
    stopped = slurm.at_desk(*SPEECHCTL, "stop", str(run.root), timeout=100)
    assert stopped.returncode == 0, stopped.stderr
    facts = slurm.wait_for(match[1], "FAILED", "COMPLETED", timeout_s=60)
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", str(CROSSINGS))
    assert empty(run.root, within_s=10)

    ends = [rundir.read_json(attempt.exit) for attempt in run.attempts()]
    assert len(ends) == CROSSINGS + 1
    assert [e["code"] for e in ends] == [ExitCode.STOPPED] * len(ends)
    starts = [events(attempt, "started")[0]["step"] for attempt in run.attempts()]
    print("starts", starts, "ends", [e["step"] for e in ends])
    assert starts == [0, *(e["sealed_step"] for e in ends[:-1])], "each life begins where the one before ended"
    done_by = numbers(run)
    last = ends[-1]["step"]
    assert sorted(done_by) == list(range(1, last + 1))
    for attempt, first, end in zip(run.attempts(), starts, ends, strict=True):
        rows = [row["step"] for row in rundir.read_lines(attempt.metrics)]
        assert rows == list(range(first + 1, end["step"] + 1)), "no step is computed twice"
    ledger = trained_on(run)
    assert sorted(ledger) == list(range(1, last + 1))
    plan = rundir.read_json(run.plan)
    whole, size = divmod(last, plan["steps_per_epoch"])[0], plan["steps_per_epoch"]
    every = sorted(id for step in range(1, size + 1) for id in ledger[step])
    assert len(every) == len(set(every)) == plan["utterances"]
    for epoch in range(whole):
        ids = sorted(id for step in range(epoch * size + 1, (epoch + 1) * size + 1) for id in ledger[step])
        assert ids == every, f"epoch {epoch} has each utterance once"
    count("crossings", CROSSINGS)
    print(f"{CROSSINGS} crossings, {last} steps, {whole} whole epochs of {len(every)} utterances")
