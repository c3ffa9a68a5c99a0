"""The probe of `prepare` on this machine, through the real conversation with it."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends import slurm, ssh
from launcher.hosts import Host
from launcher.prepare import mend, session
from launcher.prepare.findings import Findings, Seen
from launcher.prepare.judge import judge
from launcher.probe import answers, machine
from launcher.probe.facts import FACTS
from launcher.rundir import Run
from tests.faults.cells import small_cgroup
from tests.test_prepare import GIB, NEEDS
from tests.test_rundir import held


def needs_here(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "runs").mkdir(exist_ok=True)
    machines = (Host("localhost", 1),)
    plain = dataclasses.replace(NEEDS, machines=machines, interpreter=sys.executable, packs=(), source=None)
    paths = {"run": str(tmp_path / "runs" / "a"), "builds": str(tmp_path / "builds")}
    return {**plain.for_host(0), **paths, **changes}


@pytest.fixture
def probe() -> Any:
    made = session.Session(Host("localhost", 1), session.here_argv())
    made.connect(time.monotonic() + 20)
    yield made
    made.close()


def asked(probe: session.Session, name: str, needs: dict[str, Any], timeout_s: float = 20) -> dict[str, Any]:
    answer = probe.ask("facts", time.monotonic() + 30, needs=needs, names=[name], timeout_s=timeout_s)
    return dict(answer[name])


def test_the_probe_tells_of_this_machine(probe: session.Session, tmp_path: Path) -> None:
    until = time.monotonic() + 30
    answer = probe.ask("facts", until, needs=needs_here(tmp_path), names=list(FACTS), timeout_s=20)
    assert {name: a.get("error") for name, a in answer.items() if "error" in a} == {}
    values = {name: a["value"] for name, a in answer.items()}
    assert values["system"]["host"] == socket.gethostname()
    assert values["environment"]["python"] == sys.version.split()[0]
    assert values["environment"]["packages"]["pytest"] == pytest.__version__
    assert values["environment"]["folder"].endswith("launcher") and len(values["environment"]["code"]) == 12
    shared = os.statvfs("/dev/shm")
    assert values["shared_memory"]["total"] == shared.f_blocks * shared.f_frsize
    assert values["disk"]["folder"] == str(tmp_path / "runs") and values["disk"]["problem"] is None
    assert values["interface"]["to_head"] == "lo"
    assert values["names"][0]["addresses"][0] in ("127.0.0.1", "::1")
    assert list((tmp_path / "runs").iterdir()) == [], "what it wrote to try, it removed"


@pytest.fixture
def group() -> Iterator[Path]:
    with small_cgroup() as made:
        yield made


def test_memory_is_what_the_way_in_leaves(group: Path, tmp_path: Path) -> None:
    """SLURM and containers give less than the machine has: the ranks' own group, or one above it, says how much."""
    inner = group / "step"
    inner.mkdir()
    script = f'echo $$ >"{inner}/cgroup.procs" && exec "$0" "$@"'
    made = session.Session(Host("localhost", 1), ["sh", "-c", script, *session.here_argv()])
    try:
        made.connect(time.monotonic() + 20)
        found = asked(made, "memory", needs_here(tmp_path))["value"]
    finally:
        made.close()
        inner.rmdir()
    assert found == {"total": 200 * 2**20, "available": 200 * 2**20}


