"""What is asked of SLURM, to the word, and what is said when it refuses. Real jobs are in `cluster/test_slurm.py`."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from launcher import cause, environment, jobs, rundir
from launcher.backends import slurm
from launcher.errors import ExitCode, HostError, InfrastructureError, PreflightError, UsageError
from launcher.lock import RunLock
from launcher.recipe_file import RecipeError, load
from launcher.rundir import Run
from tests.conftest import RECIPE, Golden, Stub

ROOT = Path(__file__).parent.parent

FAKE = """\
#!{python}
import json, os, sys
from pathlib import Path
record = Path(__file__).with_suffix(".json")
said = json.loads(record.read_text()) if record.exists() else []
record.write_text(json.dumps([*said, {{"argv": sys.argv[1:], "environment": dict(os.environ)}}]))
answer = json.loads(Path(__file__).with_name("answers.json").read_text())[Path(__file__).name]
sys.stdout.write(answer[1])
sys.stderr.write(answer[2])
sys.exit(answer[0])
"""


class Fakes:
    """Commands of SLURM on PATH that write down what they were asked, and answer as they are told."""

    def __init__(self, stub: Stub) -> None:
        self.folder = stub.root / "fakes"
        self.folder.mkdir()
        self.answers: dict[str, tuple[int, str, str]] = {}
        stub.env["PATH"] = f"{self.folder}:{os.environ['PATH']}"

    def answer(self, name: str, code: int = 0, out: str = "", err: str = "") -> None:
        self.answers[name] = (code, out, err)
        (self.folder / "answers.json").write_text(json.dumps(self.answers))
        (self.folder / name).write_text(FAKE.format(python=sys.executable))
        (self.folder / name).chmod(0o755)

    def asked(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found


@pytest.fixture
def fakes(stub: Stub) -> Fakes:
    made = Fakes(stub)
    made.answer("sbatch", out="12;cluster\n")
    write(stub, "{backend: slurm, nodes: 2}")
    return made


def write(stub: Stub, launch: str) -> None:
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))


ODD = [
    "two words",
    "'",
    '"',
    "$(touch canary)",
    "`touch canary`",
    ";touch canary",
    "\\",
    "--wrap=touch",
    "%j",
    "*",
    "é",
]


def test_values_of_the_recipe_reach_sbatch_as_single_words(stub: Stub, fakes: Fakes) -> None:
    odd = " ".join(ODD)
    fields = ("partition", "account", "qos", "gres", "exclude")
    value = {name: f"{name} {odd}" for name in fields}
    launch = {"backend": "slurm", "nodes": 2, "slurm": {**value, "time": 90061, "options": [f"--comment={odd}"]}}
    run_dir = stub.root / "a run of 100%; $(touch canary)"
    write(stub, json.dumps(launch))
    done = stub.speechctl("launch", "stub.yaml", "--set", f"run_dir={json.dumps(str(run_dir))}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job  12\n")
    ((asked),) = fakes.asked("sbatch")
    assert asked["argv"] == [
        *("--parsable", "--job-name=stub", "--nodes=2", "--ntasks-per-node=1", "--signal=B:USR2@180"),
        *("--requeue", "--open-mode=append", "--export=ALL", f"--chdir={run_dir}"),
        f"--output={stub.root}/a run of 100%%; $(touch canary)/slurm/job-%j.log",
        *(f"--{name}={name} {odd}" for name in ("partition", "account", "qos", "gres")),
        "--time=1-01:01:01",
        f"--exclude=exclude {odd}",
        f"--comment={odd}",
        str(slurm.SCRIPT),
        str(run_dir),
    ]
    assert (run_dir / "slurm").is_dir(), "sbatch has somewhere to put the log"
    assert rundir.read_json(run_dir / "slurm" / "job-12.json")["argv"] == ["sbatch", *asked["argv"]]
    assert not list(stub.root.rglob("canary"))


@pytest.mark.parametrize(
    "option", ["--wrap=x", "--wra=x", "--w=x", "--export-f=/x", "--chdir=/", "-N2", "--no=1", "wrap"]
)
def test_options_that_are_not_the_recipes_are_refused_whole_and_abbreviated(stub: Stub, option: str) -> None:
    """sbatch takes `--wra=…` for `--wrap=…`, and so did the recipe: a job could run something else than its run."""
    write(stub, json.dumps({"backend": "slurm", "nodes": 1, "slurm": {"options": ["--mem=0", option]}}))
    with pytest.raises(RecipeError, match=r"is set by speechctl|expected a long option of sbatch"):
        load(stub.recipe)


def test_what_sbatch_says_instead_of_a_number_is_no_job(stub: Stub, fakes: Fakes) -> None:
    fakes.answer("sbatch", out="slurm-wlm 22.05.8\n")
    write(stub, "{backend: slurm, nodes: 1, slurm: {options: [--version]}}")
    done = stub.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.HOST
    assert "error: expected the number of a job from sbatch, and it said 'slurm-wlm 22.05.8'" in done.stderr
    assert not stub.run.root.exists()


def test_a_line_break_is_no_end_of_a_word(stub: Stub, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are read without any; this is for who makes one in Python."""
    monkeypatch.setenv("PATH", stub.env["PATH"])
    value = load(stub.recipe)
    odd = value.launch.slurm.model_copy(update={"partition": "main\n#SBATCH --wrap=x", "options": ["--comment=a\nb"]})
    value = value.model_copy(update={"launch": value.launch.model_copy(update={"slurm": odd})})
    stub.run.root.mkdir(parents=True)
    assert jobs.submit(stub.run, value).id == "12"
    argv = fakes.asked("sbatch")[0]["argv"]
    assert "--partition=main\n#SBATCH --wrap=x" in argv and "--comment=a\nb" in argv
    with pytest.raises(UsageError, match="no backslash and no control character"):
        jobs.submit(Run(stub.root / "a\nb"), value)


