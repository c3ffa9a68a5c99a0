"""No value runs anything: hosts, users, paths, environment values, arguments and recipe strings, each with a payload.

What is accepted arrives at the far end byte by byte; what is not is refused with its place. The short form is 1,000
strings; SPEECHCTL_TEST_INJECTIONS=10000 is the whole of it. Real sshd: tests/cluster/test_injection.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import environment, hosts, jobs, nodelist, plan, recipe_file, rundir, secret, ui
from launcher.backends import local, slurm, ssh
from launcher.errors import ExitCode, SpeechctlError, UsageError
from launcher.hosts import Host
from launcher.node import NODE_SCRIPT
from launcher.prepare import new_hostfile
from launcher.recipe import Recipe
from launcher.recipe_file import RecipeError
from launcher.rundir import Attempt, Run
from tests.conftest import RECIPE, Stub, count, seed
from tests.injections import Injections
from tests.stub.speechctl import FACTS

TOTAL = int(os.environ.get("SPEECHCTL_TEST_INJECTIONS", "1000"))
SHARES = {
    **{"hostfiles": 0.2, "selections": 0.1, "variables": 0.2, "paths": 0.1, "recipes": 0.2, "prints": 0.05},
    **{"jobs": 0.09, "scripts": 0.03, "steps": 0.03},
}

RECORD = """\
#!/usr/bin/env bash
# Notes its arguments, each ended by NUL, and the PYTHONPATH it was given.
printf '%s\\0' "$@" "$PYTHONPATH" >>"$RECORD"
"""

FAKE_SSH = """\
#!/usr/bin/env bash
# What the real one does with them: all but the last are its own, the last is for a shell over there.
printf '%s\\0' "$@" >>"$SSH_RECORD"
exec sh -c "${@:$#}"
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Injections]:
    """Payloads; at the end there is no canary anywhere."""
    for name in ("trap", "here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = Injections(tmp_path / "trap", seed=seed(sum(map(ord, request.node.name))))
    yield made
    assert made.canaries(tmp_path) == []
    count("strings", made.made)


def test_a_canary_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every payload that a shell would run, where one is spliced into its command."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Injections(tmp_path, seed=1)
    for _ in range(100):
        text = made(without="\0").encode("utf-8", "surrogateescape")
        subprocess.run(["bash", "-c", b"echo " + text], capture_output=True, check=False)
    assert len(made.canaries(tmp_path)) > 50


def share(kind: str) -> int:
    assert abs(sum(SHARES.values()) - 1) < 1e-9
    return round(TOTAL * SHARES[kind])


def refused(error: SpeechctlError) -> bool:
    """Whether it is a message that a terminal can be shown, with a hint."""
    text = error.render()
    raw = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return raw == [] and "\n\nhint: " in text


# Hosts ----------------------------------------------------------------------------------------------------------------


def hostfile_line(make: Injections) -> str:
    bad = make(around="abc019.-")
    return make.rng.choice(
        (
            f"{bad} slots=2",
            f"{bad}@gpu-01 slots=2",
            f"gpu-01{bad} slots=2",
            f"gpu-01 slots=2{bad}",
            f"gpu-01 slots=2 address={bad}",
            f"gpu-01 slots=2 port={bad}",
            f"gpu-01 slots=2 gpus={bad}",
            f"gpu-01 {bad}=2",
            f"gpu-01 slots=2 {bad}",
            f"gpu-01 slots=2 # {bad}",
            f"[{bad}] slots=2",
            f"[fe80::1%{bad}] slots=2",
        )
    )


def test_hostfiles(make: Injections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted has nothing left of the payload, and ssh gets it behind `--` or as the value of an option."""
    programs = recorders(tmp_path, monkeypatch)
    attempt = recorded_attempt(tmp_path / "runs" / "plain", programs)
    accepted = 0
    for _ in range(share("hostfiles")):
        text = hostfile_line(make)
        try:
            found = hosts.parse_hostfile(text, "hosts")
        except UsageError as error:
            assert refused(error)
            assert re.search(r"(?m)^hosts:\d+", error.message), "it says where"
            continue
        accepted += 1
        for host in found:
            argv = ssh.argv(attempt, 0, host)
            assert argv[-3:-1] == ["--", host.name]
            assert re.fullmatch(r"[A-Za-z0-9:][A-Za-z0-9.:-]*", host.name)
            assert host.user is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", host.user)
            assert host.address is None or re.fullmatch(r"[0-9a-f.:]+", host.address)
            if accepted % 10 == 1:
                assert through_ssh(attempt, 0, host, tmp_path) == argv[1:]
    assert accepted > 0


def test_selections_and_node_lists(make: Injections) -> None:
    machines = [Host("gpu-01", 4), Host("gpu-02", 4)]
    for k in range(share("selections")):
        text = make(around="gpu-012:,[]")
        try:
            if k % 2:
                chosen = hosts.select(machines, [text], []) if k % 4 == 1 else hosts.select(machines, [], [text])
                assert {h.name for h in chosen} <= {"gpu-01", "gpu-02"}
            else:
                for name in nodelist.expand_nodelist(text):
                    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        except SpeechctlError as error:
            assert refused(error)


# What a rank gets -----------------------------------------------------------------------------------------------------


def test_environment_values(make: Injections, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the launcher, env.json or standard input, node.sh, the node and torchrun: every byte as it was."""
    stub.behave("train 1", "train 1")
    for name in [n for n in os.environ if environment.PASSED_ON.fullmatch(n) and n.endswith(("_proxy", "_PROXY"))]:
        monkeypatch.delenv(name)
    left, batch = share("variables"), 250
    while left > 0:
        values = {f"HF_X{k}": make(without="\0") for k in range(min(left, batch))}
        values |= {f"HF_X{k}_TOKEN": values.pop(f"HF_X{k}") for k in range(0, len(values), 5)}
        left -= batch
        done = stub.speechctl("launch", "stub.yaml", env={**stub.env, **values})
        assert done.returncode == ExitCode.FINISHED, done.stderr
        (attempt,) = stub.run.attempts()
        there = rundir.read_json(attempt.root / "torchrun.json")["variables"]
        for name, value in values.items():
            if secret.implied(name, value):
                value = f"sha256:{hashlib.sha256(os.fsencode(value)).hexdigest()}"
            assert there[name] == value, name
        stub.run.root.rename(tmp_path / f"done-{left}")


def recorders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note how they are called: `ssh` on PATH, and one in place of Python."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("ssh", FAKE_SSH), ("python", RECORD)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("SSH_RECORD", str(tmp_path / "ssh-record"))
    return programs


def recorded_attempt(root: Path, programs: Path, pythonpath: str = "") -> Attempt:
    """An attempt whose node.sh is the real one, and starts the recorder in place of Python."""
    Run(root).attempts_dir.mkdir(parents=True)
    attempt = Run(root).new_attempt()
    attempt.node_script.write_text(NODE_SCRIPT)
    (attempt.root / "interpreter").write_text(f"{programs / 'python'}\n")
    (attempt.root / "pythonpath").write_bytes(os.fsencode(pythonpath))
    return attempt


def noted(path: Path) -> list[str]:
    words = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
    path.unlink()
    return words


def through_ssh(attempt: Attempt, rank: int, host: Host, tmp_path: Path) -> list[str]:
    process = ssh.start(attempt, rank, host)
    process.communicate(timeout=20)
    assert process.returncode == 0, attempt.ssh_log(rank).read_bytes()
    assert noted(tmp_path / "record")[:4] == ["-m", "launcher.node", str(attempt.root), str(rank)]
    return noted(tmp_path / "ssh-record")


def test_paths(make: Injections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """node.sh of a run with an odd name, started here and by a shell at the other end of ssh."""
    programs = recorders(tmp_path, monkeypatch)
    (tmp_path / "runs").mkdir()
    recipe = recipe_file.load(recipe_at(tmp_path), [f"launch={{backend: ssh, hostfile: {tmp_path}/hosts}}"])
    (tmp_path / "hosts").write_text("gpu-01 slots=1\n")
    refusals = 0
    for k in range(share("paths")):
        name = make(without="/\0", around=" -.ab")
        root = tmp_path / "runs" / (name if name.strip(".") else f"x{name}")
        pythonpath = make(without="\0").rstrip("\n")  # a shell takes newlines off the end of what a command says
        attempt = recorded_attempt(root, programs, pythonpath)
        if k % 2:
            process = local.start(attempt, k, Host("localhost", 1))
            process.communicate(timeout=20)
            assert process.returncode == 0, attempt.node_log(k).read_bytes()
            words = noted(tmp_path / "record")
            assert words == ["-m", "launcher.node", str(attempt.root), str(k), pythonpath]
        else:
            assert through_ssh(attempt, k, Host("gpu-01", 1), tmp_path) == ssh.argv(attempt, k, Host("gpu-01", 1))[1:]
        try:
            environment.machines(recipe.model_copy(update={"run_dir": root}))
        except UsageError as error:
            assert refused(error)
            refusals += 1
    assert refusals > 0.8 * share("paths"), "ssh is spared what a shell would have to be asked to leave alone"


# SLURM ----------------------------------------------------------------------------------------------------------------

RECORD_WHOLE = """\
#!/usr/bin/env bash
# Notes its arguments and its environment, each word ended by NUL, and does what its last lines say.
printf '%s\\0' "$@" >>"{root}/record-${{0##*/}}"
env -0 >"{root}/environment-${{0##*/}}"
"""


def slurm_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **does: str) -> None:
    programs = tmp_path / "slurm-programs"
    programs.mkdir()
    for name, lines in does.items():
        (programs / name).write_text(RECORD_WHOLE.format(root=tmp_path) + lines + "\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def job_recipe(tmp_path: Path, root: Path, slurm: dict[str, Any]) -> Recipe:
    overrides = {"launch": {"backend": "slurm", "nodes": 2, "slurm": slurm}, "run_dir": str(root)}
    return recipe_file.load(recipe_at(tmp_path), [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def test_jobs(make: Injections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, paths and variables of a job: what the recipe, or SLURM, does not refuse is a word of its own there."""
    slurm_on_path(tmp_path, monkeypatch, sbatch="echo '12;cluster'", sinfo="echo 'n1 idle gpu:2'", scancel="")
    fields = ("partition", "account", "qos", "gres", "exclude", "options")
    submitted = 0
    for k in range(share("jobs") // 3):
        field, text, value = fields[k % 6], make(), make(without="\0")
        word = f"--comment={text}" if field == "options" else f"--{field}={text}"
        root = tmp_path / "runs" / f"r{make(without='/' + chr(0), around=' -.ab')}"
        try:
            recipe = job_recipe(tmp_path, root, {field: [word] if field == "options" else text})
        except RecipeError as error:
            assert refused(error) and re.search(r"(?m)^\S*(recipe\.yaml|--set)", error.message), "it says where"
            continue
        monkeypatch.setenv("HF_X", value)
        hidden = secret.implied("HF_X", value)
        root.mkdir(parents=True)
        try:
            job = jobs.submit(Run(root), recipe)
        except UsageError as error:
            assert refused(error)
            assert re.search(r"[\\\x00-\x1f]", str(root)), "SLURM cannot have a log there"
            continue
        submitted += 1
        words = noted(tmp_path / "record-sbatch")
        assert job.id == "12" and words == slurm.sbatch(recipe, Run(root))[1:]
        assert word in words and f"--chdir={root}" in words and words[-2:] == [str(slurm.SCRIPT), str(root)]
        there = (tmp_path / "environment-sbatch").read_bytes().split(b"\0")
        assert (os.fsencode(f"HF_X={value}") in there) != hidden
        assert jobs.submitted(slurm.sbatch_to_look(recipe.launch, "a name", 5), recipe.launch) == "12"
        words = noted(tmp_path / "record-sbatch")
        assert word in words and words[-1] == "--wrap=exec sleep 300"
        if field in ("partition", "exclude"):
            new_hostfile.from_slurm(recipe)
            asked = noted(tmp_path / "record-sinfo")
            assert asked[3:] == ([word] if field == "partition" else [])
    assert submitted > share("jobs") / 15


def test_the_batch_script(make: Injections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, with odd names of recipes and runs, arguments, and names of hosts to keep away from."""
    of_run = f'case $1 in launch) cat "{tmp_path}/run" ;; *) exit 75 ;; esac'
    slurm_on_path(tmp_path, monkeypatch, speechctl=of_run, scontrol="", srun="exit 1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    for k in range(share("scripts") // 3):
        root = tmp_path / "runs" / f"r{make(without='/' + chr(0)).rstrip(chr(10))}"
        argument = make(without="\0", around=" -ab")
        excluded = make(without="\0").rstrip("\n")
        (root / "control").mkdir(parents=True)
        (root / "slurm").mkdir()
        (root / "slurm" / "exclude").write_bytes(os.fsencode(excluded))
        (root / "resolved.yaml").touch()  # by which a run is told from a recipe
        (tmp_path / "run").write_bytes(os.fsencode(root) + b"\n")
        recipe = f"{root}.yaml"
        first = recipe if k % 2 else str(root)
        done = subprocess.run(["bash", slurm.SCRIPT, first, argument], capture_output=True, check=False, timeout=20)
        assert done.returncode == ExitCode.STOPPED, done.stderr
        made = ["launch", recipe, "--backend", "slurm", "--set", "launch.nodes=2", argument, "--hold"]
        resumed = ["resume", str(root), "--in-allocation"]
        assert noted(tmp_path / "record-speechctl") == ([*made, *resumed] if k % 2 else [*resumed, argument])
        requeued = ["requeue", "7", "update", "JobId=7", f"ExcNodeList={excluded}"]
        assert noted(tmp_path / "record-scontrol") == (requeued if excluded else requeued[:2])


def test_steps_of_a_job(make: Injections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = recorders(tmp_path, monkeypatch)
    slurm_on_path(tmp_path, monkeypatch, srun='while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    for k in range(share("steps") // 2):
        root = tmp_path / "runs" / f"r{make(without='/' + chr(0), around=' -.ab')}"
        pythonpath = make(without="\0").rstrip("\n")
        attempt = recorded_attempt(root, programs, pythonpath)
        process = slurm.start(attempt, k, Host("gpu-01", 1))
        process.communicate(timeout=20)
        assert process.returncode == 0, attempt.srun_log(k).read_bytes()
        assert noted(tmp_path / "record-srun") == slurm.argv(attempt, k, Host("gpu-01", 1))[1:]
        assert noted(tmp_path / "record") == ["-m", "launcher.node", str(attempt.root), str(k), pythonpath]


# Recipes --------------------------------------------------------------------------------------------------------------

TEXTS = (
    "name",
    "run_dir",
    "data.corpus",
    "data.packs",
    "data.train",
    "backbone.kind",
    "backbone.source",
    "launch.hostfile",
    "launch.include",
    "launch.secrets",
    "launch.slurm.partition",
    "launch.slurm.account",
    "launch.slurm.qos",
    "launch.slurm.gres",
    "launch.slurm.exclude",
    "launch.slurm.options",
    "launch.deadlines.step",
    "max_steps",
    "trackers",
)


def recipe_at(root: Path) -> Path:
    path = root / "recipe.yaml"
    path.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", "{}"))
    return path


def inside(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


def test_recipe_strings_and_arguments(make: Injections, tmp_path: Path) -> None:
    """As --set, and in the file. What is accepted is the same text after it went through resolved.yaml, and in the
    plan's files; what is not is refused with its place."""
    path = recipe_at(tmp_path)
    base = path.read_text()
    accepted = 0
    for k in range(share("recipes")):
        key = TEXTS[k % len(TEXTS)]
        text = make()
        if key == "launch.slurm.options":
            text = f"--comment={text}"
        listed = key in ("data.train", "launch.include", "launch.secrets", "launch.slurm.options", "trackers")
        quoted = json.dumps([text] if listed else text)
        raw = k // len(TEXTS) % 4 == 3
        overrides = [f"{key}={text if raw else quoted}"]
        if key == "backbone.source":
            overrides.insert(0, "backbone={kind: whisper, source: x}")
        if key == "launch.include":
            overrides.insert(0, "launch={backend: ssh, hostfile: hosts}")
        elif key == "launch.hostfile":
            overrides.insert(0, "launch={backend: ssh, hostfile: x}")
        try:
            recipe = recipe_file.load(path, overrides)
        except RecipeError as error:
            assert refused(error)
            assert error.problems
            continue
        accepted += 1
        value = inside(recipe.model_dump(mode="json"), key)
        if not raw:
            assert value == ([text] if listed else text)
        absolute = recipe_file.absolute(recipe, tmp_path)
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(recipe_file.dump(absolute))
        assert recipe_file.load(resolved) == absolute
        # In a file of its own: the same text at the same place, or refused too.
        path.write_text(recipe_file.dump(recipe))
        assert recipe_file.load(path) == recipe
        path.write_text(base)
        made = plan.make(absolute, [Host("localhost", 1)], FACTS).to_json()
        assert json.loads(json.dumps(made)) == made
    assert accepted > share("recipes") / 10


def test_what_is_printed_drives_no_terminal(make: Injections, capfd: pytest.CaptureFixture[str]) -> None:
    for k in range(share("prints")):
        text = make()
        if k % 3 == 0:
            ui.error(f"error: {text}\n\nhint: {text}")
        elif k % 3 == 1:
            ui.answer(text)
        else:
            ui.Progress(10)({"event": "save_failed", "step": 1, "error": text})
    said = capfd.readouterr()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\u2028\ufeff]", said.out + said.err)


def test_a_whole_run_below_a_name_with_a_payload(make: Injections, stub: Stub) -> None:
    stub.behave("train 5", "train 5")
    for _ in range(2):
        root = stub.root / "runs" / make(without="/\0\udcff\udcfe\x1b\x07\x9b\x85\r\n", around=" ab")
        done = stub.speechctl("launch", "stub.yaml", "--set", f"run_dir={json.dumps(str(root))}")
        assert done.returncode == ExitCode.FINISHED, done.stderr
        (attempt,) = Run(root).attempts()
        assert rundir.read_json(attempt.root / "torchrun.json")["argv"][-1] == str(attempt.root)
        assert rundir.read_json(Run(root).provenance)["command"][-1] == f"run_dir={json.dumps(str(root))}"