def test_each_shard_is_opened_and_measured(probe: session.Session, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    for name, size in (("a.mds", 5), ("b.mds", 4), ("c.mds", 5)):
        (pack / name).write_bytes(b"x" * size)
    (pack / "c.mds").unlink()
    files = {name: {"bytes": 5} for name in ("a.mds", "b.mds", "c.mds")}
    (pack / "MANIFEST.json").write_text(json.dumps({"digest": "d", "files": files}))
    (row, absent) = asked(probe, "packs", needs_here(tmp_path, packs=[str(pack), "/nowhere"]))["value"]
    assert row["digest"] == "d" and row["looked_at"] == 3 and absent["missing"]
    assert row["problems"] == [
        {"file": str(pack / "b.mds"), "problem": "4 bytes, sealed with 5"},
        {"file": str(pack / "c.mds"), "problem": "No such file or directory"},
    ]


def test_what_hangs_is_left_behind_and_named(probe: session.Session, tmp_path: Path) -> None:
    """A FIFO that nobody writes to stands for a file system that does not answer."""
    pack = tmp_path / "pack"
    pack.mkdir()
    os.mkfifo(pack / "MANIFEST.json")
    began = time.monotonic()
    needs = needs_here(tmp_path, packs=[str(pack)])
    answer = probe.ask("facts", began + 20, needs=needs, names=["packs", "memory"], timeout_s=3)
    assert answer["packs"] == {"error": "no answer in 3 s"} and answer["memory"]["value"]["total"] > 0
    assert probe.ask("clock", time.monotonic() + 5) == pytest.approx(time.time(), abs=5)


AGENT = """
import signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", RANK, "-m", "launcher.worker", "train", *sys.argv[-1:]],
    stdout=subprocess.PIPE)
rank.stdout.readline()  # a process that has begun to be another one has no command line for a moment
def seal(*_):
    time.sleep(4)
    if rank.poll() is not None:
        sys.exit("the rank was ended meanwhile")
    rank.terminate()
    sys.exit(rank.wait() + signal.SIGTERM)
signal.signal(signal.SIGTERM, seal)
print(rank.pid, flush=True)
time.sleep(60)
"""
RANK = "import time; print(flush=True); time.sleep(60)"


def test_ranks_that_are_sealing_are_let(probe: session.Session, tmp_path: Path) -> None:
    """`prepare --fix` sent SIGTERM to the ranks as well, and three seconds later SIGKILL: in the middle of a seal. And
    a run that somebody had resumed since the look lost its ranks."""
    attempt = tmp_path / "runs" / "a" / "attempts" / "0001"
    argv = [sys.executable, "-c", f"RANK = {RANK!r}{AGENT}", "-m", "launcher.node", str(attempt)]
    run = Run(tmp_path / "runs" / "a")
    run.root.mkdir(parents=True)
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        rank = int(agent.stdout.readline())
        try:
            needs = dataclasses.replace(NEEDS, run=str(run.root), stop_grace_s=30.0)
            found = asked(probe, "leftovers", needs_here(tmp_path))["value"]["processes"]
            assert sorted(p["pid"] for p in found) == sorted([agent.pid, rank])
            with held(run, "speechctl resume"):
                assert mend.end(probe, needs, found) == "ended nothing: the run is under way by now"
            assert agent.poll() is None and psutil.pid_exists(rank)
            assert mend.end(probe, needs, found).startswith("ended pid ")
            assert agent.wait(20) == 0, "it had the time that it needs, and was not killed"
            assert not psutil.pid_exists(rank)
        finally:
            for pid in (agent.pid, rank):
                if psutil.pid_exists(pid):
                    os.kill(pid, 9)


def test_only_what_a_run_left_is_found_and_ended(probe: session.Session, tmp_path: Path) -> None:
    """A rank of the run, and beside it what must never be touched: a rank of another run, and a reader of a file."""
    run = tmp_path / "runs" / "a"
    sleep = [sys.executable, "-c", "import sys, time; print(flush=True); time.sleep(60)"]
    commands = {
        "rank": [*sleep, "-m", "launcher.worker", "train", f"{run}/attempts/0001"],
        "other run": [*sleep, "-m", "launcher.worker", "train", f"{run}-2/attempts/0001"],
        "reader": [*sleep, f"{run}/attempts/0001/logs/rank-00000.log"],
    }
    started = {name: subprocess.Popen(argv, stdout=subprocess.PIPE) for name, argv in commands.items()}
    try:
        for process in started.values():
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        found = asked(probe, "leftovers", needs_here(tmp_path))["value"]["processes"]
        assert [p["pid"] for p in found] == [started["rank"].pid]
        until = time.monotonic() + 20
        before = [{**found[0], "started": found[0]["started"] - 1}]  # a pid that has been given away since
        assert probe.ask("end_processes", until, processes=before, grace_s=3) == []
        assert started["rank"].poll() is None
        assert probe.ask("end_processes", until, processes=found, grace_s=3) == [started["rank"].pid]
        assert started["rank"].wait(10) == -15
        assert started["other run"].poll() is None and started["reader"].poll() is None
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_a_segment_that_somebody_else_removes_first_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--fix` said that it could not be mended."""
    segment = {"name": "nccl-of-nobody", "inode": 1}
    monkeypatch.setattr(machine, "stale_segments", lambda: [segment])
    assert answers.remove_segments({"segments": [segment]}) == ["nccl-of-nobody"]


@pytest.mark.usefixtures("shared_memory_alone")
def test_only_segments_that_nobody_has_open_are_stale(probe: session.Session, tmp_path: Path) -> None:
    names = {n: Path("/dev/shm") / n for n in ("nccl-stale9", "torch_1_2_3", "000009_locals", "nccl-fresh9", "mine9")}
    try:
        for name, path in names.items():
            path.write_bytes(b"x" * 10)
            if name != "nccl-fresh9":
                subprocess.run(["touch", "-d", "2 hours ago", str(path)], check=True)
        # The change time cannot be set: the probe must be shown a later now.
        with names["torch_1_2_3"].open("rb"):
            later = json.dumps({"name": "localhost", "skew_s": 3600})
            stub = Path(__file__).parent / "stub" / "host.py"
            argv = ["env", f"STUB_HOST={later}", sys.executable, str(stub), "-c", session.BOOT]
            late = session.Session(Host("localhost", 1), argv)
            late.connect(time.monotonic() + 20)
            try:
                names["nccl-fresh9"].touch()
                found = asked(late, "leftovers", needs_here(tmp_path))["value"]["segments"]
                stale = {s["name"] for s in found} & set(names)
                assert stale == {"nccl-stale9", "000009_locals", "nccl-fresh9"}
                ours = [s for s in found if s["name"] in ("nccl-stale9", "000009_locals")]
                wrong = [{**ours[0], "inode": 1}]
                assert late.ask("remove_segments", time.monotonic() + 20, segments=wrong) == []
                gone = late.ask("remove_segments", time.monotonic() + 20, segments=ours)
                assert set(gone) == {"nccl-stale9", "000009_locals"}
                assert [n for n, p in names.items() if p.exists()] == ["torch_1_2_3", "nccl-fresh9", "mine9"]
            finally:
                late.close()
        assert {s["name"] for s in asked(probe, "leftovers", needs_here(tmp_path))["value"]["segments"]} & set(
            names
        ) == set()
    finally:
        for path in names.values():
            path.unlink(missing_ok=True)


SMI = """\
#!/bin/sh
case "$1" in
--query-gpu=index,uuid*) cat "$SMI/gpus" ;;
--query-gpu=index,*) cat "$SMI/${1##*,}" || { echo "Field is not a valid field to query."; exit 2; } ;;
--query-compute-apps=gpu_uuid*) cat "$SMI/apps" ;;
*) echo "| NVIDIA-SMI 535.183.01   Driver Version: 535.183.01   CUDA Version: 12.2     |" ;;
esac
"""
"""Of a driver that has no name for the reasons yet but the old one, and does not know of rows to remap."""


def test_gpus_as_nvidia_smi_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its older drivers do: through the real probe, and the judge. Of eight GPUs the host's line has two."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    card = "NVIDIA A100-SXM4-80GB, 535.183.01, 81920"
    said = {
        "gpus": [f"{k}, GPU-{k}, {card}, {40000 if k == 3 else 7}" for k in range(8)],
        "ecc.errors.uncorrected.volatile.total": [f"{k}, {2 if k == 7 else 0}" for k in range(8)],
        "retired_pages.pending": [f"{k}, [N/A]" for k in range(8)],
        "clocks_throttle_reasons.active": [f"{k}, 0x00000000000000{'48' if k == 1 else '01'}" for k in range(8)],
        "apps": ["GPU-0, 77, /usr/bin/python3, a b", "GPU-3, 78, [Not Found]"],
    }
    for name, lines in said.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setenv("SMI", str(tmp_path))
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    made = session.Session(Host("localhost", 1), session.here_argv())
    made.connect(time.monotonic() + 20)
    try:
        found = asked(made, "gpus", needs_here(tmp_path))["value"]
    finally:
        made.close()
    assert len(found["gpus"]) == 8 and found["gpus"][0]["name"] == "NVIDIA A100-SXM4-80GB" and found["cuda"] == "12.2"
    assert found["health"][1] == {"index": "1", "ecc": "0", "retired": "[N/A]", "slowed": "0x0000000000000048"}
    assert found["processes"] == [
        {"pid": 77, "name": "/usr/bin/python3, a b", "gpu": "0", "ours": False},
        {"pid": 78, "name": "[Not Found]", "gpu": "3", "ours": False},
    ]

    def red(*gpus: int) -> dict[str, str]:
        host = Host("gpu-1", len(gpus), gpus=gpus)
        needs = dataclasses.replace(NEEDS, machines=(host,))
        seen = Seen(host, facts={"gpus": {"value": {**found, "devices": 8}}})
        return {c.name: c.found for c in judge(Findings(needs, [seen], None, None, 2 * GIB)) if c.verdict != "ok"}

    assert red(4, 5) == {}, "what is wrong with the others is not of this run"
    assert red(1, 7) == {
        "GPU health": "GPU 7 has 2 uncorrected memory errors and GPU 1 is slowed by heat or power (0x0000000000000048)"
    }
    assert red(3, 4) == {"GPU processes": "[Not Found] (pid 78) compute there"}
    assert red(0) == {"GPU processes": "/usr/bin/python3, a b (pid 77) compute there"}


def test_nothing_of_a_recipe_stands_in_a_command_line() -> None:
    host = Host("gpu-1", 8, user="me", port=2222)
    plain = ssh.command_argv(host, "X")
    assert session.ssh_argv(host) == [*plain[:-1], f"exec python3 -c '{session.BOOT}'"]
    assert session.srun_argv(host, "7") == [
        *("srun", *slurm.SRUN, "--jobid=7", "--nodelist=gpu-1", "python3", "-c", session.BOOT),
    ]
    assert "'" not in session.BOOT and '"' not in session.BOOT and "$" not in session.BOOT