def test_the_environment_of_a_job_is_what_ranks_may_have_and_settings(stub: Stub, fakes: Fakes) -> None:
    given = {
        "AWS_SECRET_ACCESS_KEY": "secret",
        "SBATCH_RESERVATION": "mine",
        "SLURM_CPU_BIND": "x",
        "NCCL_DEBUG": "INFO",
    }
    stub.env |= given
    assert stub.speechctl("launch", "stub.yaml").returncode == 0
    found = fakes.asked("sbatch")[0]["environment"]
    assert {k: found.get(k) for k in given} == {**given, "AWS_SECRET_ACCESS_KEY": None}
    assert found["PATH"].split(":")[:2] == [str(Path(sys.executable).parent), str(fakes.folder)]
    inside = jobs.environment_of_a_job({**given, "SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/x", "PATH": "/bin"})
    assert sorted(inside) == ["NCCL_DEBUG", "PATH", "SBATCH_RESERVATION", "SLURM_CONF"], "the rest is that job's"
    named = jobs.environment_of_a_job({"HF_MINE": "named by the recipe", "HF_HOME": "/hub"}, without=["HF_MINE"])
    assert sorted(named) == ["HF_HOME", "PATH"]


def test_a_job_that_is_refused_leaves_no_run_and_says_why(stub: Stub, fakes: Fakes) -> None:
    words = "sbatch: error: invalid account\nsbatch: error: Batch job submission failed: Invalid account or\x1b[31m\n"
    fakes.answer("sbatch", 1, err=words)
    done = stub.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.HOST
    assert done.stderr == (
        "error: sbatch refused the job: invalid account; Batch job submission failed: Invalid account or\\x1b[31m\n\n"
        "hint: `sacctmgr show associations user=$USER` lists the accounts; set launch.slurm.account\n"
    )
    assert not stub.run.root.exists()


def test_without_sbatch_it_says_where_to_be(stub: Stub, fakes: Fakes) -> None:
    (fakes.folder / "sbatch").unlink()
    stub.env["PATH"] = str(fakes.folder)
    done = stub.speechctl("launch", "stub.yaml")
    assert done.returncode == ExitCode.HOST
    assert done.stderr.startswith("error: cannot start sbatch: No such file or directory\n\nhint: run this where SLURM")
    assert not stub.run.root.exists()


