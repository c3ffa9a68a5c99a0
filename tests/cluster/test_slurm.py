"""Runs in real SLURM jobs: submitted by us and by hand, across time limits, requeues, and what a cluster does else."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator

import psutil
import pytest

from launcher import rundir
from launcher.backends.slurm import SCRIPT
from launcher.errors import ExitCode
from launcher.rundir import Attempt
from tests.cluster.conftest import empty, processes_of
from tests.cluster.slurm import Slurm
from tests.conftest import RECIPE, Stub, wait_until

pytestmark = pytest.mark.cluster

LAUNCH = "{backend: slurm, nodes: 2, stop_grace: 5s, slurm: {warning: 20s, partition: main}}"


class Two:
    """A stub of a rank on each of two nodes of SLURM, and a user at the desk."""

    def __init__(self, stub: Stub, slurm: Slurm) -> None:
        self.stub, self.slurm, self.run = stub, slurm, stub.run
        stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", LAUNCH))
        bin_ = stub.root / "bin"
        bin_.mkdir()
        python, speechctl = stub.command
        script = f'#!/bin/sh\nexec "{python}" "{speechctl}" "$@"\n'  # what `speechctl` is for a user at the desk
        (bin_ / "speechctl").write_text(script)
        (bin_ / "speechctl").chmod(0o755)
        stub.env["PATH"] = f"{bin_}:{os.environ['PATH']}"
        stub.command = slurm.desk("env", "-C", str(stub.root), *stub.command)

    def launch(self, *arguments: str) -> str:
        """The job of `speechctl launch`, on its way."""
        done = self.stub.speechctl("launch", "stub.yaml", *arguments)
        assert done.returncode == 0, done.stderr
        match = re.match(r"job  (\d+)\n", done.stdout)
        assert match, done.stdout
        return match[1]

    def sbatch(self, *arguments: str) -> str:
        """The job that somebody submitted by hand, on its way."""
        log = f"--output={self.stub.root}/by-hand-%j.log"
        words = ("env", "-C", str(self.stub.root), "sbatch", "--parsable", log, *arguments)
        done = self.slurm.at_desk(*words, env=self.stub.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def attempt(self, number: int, timeout_s: float = 40) -> Attempt:
        """The attempt, once both of its ranks train."""

        def is_up() -> bool:
            attempts = self.run.attempts()
            return len(attempts) >= number and len(list(attempts[number - 1].ranks.glob("rank-*.json"))) == 2

        wait_until(is_up, timeout_s)
        wait_until(lambda: self.run.attempts()[number - 1].metrics.exists())
        return self.run.attempts()[number - 1]

    def process(self, *signs: str) -> psutil.Process:
        """Of the run, the one with these words in its command, as soon as there is one."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [p for p in processes_of(self.run.root) if all(sign in p.cmdline() for sign in signs)]
            return bool(found)

        wait_until(is_there)
        return found[0]

    def log(self, job: str) -> str:
        return (self.run.slurm / f"job-{job}.log").read_text()

    def ended(self, job: str, state: str, timeout_s: float = 60) -> dict[str, str]:
        """What SLURM says once the job has ended in this way, with no process of it left anywhere."""
        facts = self.slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)
        assert facts["JobState"] == state, (facts, self.log(job) if self.run.slurm.exists() else "")
        assert empty(self.run.root, within_s=10)
        return facts


@pytest.fixture
def two(stub: Stub, slurm: Slurm) -> Iterator[Two]:
    yield Two(stub, slurm)
    slurm.at_desk("scancel", "--user=root")
    if not empty(stub.run.root, within_s=10):
        for left in processes_of(stub.run.root):
            left.kill()


def code(attempt: Attempt) -> int:
    return int(rundir.read_json(attempt.exit)["code"])


def test_a_launch_submits_a_job_that_finishes(two: Two) -> None:
    two.stub.behave("train 50", "train 50")
    two.stub.env |= {"WANDB_API_KEY": "canary-of-the-shell", "OMP_PROC_BIND": "canary-of-a-setting"}
    job = two.launch()
    kept = b"".join(p.read_bytes() for p in (two.slurm.folder / "state").rglob("*") if p.is_file())
    assert b"canary-of-a-setting" in kept and b"canary-of-the-shell" not in kept, "SLURM keeps a job's environment"
    facts = two.ended(job, "COMPLETED")
    assert (facts["ExitCode"], facts["JobName"]) == ("0:0", "stub")
    (attempt,) = two.run.attempts()
    assert [rundir.read_json(attempt.rank(k))["host"] for k in range(2)] == ["node1", "node2"]
    assert rundir.read_json(attempt.node(1))["interface"] == "eth0"
    assert rundir.read_lines(attempt.supervisor)[0]["job"] == job
    shown = two.stub.speechctl("status", str(two.run.root))
    assert re.search(rf"^job +{job} COMPLETED", shown.stdout, flags=re.MULTILINE), shown.stdout


