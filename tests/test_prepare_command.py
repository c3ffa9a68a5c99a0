"""`speechctl prepare` as a command, on simulated hosts: many, different, to be mended, to be written down."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends import slurm
from launcher.errors import ExitCode
from launcher.hosts import Host, load_hostfile
from launcher.prepare import mend, session
from tests.conftest import Golden, Stub, count, gone, wait_until
from tests.simulated import Simulated, address

KINDS = {
    "fine": 24,
    "noisy": 2,
    "slow": 6,
    "dead": 8,
    "silent": 4,
    "refused": 6,
    "unknown": 2,
    "key": 2,
    "changed": 2,
    "denied": 2,
    "banner": 4,
    "bare": 2,
}
"""How many hosts of each kind: 64."""

VERDICTS = {
    "dead": ("reachable", "timed out: ssh: connect to host"),
    "silent": ("reachable", "no answer: nothing was heard in 1"),
    "refused": ("reachable", "refused: ssh: connect to host"),
    "unknown": ("reachable", "unknown name: ssh: Could not resolve"),
    "key": ("host key", "unknown host key: Host key verification failed."),
    "changed": ("host key", "changed host key: Host key verification failed."),
    "denied": ("reachable", "not let in: me@denied"),
    "banner": ("reachable", "no answer of sshd: Connection timed out during banner exchange"),
    "bare": ("reachable", "no python3: bash: line 1: exec: python3: not found"),
}


@pytest.fixture
def simulated(stub: Stub) -> Simulated:
    return Simulated(stub)


def test_64_hosts_most_of_them_slow_or_dead(simulated: Simulated) -> None:
    assert sum(KINDS.values()) == 64
    for kind, number in KINDS.items():
        simulated.add(*(f"{kind}-{k:02d}" for k in range(number)))
    began = time.monotonic()
    code, checks = simulated.checks()
    took = time.monotonic() - began
    print(f"64 hosts in {took:.1f} s")
    assert code == ExitCode.HOST
    assert took < 60, "one after the other, those that do not answer alone would take minutes"
    reach = {c["host"]: c for c in checks if c["column"] == "reach" and c["verdict"] == "fail"}
    for kind, number in KINDS.items():
        for name in (f"{kind}-{k:02d}" for k in range(number)):
            if kind not in VERDICTS:
                assert name not in reach, reach.get(name)
                continue
            check, found = VERDICTS[kind]
            assert reach[name]["name"] == check and reach[name]["found"].startswith(found), reach[name]
            assert reach[name]["hint"]
    wrong = [c for c in checks if c["verdict"] == "fail" and c["host"].partition("-")[0] in KINDS.keys() - VERDICTS]
    # 32 interpreters start at once on a few cores: one or another may be late.
    late = {c["host"] for c in wrong if c["found"].startswith("no answer in ")}
    others = [c for c in wrong if c["host"] not in late and c["name"] != "ports"]
    assert (others == [] and len(late) <= 5) or address() == "127.0.0.1", wrong
    sums = {c["found"] for c in checks if c["name"] == "all-reduce"}
    assert len(sums) == 1 and re.fullmatch("not tried: .* was not reached", sums.pop())
    count("hosts", 64)


def test_what_a_launch_would_refuse_is_said(simulated: Simulated) -> None:
    simulated.add("fine-1")
    (simulated.stub.root / "key").touch(mode=0o644)
    secrets = f"launch.secrets=[HF_MINE, DEPLOY={simulated.stub.root}/key]"
    done = simulated.prepare("--set", secrets)
    assert done.returncode == ExitCode.PREFLIGHT
    said = f"{simulated.stub.root}/key is open to others, with mode 0644"
    assert "FAIL this machine: launch: the secret HF_MINE: expected in the environment" in done.stdout
    assert f"\nthe secret DEPLOY: {said}\n     hint: export HF_MINE, or " in done.stdout


def test_ctrl_c_waits_for_no_host(simulated: Simulated) -> None:
    simulated.add("fine-1", "silent-1", "silent-2")
    stub = simulated.stub
    with stub.start(*stub.command, "prepare", "stub.yaml", "--set", simulated.hostfile()) as process:
        wait_until(lambda: simulated.calls.exists() and simulated.calls.read_text().count("\n") == 3)
        time.sleep(0.5)
        began = time.monotonic()
        others = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in stderr, stderr
        assert time.monotonic() - began < 8, "1 s is usual; those that are silent would be waited for 11 s"
    assert gone({child.pid for child in others}, within_s=5)


PLANTED: dict[str, tuple[dict[str, Any], str, str]] = {
    # what is planted on one host: (how, the check, what it says)
    "other package": ({"environment": {"packages": {"torch": "1.0"}}}, "packages", "torch 1.0, the others 2."),
    "other revision": ({"environment": {"code": "bad0bad0bad0"}}, "code", "speechctl bad0bad0bad0"),
    "3 s clock skew": ({"skew_s": 3}, "clock", "3.0 s ahead"),
    "full /dev/shm": ({"shm_free": 0}, "/dev/shm", "0 B of"),
    "a slow reverse look-up": ({"reverse_s": 1.5}, "reverse look-up", "took 1."),
}


@pytest.mark.skipif(address() == "127.0.0.1", reason="this machine has no address but loopback")
def test_differences_are_named_with_their_host(simulated: Simulated) -> None:
    simulated.add("fine-1", "fine-2", "fine-3")
    for what, (how, _, _) in PLANTED.items():
        changes = dict(how)
        if "packages" in changes.get("environment", {}):
            merged = {**simulated.environment["packages"], **changes["environment"]["packages"]}
            changes["environment"] = {"packages": merged}
        simulated.add(what.replace(" ", "-").replace("/", "-"), **changes)
    _, checks = simulated.checks()
    red = {(c["name"], c["host"]): c for c in checks if c["verdict"] in ("warn", "fail")}
    assert set(red) - {("packs", h) for _, h in red} == {
        (check, what.replace(" ", "-").replace("/", "-")) for what, (_, check, _) in PLANTED.items()
    }
    for what, (_, check, found) in PLANTED.items():
        row = red[check, what.replace(" ", "-").replace("/", "-")]
        assert found in row["found"] and row["hint"], row


def plain(text: str) -> str:
    """With times, sizes and places of this machine made the same everywhere."""
    text = re.sub(r"\b\d+\.\d+ (s|GiB|MiB)\b", r"#.# \1", text)
    text = re.sub(r"\b[0-9a-f]{12}( \(revision [0-9a-f]{12}\))?", "CODE", text)
    return text.replace(address(), "ADDRESS").replace("eth0", "INTERFACE")


@pytest.mark.skipif(address() == "127.0.0.1", reason="this machine has no address but loopback")
def test_the_table_as_it_is_read(simulated: Simulated, golden: Golden) -> None:
    simulated.add("fine-1", "fine-2", "refused-1", "key-1")
    simulated.add("odd-1", skew_s=3, shm_free=0, reverse_s=1.5)
    simulated.add("odd-2", environment={"packages": {**simulated.environment["packages"], "rich": "1.0"}})
    done = simulated.prepare()
    assert done.returncode == ExitCode.HOST, done.stderr
    text = plain(done.stdout).replace(str(simulated.stub.root), "ROOT").replace(sys.prefix, "PREFIX")
    text = re.sub(r"rich 1.0, the others [0-9.]+", "rich 1.0, the others RICH", text)
    golden("cli/prepare.txt", text)


# Mending -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shared_memory_alone")
def test_fix_mends_what_a_run_has_left_and_nothing_else(simulated: Simulated) -> None:
    run = simulated.stub.run.root
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    orphan = subprocess.Popen([*sleep, "-m", "launcher.worker", "train", f"{run}/attempts/0001"])
    other = subprocess.Popen([*sleep, "-m", "launcher.worker", "train", f"{run}-2/attempts/0001"])
    segments = [Path("/dev/shm/nccl-speechctltest"), Path("/dev/shm/speechctltest-of-others")]
    try:
        for path in segments:
            path.write_bytes(b"x")
        simulated.add("fine-1", skew_s=3600)  # so that the segment is older than a minute there
        done = simulated.prepare()
        assert f"orphans: pid {orphan.pid}: " in done.stdout and "nccl-speechctltest" in done.stdout, done.stdout
        assert orphan.poll() is None and segments[0].exists(), "nothing is touched without --fix"
        done = simulated.prepare("--fix")
        assert done.returncode == ExitCode.FINISHED, done.stdout
        assert f"--fix: fine-1: ended pid {orphan.pid}\n" in done.stdout
        assert "--fix: fine-1: removed nccl-speechctltest from /dev/shm\n" in done.stdout
        assert orphan.wait(10) == -15 and other.poll() is None
        assert [path.exists() for path in segments] == [False, True]
        assert run.parent.is_dir(), "it made the run's parent directory"
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()
        for path in segments:
            path.unlink(missing_ok=True)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session here that sees no package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    made = session.Session(Host("localhost", 1), session.here_argv())
    made.connect(time.monotonic() + 20)
    yield made
    made.close()


def test_an_environment_is_made_with_this_very_code(bare: session.Session, tmp_path: Path) -> None:
    """With `uv` there and nothing to fetch; real venv, real install of the wheel that this command makes of itself."""
    uv = Path(sys.prefix) / "bin" / "uv"
    if not uv.exists():
        pytest.skip("needs uv in this environment")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(uv)
    made = session.Session(
        Host("localhost", 1), ["env", f"PATH={tmp_path / 'bin'}:{os.environ['PATH']}", *session.here_argv()]
    )
    made.connect(time.monotonic() + 20)
    prefix = tmp_path / "venv"
    try:
        said = mend.environment(made, str(prefix), [])
    finally:
        made.close()
    assert said == f"made {prefix} with 0 packages and this speechctl"
    code = "import launcher.errors as e; print(e.__file__)"
    done = subprocess.run([prefix / "bin" / "python", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(prefix))
    assert Path(done.stdout.strip()).read_bytes() == (Path(mend.__file__).parents[1] / "errors.py").read_bytes()
    assert (prefix / "bin" / "speechctl").exists()


def test_no_package_index_is_said_plainly(bare: session.Session, tmp_path: Path) -> None:
    if shutil.which("uv") is not None:
        pytest.skip("uv is installed here for everybody")
    said = mend.environment(bare, str(tmp_path / "venv"), ["torch==2.13.0"])
    assert said.startswith("not mended: uv cannot be installed: ") and "no package index is reached from there" in said


def test_the_pins_are_all_packages_of_this_environment() -> None:
    pins = mend.pins()
    assert f"pytest=={pytest.__version__}" in pins and not any(p.startswith("speechctl=") for p in pins)


# Hostfiles -----------------------------------------------------------------------------------------------------------


def test_a_hostfile_of_a_list(simulated: Simulated) -> None:
    simulated.add("fine-1", "fine-2", "refused-1")
    file = simulated.stub.root / "new"
    command = ("prepare", "stub.yaml", "--write-hostfile", str(file))
    done = simulated.stub.speechctl(*command, "fine-1", "me@fine-2 slots=4 port=2222")
    assert done.returncode == 0, done.stderr
    assert file.read_text() == done.stdout == "fine-1 slots=1\nme@fine-2 slots=4 port=2222\n"
    assert load_hostfile(file) == [Host("fine-1", 1), Host("fine-2", 4, user="me", port=2222)]
    done = simulated.stub.speechctl(*command, "fine-1")
    assert done.returncode == ExitCode.USAGE and f"{file} exists already" in done.stderr
    file.unlink()
    done = simulated.stub.speechctl(*command, "fine-1", "refused-1")
    assert done.returncode == ExitCode.HOST and "refused-1 cannot be reached: ssh: connect" in done.stderr
    done = simulated.stub.speechctl(*command, "fine-1", "$(touch canary)")
    assert done.returncode == ExitCode.USAGE and "expected letters" not in done.stdout
    assert not file.exists() and not (simulated.stub.root / "canary").exists()
    done = simulated.stub.speechctl("prepare", "stub.yaml", "fine-1")
    assert done.returncode == ExitCode.USAGE and "add --write-hostfile FILE" in done.stderr


SINFO = """\
#!/bin/sh
printf '%s\\n' "$@" >"$SLURM_CALLS"
echo "n1 idle gpu:h100:8(S:0-1)"
echo "n2 mix gpu:h100:8(S:0-1)"
echo "n3 down* gpu:h100:8"
echo "n4 drng gpu:h100:8"
echo "n5 alloc (null)"
"""


def on_path(stub: Stub, **programs: str) -> None:
    (stub.root / "bin").mkdir(exist_ok=True)
    for name, text in programs.items():
        (stub.root / "bin" / name).write_text(text)
        (stub.root / "bin" / name).chmod(0o755)
    stub.env |= {"PATH": f"{stub.root}/bin:{stub.env['PATH']}", "SLURM_CALLS": str(stub.root / "calls")}


def test_a_hostfile_of_slurm(stub: Stub) -> None:
    on_path(stub, sinfo=SINFO)
    file = stub.root / "new"
    slurm = ("--set", "launch={backend: slurm, nodes: 2, slurm: {partition: 'a b;c'}}")
    command = ("prepare", "stub.yaml", *slurm, "--write-hostfile", str(file), "--from-slurm")
    done = stub.speechctl(*command)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "n1 slots=8\nn2 slots=8\nn5 slots=1\n"
    words = (stub.root / "calls").read_text().splitlines()
    assert words == ["--noheader", "--Node", "--format=%N %t %G", "--partition=a b;c"]
    file.unlink()
    done = stub.speechctl(*command, env={**stub.env, "SLURM_JOB_NODELIST": "gpu[01-02]", "SLURM_GPUS_ON_NODE": "4"})
    assert done.stdout == "gpu01 slots=4\ngpu02 slots=4\n", done.stderr


# SLURM ---------------------------------------------------------------------------------------------------------------

SBATCH = """\
#!/bin/sh
printf '%s\\n' sbatch "$@" >>"$SLURM_CALLS"
[ -z "$SBATCH_SAYS" ] || { echo "$SBATCH_SAYS" >&2; exit 1; }
echo "77;cluster"
"""
SQUEUE = """\
#!/bin/sh
case "$*" in
*format=%N*) echo "fine-[1-2]" ;;
*) echo "${SQUEUE_SAYS:-RUNNING|None}" ;;
esac
"""
SCANCEL = '#!/bin/sh\nprintf "%s\\n" scancel "$@" >>"$SLURM_CALLS"\n'
SRUN = """\
#!/usr/bin/env bash
printf '%s \\n' "srun $*" >>"$SLURM_CALLS"  # at once: several write
for word; do case "$word" in --nodelist=*) host="${word#*=}" ;; python3) break ;; esac; done
STUB_HOST="$(cat "$STUB_HOSTS/$host.json")"
export STUB_HOST
PATH="$SSH_PYTHON:$PATH"
while [ "$1" != python3 ]; do shift; done
exec "$@"
"""


def test_slurm_nodes_are_looked_at_in_a_job_that_is_given_back(simulated: Simulated) -> None:
    """Asked for by the recipe's own options, whatever they say about what is this job's own affair."""
    stub = simulated.stub
    # A job gets little of our environment.
    own = "".join(f"{name}='{stub.env[name]}'\n" for name in ("STUB_HOSTS", "SSH_PYTHON"))
    on_path(stub, sbatch=SBATCH, squeue=SQUEUE, scancel=SCANCEL, srun=SRUN.replace("\n", f"\n{own}", 1))
    simulated.add("fine-1", "fine-2")
    options = "[--comment=x y, --time=1-0, --job-name=z]"
    recipe = f"launch={{backend: slurm, nodes: 2, device: cpu, slurm: {{partition: p q, options: {options}}}}}"
    done = stub.speechctl("prepare", "stub.yaml", "--json", "--set", recipe)
    assert done.returncode in (0, ExitCode.PREFLIGHT), done.stderr
    value = json.loads(done.stdout)
    assert [host["name"] for host in value["hosts"]] == ["fine-1", "fine-2"]
    assert {c["host"] for c in value["checks"] if c["name"] == "packages" and c["verdict"] == "ok"} == {
        "fine-1",
        "fine-2",
    }
    calls = (stub.root / "calls").read_text().splitlines()
    (name,) = (call for call in calls if call.startswith("--job-name=speechctl-prepare-"))
    assert [call for call in calls if not call.startswith("srun ")] == [
        *("sbatch", "--parsable", "--partition=p q", "--comment=x y", "--time=1-0", "--job-name=z"),
        *(name, "--nodes=2", "--ntasks-per-node=1", "--time=5", "--no-requeue", "--export=ALL", "--chdir=/"),
        *("--output=/dev/null", "--wrap=exec sleep 300", "scancel", name.replace("--job-name", "--name")),
    ]
    flags = " ".join([*slurm.SRUN, "--jobid=77"])
    for k in (1, 2):
        assert f"srun {flags} --nodelist=fine-{k} python3 -c {session.BOOT} " in calls, "as a node of a run"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"SBATCH_SAYS": "sbatch: error: invalid partition specified: p"}, "sbatch refused the job: invalid partition"),
        ({"SQUEUE_SAYS": "CANCELLED|None"}, "SLURM gave no nodes to look at in 0 s: job 77 CANCELLED"),
        ({"SLURM_JOB_ID": "5"}, "the recipe asks for 3 nodes, and job 5, which this runs in, has 2"),
    ],
)
def test_slurm_that_gives_no_nodes_is_one_error(simulated: Simulated, says: dict[str, str], words: str) -> None:
    stub = simulated.stub
    told = "".join(f"{name}='{value}'\n" for name, value in says.items())
    fakes = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}
    on_path(stub, **{name: text.replace("\n", f"\n{told}", 1) for name, text in fakes.items()})
    inside = {k: v for k, v in says.items() if k == "SLURM_JOB_ID"}
    recipe = "launch={backend: slurm, nodes: 3, slurm: {partition: p}}"
    done = stub.speechctl("prepare", "stub.yaml", "--set", recipe, env={**stub.env, **inside})
    assert done.returncode == (ExitCode.USAGE if inside else ExitCode.HOST), done.stderr
    assert f"error: {words}" in done.stderr and "\nhint: " in done.stderr
    calls = (stub.root / "calls").read_text() if (stub.root / "calls").exists() else ""
    assert ("scancel" in calls) != bool(inside), "a job that is not ours is left alone"