def test_a_controller_that_is_away_is_asked_again(
    stub: Stub, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", stub.env["PATH"])
    monkeypatch.setattr(jobs, "PAUSES_S", (0, 0))
    fakes.answer("scancel", 1, err=f"scancel: error: {jobs.UNREACHABLE} (connect failure)\n")
    with pytest.raises(HostError, match="Unable to contact"):
        jobs.cancel(jobs.Job("12", "PENDING", ""))
    assert len(fakes.asked("scancel")) == 3
    fakes.answer("scancel", 1, err="scancel: error: Kill job error on job id 12: Socket timed out on send/recv\n")
    with pytest.raises(HostError, match="timed out"):
        jobs.cancel(jobs.Job("12", "PENDING", ""))
    assert len(fakes.asked("scancel")) == 4, "it may have been heard"


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "reason"),
    [
        ((0, "PENDING|Resources\n", ""), None, "PENDING", "Resources"),
        ((0, "PENDING|Resources|/runs/a b|c\n", ""), None, "PENDING", "Resources"),
        ((0, "RUNNING|None|/x\n", ""), None, "UNKNOWN", "SLURM has forgotten it: its 12 is another job, of /x"),
        ((1, "", "Invalid job id specified\n"), (0, "CANCELLED by 0|/runs/a b|c\n", ""), "CANCELLED", ""),
        (
            (1, "", "Invalid job id specified\n"),
            (0, "COMPLETED|/x\n", ""),
            "UNKNOWN",
            "SLURM has forgotten it: its 12 is another job, of /x",
        ),
        ((1, "", "Invalid job id specified\n"), (1, "", "disabled\n"), "UNKNOWN", "SLURM has forgotten it"),
        ((1, "", f"{jobs.UNREACHABLE}\n"), None, "UNKNOWN", jobs.UNREACHABLE),
        (None, None, "UNKNOWN", "cannot start squeue: No such file or directory"),
    ],
)
def test_the_state_of_a_job(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, squeue: Any, sacct: Any, state: str, reason: str
) -> None:
    monkeypatch.setenv("PATH", str(fakes.folder))
    for name, answer in (("squeue", squeue), ("sacct", sacct)):
        if answer is not None:
            fakes.answer(name, *answer)
    assert jobs.look_up("12", "/runs/a b|c") == jobs.Job("12", state, reason)


def test_a_job_of_somebody_else_is_not_cancelled(stub: Stub, fakes: Fakes) -> None:
    """Of two clusters on one home directory, the one that was asked had another job of the same number running, and
    `speechctl stop` cancelled that."""
    assert stub.speechctl("launch", "stub.yaml").returncode == 0
    fakes.answer("scancel")
    fakes.answer("squeue", out="PENDING|Resources|/home/somebody\n")
    done = stub.speechctl("stop", str(stub.run.root))
    assert (done.returncode, fakes.asked("scancel")) == (ExitCode.USAGE, [])
    assert f"error: {stub.run.root} is not running" in done.stderr
    fakes.answer("squeue", out=f"PENDING|Resources|{stub.run.root}\n")
    done = stub.speechctl("stop", str(stub.run.root))
    assert (done.stdout, len(fakes.asked("scancel"))) == (f"{stub.run.root}: job 12 is cancelled\n", 1)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        *((None, 0), ("gpu", 1), ("gpu:8", 8), ("gpu:h100:8", 8), ("gpu:h100", 1), ("gpu:a:2,nvme:1,gpu:b:3", 5)),
        *(("nvme:4", 0), ("gpuish:8", 0), ("gpu:0", 0)),
    ],
)
def test_gpus_of_gres(gres: str | None, gpus: int) -> None:
    assert environment.gpus_of_gres(gres) == gpus