def test_a_recipe_by_hand_is_requeued_by_a_person_before_what_depends_on_it(two: Two) -> None:
    """The recipe is one for this machine: the job is what it is."""
    recipe = two.stub.recipe
    recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", "{stop_grace: 5s}"))
    job = two.sbatch("--nodes=2", str(SCRIPT), recipe.name)
    after = two.sbatch("--nodes=1", f"--dependency=afterok:{job}", "--wrap=true")
    first = two.attempt(1)
    two.slurm.at_desk("scontrol", "requeue", job)
    wait_until(first.exit.exists)
    assert code(first) == ExitCode.STOPPED, "sealed between SIGTERM and SIGKILL"
    assert two.slurm.state(after) == "PENDING"
    two.stub.behave("train 50", "train 50")
    facts = two.ended(job, "COMPLETED")
    assert facts["Restarts"] == "1" and len(two.run.attempts()) == 2
    assert two.slurm.wait_for(after, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED"
    log = (two.stub.root / f"by-hand-{job}.log").read_text()
    assert log.count("all 2 ranks are up") == 2, "both lives are in one log"


def test_a_time_limit_is_crossed(two: Two) -> None:
    made = two.stub.speechctl("launch", "stub.yaml", "--hold")
    assert made.stdout == f"{two.run.root}\n" and not two.run.attempts()
    assert two.stub.speechctl("launch", "stub.yaml", "--hold").stdout == made.stdout
    other = two.stub.speechctl("launch", "stub.yaml", "--hold", "--set", "seed=2")
    assert other.returncode == ExitCode.USAGE and "exists already" in other.stderr
    # SLURM looks at its limits every half a minute: this one is warned of at the first look.
    job = two.sbatch("--nodes=2", "--time=1", "--signal=B:USR2@50", str(SCRIPT), made.stdout.strip())
    first = two.attempt(1)
    wait_until(first.exit.exists, 60)
    assert code(first) == ExitCode.STOPPED
    assert rundir.read_json(two.run.stop_request)["why"] == "SLURM: the time limit of this job is near"
    two.stub.behave("train 50", "train 50")
    facts = two.ended(job, "COMPLETED")
    assert (facts["Restarts"], facts["ExitCode"]) == ("1", "0:0") and len(two.run.attempts()) == 2


def test_scancel_leaves_time_to_seal_and_is_the_end(two: Two) -> None:
    two.stub.behave("slow", "slow")
    job = two.launch()
    attempt = two.attempt(1)
    two.slurm.at_desk("scancel", job)
    facts = two.ended(job, "CANCELLED")
    assert code(attempt) == ExitCode.STOPPED and facts["Restarts"] == "0"
    shown = two.stub.speechctl("status", str(two.run.root), "--json")
    value = json.loads(shown.stdout)
    assert (value["state"], value["job"]["state"]) == ("stopped", "CANCELLED")


def test_a_run_that_a_person_stops_is_not_requeued(two: Two) -> None:
    job = two.launch()
    attempt = two.attempt(1)
    second = two.stub.speechctl("resume", str(two.run.root))
    assert second.returncode == ExitCode.USAGE and "is in use by" in second.stderr
    assert two.stub.speechctl("stop", str(two.run.root)).returncode == 0
    facts = two.ended(job, "FAILED")
    assert code(attempt) == ExitCode.STOPPED
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0"), "the supervisor's own code"
    two.stub.behave("train 50", "train 50")
    again = two.stub.speechctl("resume", str(two.run.root))
    assert again.returncode == 0, again.stderr
    two.ended(str(int(job) + 1), "COMPLETED")
    assert len(two.run.attempts()) == 2


def test_a_node_is_drained_under_a_run(two: Two) -> None:
    """The run goes on to its end there, and the next job waits: for that there is `status`, and `stop`."""
    job = two.launch()
    two.attempt(1)
    two.slurm.at_desk("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    assert two.slurm.state(job) == "RUNNING"
    two.stub.speechctl("stop", str(two.run.root))
    two.ended(job, "FAILED")
    assert two.stub.speechctl("resume", str(two.run.root)).returncode == 0
    waiting = str(int(job) + 1)
    wait_until(lambda: two.slurm.show(waiting).get("Reason", "None") not in ("None", "Priority"))
    shown = two.stub.speechctl("status", str(two.run.root))
    assert re.search(rf"^job +{waiting} PENDING .*(ReqNode|DRAINED)", shown.stdout, flags=re.MULTILINE), shown.stdout
    second = two.stub.speechctl("resume", str(two.run.root))
    assert second.returncode == ExitCode.USAGE
    assert f"error: {two.run.root} has a job already: {waiting} PENDING (" in second.stderr
    stopped = two.stub.speechctl("stop", str(two.run.root))
    assert stopped.stdout == f"{two.run.root}: job {waiting} is cancelled\n"
    two.ended(waiting, "CANCELLED")


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_a_node_crashes(two: Two, name: str) -> None:
    """The first has the batch script and the supervisor."""
    job = two.launch()
    two.attempt(1)
    two.slurm.power_off(name)
    wait_until(lambda: two.slurm.show(job).get("Restarts") == "1", 60)
    assert empty(two.run.root, within_s=20), "the other node ended its rank"
    two.stub.behave("train 50", "train 50")
    two.slurm.power_on(name)
    two.ended(job, "COMPLETED", timeout_s=90)
    assert len(two.run.attempts()) == 2


def test_the_controller_is_restarted(two: Two) -> None:
    job = two.launch()
    attempt = two.attempt(1)
    time.sleep(6)  # a controller that has not yet saved that a job runs would start it a second time
    two.slurm.kill_controller()
    shown = two.stub.speechctl("status", str(two.run.root))
    assert re.search(rf"^job +{job} UNKNOWN \(Unable to contact slurm controller", shown.stdout, flags=re.MULTILINE)
    assert "state   running" in shown.stdout
    refused = two.stub.speechctl("launch", "stub.yaml", "--set", "name=other")
    assert refused.returncode == ExitCode.HOST and "`scontrol ping`" in refused.stderr
    two.slurm.start_controller()
    two.stub.speechctl("stop", str(two.run.root))
    two.ended(job, "FAILED")
    assert code(attempt) == ExitCode.STOPPED and len(two.run.attempts()) == 1


@pytest.mark.parametrize("what", ["supervisor", "srun"])
def test_what_is_killed_inside_a_job_starts_another_life(two: Two, what: str) -> None:
    job = two.launch()
    two.attempt(1)
    signs = {"supervisor": ["--in-allocation"], "srun": ["srun", "--nodelist=node2"]}[what]
    two.process(*signs).kill()
    two.stub.behave("train 50", "train 50")
    facts = two.ended(job, "COMPLETED")
    assert facts["Restarts"] == "1" and len(two.run.attempts()) == 2


def test_a_host_that_is_lost_is_left_out_of_the_next_life(two: Two) -> None:
    recipe = two.stub.recipe
    recipe.write_text(recipe.read_text().replace("nodes: 2", "nodes: 1"))
    job = two.launch()
    wait_until(lambda: two.run.attempts())
    host = two.slurm.show(job)["NodeList"]
    rundir.append_line(two.run.avoided, {"host": "node9", "why": "long ago", "until": time.time() - 600})
    step = two.process("srun", f"--nodelist={host}")
    wait_until(lambda: (two.run.attempts()[0].ranks / "rank-00000.json").exists())
    two.stub.behave("train 50")
    step.kill()
    facts = two.ended(job, "COMPLETED")
    assert (facts["ExcNodeList"], facts["NodeList"]) == (host, {"node1": "node2", "node2": "node1"}[host])
    assert rundir.read_json(two.run.attempts()[-1].rank(0))["host"] == facts["NodeList"]


def test_a_job_that_slurm_refuses_leaves_no_run(two: Two) -> None:
    done = two.stub.speechctl("launch", "stub.yaml", "--set", "launch.slurm.partition=nowhere")
    assert done.returncode == ExitCode.HOST
    assert "error: sbatch refused the job: invalid partition specified: nowhere" in done.stderr
    assert "hint: `sinfo` lists the partitions; set launch.slurm.partition" in done.stderr
    assert not two.run.root.exists()