def test_ranks_follow_from_gres(stub: Stub) -> None:
    def slots(launch: str) -> list[tuple[str, int]]:
        write(stub, launch)
        return [(h.name, h.slots) for h in environment.machines(load(stub.recipe))]

    assert slots("{backend: slurm, nodes: 2, slurm: {gres: 'gpu:8'}}") == [("node-000", 8), ("node-001", 8)]
    assert slots("{backend: slurm, nodes: 1}") == [("node-000", 1)]
    assert slots("{backend: slurm, nodes: 1, device: cpu, slurm: {gres: 'gpu:8'}}") == [("node-000", 1)]
    assert slots("{backend: slurm, nodes: 1, processes: 4, slurm: {gres: 'gpu:8'}}") == [("node-000", 4)]
    with pytest.raises(PreflightError, match=r"a node of launch.slurm.gres has 2 GPU"):
        slots("{backend: slurm, nodes: 1, processes: 4, slurm: {gres: 'gpu:2'}}")


@pytest.mark.parametrize(
    ("launch", "complaint"),
    [
        ("{slurm: {time: 4m}}", "slurm.time, 240 s, leaves nothing to train in: .* 240 s in all"),
        ("{stop_grace: 171s}", "slurm.warning, 180 s, must be longer than launch.stop_grace, 171 s, .* at least 181 s"),
    ],
)
def test_a_time_limit_must_leave_time_to_save(stub: Stub, launch: str, complaint: str) -> None:
    write(stub, "{backend: slurm, nodes: 1, " + launch[1:])
    with pytest.raises(RecipeError, match=complaint):
        load(stub.recipe)
    write(stub, launch)
    load(stub.recipe)  # the other backends do not look at it


def test_backend_on_the_command_line_resets_what_is_of_others(stub: Stub, fakes: Fakes) -> None:
    write(stub, "{backend: ssh, hostfile: hosts, include: [a], nodes: 2, stop_grace: 2s}")
    done = stub.speechctl("launch", "stub.yaml", "--backend", "slurm")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(stub.run.root)
    stub.behave("train 5")
    done = stub.speechctl("launch", "stub.yaml", "--backend", "local")
    assert done.returncode == 0, done.stderr


# The plan ------------------------------------------------------------------------------------------------------------


SIXTY_FOUR = {
    "local": "{processes: 8}",
    "ssh": "{backend: ssh, hostfile: hosts}",
    "slurm": "{backend: slurm, nodes: 64, slurm: {partition: batch, account: speech, gres: 'gpu:h100:8', time: 24h,"
    " exclude: 'gpu[07,09]', options: [--exclusive, --mem=0, '--comment=two words']}}",
}


@pytest.mark.parametrize("backend", SIXTY_FOUR)
def test_the_plan_of_64_nodes(stub: Stub, golden: Golden, backend: str) -> None:
    write(stub, SIXTY_FOUR[backend])
    (stub.root / "hosts").write_text("".join(f"gpu-{k:02d} slots=8\n" for k in range(1, 65)))
    options = ("--dry-run", "--set", "run_dir=/shared/runs/big")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = stub.speechctl("launch", "stub.yaml", *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "0.3 s of a processor is usual"
    golden(f"dry-run/64-{backend}.txt", done.stdout.replace(str(ROOT), "/opt/speechctl"))
    assert not Path("/shared/runs/big").exists()


def test_64_nodes_are_not_this_machine(stub: Stub) -> None:
    write(stub, "{nodes: 64, processes: 8}")
    done = stub.speechctl("launch", "stub.yaml", "--dry-run")
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert "backend local is this machine, one node; launch.nodes is of backends ssh and slurm\n" in done.stderr
    assert "\n\nhint: " in done.stderr


def test_a_plan_for_another_backend_than_the_recipe_says(stub: Stub) -> None:
    """`launch` took --backend and `plan` and `prepare` did not, so that nobody could look before they leapt."""
    write(stub, "{processes: 2}")
    (stub.root / "hosts").write_text("gpu-01 slots=4\ngpu-02 slots=4\n")
    options = ("--backend", "ssh", "--set", "launch.hostfile=hosts", "--json")
    hosts = json.loads(stub.speechctl("plan", "stub.yaml", *options).stdout)["hosts"]
    assert [(h["name"], h["slots"]) for h in hosts] == [("gpu-01", 4), ("gpu-02", 4)]
    done = stub.speechctl("prepare", "stub.yaml", "--backend", "ssh")
    assert done.returncode == ExitCode.USAGE
    assert "backend ssh needs launch.hostfile" in done.stderr


def test_the_abbreviated_commands_are_the_real_ones(stub: Stub) -> None:
    write(stub, SIXTY_FOUR["slurm"])
    stub.recipe.write_text(stub.recipe.read_text() + "run_dir: /shared/runs/big\n")
    out = json.loads(stub.speechctl("plan", "stub.yaml", "--json").stdout)
    node = "/shared/runs/big/attempts/0001/node.sh"
    assert out["commands"][0][0] == "sbatch" and len(out["commands"]) == 65
    for k, command in enumerate(out["commands"][1:]):
        assert command == ["srun", *slurm.SRUN, f"--nodelist=node-{k:03d}", "bash", node, str(k)]


# The script ----------------------------------------------------------------------------------------------------------


def test_the_script_is_one_file_and_goes_with_the_package() -> None:
    assert (ROOT / "slurm" / "train.sbatch").resolve() == slurm.SCRIPT
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packaged["launcher.backends"] == [slurm.SCRIPT.name]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_script_is_clean() -> None:
    done = subprocess.run(["shellcheck", str(slurm.SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_flag_of_the_script_has_its_reason() -> None:
    lines = slurm.SCRIPT.read_text().splitlines()
    flags = [k for k, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(flags) == 5
    assert all(lines[k + 1].startswith("#   ") for k in flags)


@pytest.mark.parametrize(
    ("arguments", "complaint"), [([], "usage: sbatch"), (["runs/x y"], "hint: sbatch {script} runs/x\\ y")]
)
def test_the_script_outside_of_a_job(arguments: list[str], complaint: str) -> None:
    command = ["bash", str(slurm.SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    assert done.returncode == ExitCode.USAGE
    assert complaint.format(script=slurm.SCRIPT) in done.stderr


class Inside:
    """The script as in a job, around a supervisor and a scontrol that are told what to do."""

    def __init__(self, root: Path) -> None:
        self.root, self.run, self.bin = root, root / "a run", root / "bin"
        self.stop = self.run / "control" / "stop"
        for folder in (self.bin, self.stop.parent, self.run / "slurm"):
            folder.mkdir(parents=True)
        (self.run / "resolved.yaml").touch()
        (self.run / "lock").write_text('{"pid": 1, "job": "7"}')
        known = f'[ ! -e "{root}/state" ] || cat "{root}/state"'
        refuses = f'exit "$(cat "{root}/refuses" 2>/dev/null || echo 0)"'
        self.program("scontrol", f'echo "$*" >>"{root}/asked"; {known}; {refuses}')
        self.program("sleep", "exit 0")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def go(self, supervisor: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """
        Args:
            supervisor: what it does, in bash; $script is the script.
        """
        self.program(
            "speechctl", f'echo "speechctl $*" >>"{self.root}/asked"; cd "{self.run}"\n{OF_SCRIPT}{supervisor}'
        )
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        command = ["bash", str(slurm.SCRIPT), *(arguments or (str(self.run),))]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=self.root, timeout=20
        )

    @property
    def asked(self) -> list[str]:
        lines = (self.root / "asked").read_text().splitlines()
        return [line for line in lines if not line.startswith(("speechctl resume", "show job"))]


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path)


OF_SCRIPT = "read -r _ _ _ script _ </proc/$PPID/stat; "
PERSON = """echo '{"why": "speechctl stop"}' >control/stop; """
WARN = "kill -USR2 $script; while [ ! -e control/stop ]; do read -rt 0.01 <> <(:); done; "
END = "kill -TERM $script; "


@pytest.mark.parametrize(
    ("does", "code", "again"),
    [
        *((f"exit {code}", code, False) for code in (0, 1, 2, 3, 5, 70, 74, 77, 78)),
        *((f"exit {code}", code, True) for code in (75, 76)),
        ("kill -KILL $$", 137, True),
        ("kill -SEGV $$", 139, True),
        *((PERSON + f"exit {code}", code, False) for code in (75, 76)),
        (PERSON + "kill -KILL $$", 137, False),
        (WARN + "exit 75", 75, True),
        (WARN + "exit 76", 76, True),
        (WARN + "exit 0", 0, False),
        (PERSON + WARN + "exit 75", 75, False),
        (WARN + PERSON + "exit 75", 75, False),
        (END + "exit 75", 75, False),
        (END + "kill -KILL $$", 137, False),
    ],
)
def test_which_ends_are_requeued(inside: Inside, does: str, code: int, again: bool) -> None:
    done = inside.go("trap '' TERM; " + does)
    assert done.returncode == code, done.stderr
    assert inside.asked == ["requeue 7"] * again


def test_an_exit_code_is_heard_whenever_it_comes(inside: Inside) -> None:
    """The script waited for it by `read -t 1`, which lost what came just as that second was over, some in a hundred
    times: a run that had finished was taken for killed, and queued again."""
    (inside.bin / "sleep").unlink()
    inside.program("speechctl", "exec sleep 0.$((960 + RANDOM % 40))")
    environment = {"PATH": f"{inside.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", str(slurm.SCRIPT), str(inside.run)]
    jobs = [subprocess.Popen(command, env=environment, cwd=inside.root) for _ in range(100)]
    assert [job.wait(60) for job in jobs] == [0] * 100
    assert not (inside.root / "asked").exists(), "none is queued again"


def test_a_warning_before_the_lock_is_said_again(inside: Inside) -> None:
    """Whoever takes the run's lock removes what was asked of the one before."""
    wait = "while [ ! -e control/stop ]; do read -rt 0.01 <> <(:); done; "
    done = inside.go("kill -USR2 $script; " + wait + "rm control/stop; " + wait + "exit 75")
    assert done.returncode == 75 and inside.asked == ["requeue 7"]
    assert json.loads(inside.stop.read_text())["why"] == "SLURM: the time limit of this job is near"


@pytest.mark.parametrize(
    ("does", "state", "kind"),
    [
        (WARN, "PreemptTime=None", "time limit"),
        (END, "PreemptTime=2026-11-21T10:00:00", "preempted"),
        (END, "PreemptTime=None", "stopped by force"),
    ],
)
def test_a_save_that_outlasts_the_grace_ends_for_what_slurm_wanted(
    inside: Inside, does: str, state: str, kind: str
) -> None:
    """The script did not say what it asked for, and the end was laid to a person while the job was queued again."""
    (inside.root / "state").write_text(f"   PreemptEligibleTime=2026-11-21T09:00:00 {state}\n")
    said = """echo '{"why": "SIGTERM to the launcher"}' >control/stop; """ * (does == END)
    wait = "until grep -q kind control/stop; do read -rt 0.01 <> <(:); done 2>/dev/null; "
    inside.go("trap '' TERM; " + said + does + wait + "exit 76")
    attempt = Run(inside.run).new_attempt()
    rundir.write_json(attempt.hosts, [{"name": "node1", "slots": 1}])
    killed = "a stop was asked for, and launch.stop_grace, 120 s, was over"
    rundir.write_json(attempt.node(0), {"host": "here", "returncode": -9, "asked": None, "killed": killed})
    cause.conclude(attempt, [1])
    assert rundir.read_json(attempt.failure)["kind"] == kind


def test_a_job_that_waits_for_the_run_stops_nobody_else(inside: Inside) -> None:
    """The warning of a second job, which only waited for the lock, once stopped the job that trained."""
    (inside.run / "lock").write_text('{"pid": 1, "job": "6"}')
    done = inside.go("kill -USR2 $script; read -rt 2 <> <(:); exit 2")
    assert (done.returncode, inside.asked, inside.stop.exists()) == (2, [], False)


def test_a_run_may_be_called_by_its_name(inside: Inside) -> None:
    """`stub` was taken for a directory of that name beside `runs`, and what was asked of the run went there."""
    (inside.root / "stub").mkdir()
    (inside.root / "runs").mkdir()
    inside.run.rename(inside.root / "runs" / "stub")
    inside.run = inside.root / "runs" / "stub"
    inside.stop = inside.run / "control" / "stop"
    done = inside.go(WARN + "exit 75", "stub")
    assert done.returncode == 75 and inside.asked == ["requeue 7"] and inside.stop.exists()


def test_the_next_life_keeps_away_from_hosts(inside: Inside) -> None:
    assert inside.go("echo -n 'gpu[01,03]' >slurm/exclude; exit 76").returncode == 76
    assert inside.asked == ["requeue 7", "update JobId=7 ExcNodeList=gpu[01,03]"]
    (inside.root / "asked").unlink()
    assert inside.go("echo -n >slurm/exclude; exit 76").returncode == 76
    assert inside.asked == ["requeue 7", "update JobId=7 ExcNodeList="], "and gives them back"


def test_a_host_is_let_back_and_only_avoided_where_others_can_take_its_place(
    stub: Stub, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was excluded once stayed so for all lives of the job; and nodes without a GPU, or of another partition,
    counted as others: the job was to do without nodes that it cannot do without, and waited for ever."""
    monkeypatch.setenv("PATH", stub.env["PATH"])
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    run, recipe = stub.run, load(stub.recipe)  # two nodes
    run.slurm.mkdir(parents=True)
    gpus = [f"gpu{k}|main*|{state}|64|500000|gpu:h100:8(S:0-1)|ib" for k, state in enumerate(("down*", "idle", "mix"))]
    others = [f"cpu{k}|main*|idle|64|500000|(null)|ib\nlow{k}|low|idle|64|500000|gpu:h100:8(S:0-1)|ib" for k in (0, 1)]
    other_gpus = ["a100|main*|idle|64|500000|gpu:a100:8|ib", "down|main*|idle*|64|500000|gpu:h100:8(S:0-1)|ib"]
    rundir.append_line(run.avoided, {"host": "gpu0", "until": time.time() + 60})
    rundir.append_line(run.avoided, {"host": "gone", "until": time.time() + 60})
    fakes.answer("sinfo", out="\n".join([*gpus[:2], *others, *other_gpus]))
    assert jobs.spared(run, recipe) == [], "there is one other node of that kind"
    fakes.answer("sinfo", out="\n".join([*gpus, *others, *other_gpus]))
    assert jobs.spared(run, recipe) == ["gpu0"], "what SLURM does not know it would refuse"
    assert fakes.asked("sinfo")[-1]["argv"][-1].startswith("--format=")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    rundir.write_json(run.slurm / "job-12.json", {"job": "12", "time": 1.0, "argv": [], "exclude": "bad[1-2]"})
    jobs.leave_exclusions(run, recipe)
    assert fakes.asked("sinfo")[-1]["argv"][-1] == "--partition=main"
    assert (run.slurm / "exclude").read_text() == "bad[1-2],gpu0"
    run.avoided.unlink()
    jobs.leave_exclusions(run, recipe)
    assert (run.slurm / "exclude").read_text() == "bad[1-2]"


def test_a_requeue_that_is_refused_says_what_to_type(inside: Inside) -> None:
    (inside.root / "refuses").write_text("1")
    done = inside.go("exit 75")
    assert done.returncode == 75 and inside.asked == ["requeue 7"] * 6
    assert done.stderr.endswith(f"hint: speechctl resume {inside.root}/a\\ run\n")


def test_the_script_makes_the_run_of_a_recipe(inside: Inside) -> None:
    (inside.root / "x y.yaml").touch()
    supervisor = f'[ "$1" = resume ] && [ "$2" = "{inside.run}" ] && exit 0; echo "{inside.run}"'
    assert inside.go(supervisor, "x y.yaml", "--set", "name=a b").returncode == 0
    made = "speechctl launch x y.yaml --backend slurm --set launch.nodes=2 --set name=a b --hold"
    assert inside.asked == [made]
    assert inside.go("exit 2", "x y.yaml").returncode == 2


def test_in_allocation_outside_of_one(stub: Stub, fakes: Fakes) -> None:
    assert stub.speechctl("launch", "stub.yaml", "--hold").stdout.strip() == str(stub.run.root)
    assert fakes.asked("sbatch") == []
    for name in [n for n in stub.env if n.startswith("SLURM_")]:
        del stub.env[name]
    done = stub.speechctl("resume", str(stub.run.root), "--in-allocation")
    assert done.returncode == ExitCode.USAGE
    assert "error: --in-allocation is for a process in a SLURM job, and this is in none" in done.stderr


# How nodes fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "came_up", "returncode", "code", "message"),
    [
        # As SLURM 22.05 says it; of a node that it has lost, srun itself makes 0.
        ("srun: error: Node failure on node2", True, 0, ExitCode.INFRASTRUCTURE, "lost node2: Node failure on node2"),
        (
            "srun: error: Task launch for StepId=4.0 failed on node node2: Communication connection failure",
            False,
            233,
            ExitCode.INFRASTRUCTURE,
            "lost node2: Task launch for StepId=4.0 failed on node node2: Communication connection failure",
        ),
    ],
)
def test_what_srun_says_of_a_node(
    stub: Stub, said: str, came_up: bool, returncode: int, code: ExitCode, message: str
) -> None:
    attempt = stub.attempt()
    rundir.write_json(attempt.hosts, [{"name": "node1", "slots": 1}, {"name": "node2", "slots": 1}])
    record = {"host": "node", "returncode": None, "killed": None, "asked": None}
    for k in range(2):
        attempt.srun_log(k).write_text("srun: cluster configuration lacks support for cpu binding\n")
        if k == 0 or came_up:
            rundir.write_json(attempt.node(k), {**record, "node_rank": k})
    attempt.srun_log(1).write_text(f"{said}\nsrun: Job step aborted: Waiting up to 7 seconds\n")
    assert cause.conclude(attempt, [1, returncode], [1, 0]) == code
    assert rundir.read_json(attempt.failure)["message"] == message


def test_a_job_comes_again_where_the_run_is_still_in_use(
    stub: Stub, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own life before may still be ending. But a second job on a run, or one that found it in use for ever, held
    its nodes for a minute, was queued again, and so on without end."""
    stub.run.root.mkdir(parents=True)
    monkeypatch.setenv("PATH", stub.env["PATH"])
    monkeypatch.setattr(jobs.LockInJob, "PATIENCE_S", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")

    def enter() -> None:
        with jobs.LockInJob(stub.run, "this life"):
            pass

    fakes.answer("squeue", out=f"(null)|{stub.run.root}\n")
    for _ in range(2):
        with RunLock(stub.run, "the life before"):
            for _ in range(2):
                with pytest.raises(InfrastructureError, match="in use by `the life before`"):
                    enter()
        enter()  # and it counts anew
    assert rundir.read_json(stub.run.slurm / "job-12.json")["exclude"] is None
    with RunLock(stub.run, "a life that does not end"):
        for error in (InfrastructureError, InfrastructureError, UsageError):
            with pytest.raises(error, match="in use by"):
                enter()
    enter()
    fakes.answer("squeue", out=f"RUNNING|None|{stub.run.root}\n")
    with RunLock(stub.run, "the first job"):
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        with pytest.raises(UsageError, match="in use by `the first job`"):
            enter()
        fakes.answer("squeue", out=f"COMPLETED|None|{stub.run.root}\n")
        with pytest.raises(InfrastructureError, match="in use by `the first job`"):
            enter()
