"""`prepare`: what it makes of facts, the probe on this machine, and 64 hosts of which most are slow or dead."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends import slurm, ssh
from launcher.errors import ExitCode
from launcher.hosts import Host
from launcher.prepare import mend, session
from launcher.prepare.checks import COLUMNS, Verdict, odd_ones
from launcher.prepare.findings import AllReduce, Findings, Needs, Seen
from launcher.prepare.judge import judge
from launcher.prepare.run import Result
from launcher.probe.facts import FACTS
from launcher.rundir import Run
from tests.test_rundir import held

GIB = 2**30
NEEDS = Needs(
    backend="ssh",
    machines=tuple(Host(f"gpu-{k}", 8) for k in range(1, 5)),
    run="/shared/runs/a",
    interpreter="/shared/venv/bin/python",
    pythonpath="",
    packs=("/shared/packs/train-clean-100",),
    source="/shared/models/wav2vec2",
    revision=None,
    hub=None,
    builds="/shared/venv/torch_extensions",
    device="auto",
    keep_checkpoints=4,
    token=".speechctl-0",
)
PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "nvidia-nccl-cu12": "2.28.9"}
ENVIRONMENT = {
    "python": "3.11.7",
    "prefix": "/shared/venv",
    "packages": PACKAGES,
    "cuda": "12.8",
    "code": "5f6a7b8c9d0e",
    "folder": "/shared/speechctl/launcher",
    "revision": "0123456789ab",
}


def facts(k: int) -> dict[str, Any]:
    """Of a host in good order, the k-th of NEEDS."""
    peers = range(1, 5) if k == 0 else sorted({1, (k + 1) % 4 + 1})
    named = [{"name": f"gpu-{j}", "address": None, "addresses": [f"10.0.0.{j}"], "forward_s": 0.001} for j in peers]
    card = {"name": "H100", "driver_version": "570.1", "memory.total": "81559", "memory.used": "4"}
    gpus = [{"index": str(g), **card} for g in range(8)]
    fine = {"ecc": "0", "retired": "No", "remap_pending": "No", "remap_failure": "No", "slowed": "0x0000000000000001"}
    return {
        "system": {"host": f"gpu-{k + 1}", "machine_id": f"{k:032x}", "kernel": "6.1"},
        "environment": ENVIRONMENT,
        "gpus": {
            "devices": 8,
            "visible": None,
            "gpus": gpus,
            "health": [{"index": str(g), **fine} for g in range(8)],
            "processes": [],
            "cuda": "12.8",
        },
        "memory": {"total": 1000 * GIB, "available": 900 * GIB},
        "shared_memory": {"total": 500 * GIB, "free": 499 * GIB},
        "limits": {
            "soft": {"open files": 65536, "processes": None, "locked memory": None, "stack": 8 << 20},
            "infiniband": True,
        },
        "disk": {"folder": "/shared/runs", "free": 900 * GIB, "inodes": 10**6, "type": "nfs4", "problem": None},
        "names": [{**row, "reverse": row["name"], "reverse_s": 0.001} for row in named],
        "interface": {
            "interfaces": {"eth0": {"state": "up", "mbit_s": 100000}, "lo": {"state": "unknown", "mbit_s": None}},
            "address": f"10.0.0.{k + 1}",
            "to_head": "eth0",
        },
        "packs": [{"path": NEEDS.packs[0], "files": 100, "looked_at": 100, "problems": [], "digest": "d1" * 16}],
        "backbone": {"folder": NEEDS.source, "sizes": {"config.json": 1, "model.safetensors": 380}, "problems": []},
        "leftovers": {"processes": [], "segments": [], "locks": [], "holder_is_alive": None},
    }


def in_good_order() -> Findings:
    seen = []
    for k, host in enumerate(NEEDS.machines):
        values = {name: {"value": value} for name, value in facts(k).items()}
        dialled = [{"name": f"gpu-{(k + 1) % 4 + 1}", "address": "10.0.0.9", "port": 4000, "seconds": 0.001}]
        seen.append(Seen(host, None, "", 0.3, "3.9.2", values, (0.002, 0.0004), "", dialled))
    here = Seen(Host("localhost", 1), facts={"environment": {"value": ENVIRONMENT}})
    total = AllReduce(seconds=0.002, meeting_s=0.5, bytes=4 * 2**20, backend="nccl")
    return Findings(NEEDS, seen, here, "", 10 * GIB, 30 * GIB, None, total)


Plant = Callable[[Findings], Any]


def value(found: Findings, k: int, fact: str) -> Any:
    """What host `gpu-K` said, to be changed in place."""
    return found.seen[k - 1].facts[fact]["value"]


def other_package(found: Findings) -> None:
    packages = {**PACKAGES, "deepspeed": "0.18.0", "left-over": "1.0"}
    found.seen[2].facts["environment"] = {"value": {**ENVIRONMENT, "packages": packages}}


def other_environment(found: Findings, k: int, **changes: Any) -> None:
    found.seen[k - 1].facts["environment"] = {"value": {**ENVIRONMENT, **changes}}


def other_cuda(found: Findings) -> None:
    other_environment(found, 3, cuda=None)


def all_clocks(found: Findings) -> None:
    for seen in found.seen:
        seen.clock = (-3.0, 0.0004)


def slow_reverse(found: Findings) -> None:
    value(found, 2, "names")[0]["reverse_s"] = 7.0


def no_reverse(found: Findings) -> None:
    del value(found, 2, "names")[0]["reverse_s"]


PLANTED: dict[str, tuple[Plant, str, str, Verdict, str, str]] = {
    # what is planted: (how, the check, the host, the verdict, what the sentence says, what its hint says)
    "other package": (
        *(other_package, "packages", "gpu-3", "fail"),
        *("deepspeed 0.18.0, the others 0.19.8 and left-over 1.0, the others have none", "--fix"),
    ),
    "other revision": (
        *(lambda f: other_environment(f, 2, code="bad0bad0bad0", revision="feedfeedfeed"), "code", "gpu-2", "fail"),
        *("speechctl bad0bad0bad0 (revision feedfeedfeed)", "/shared/speechctl/launcher"),
    ),
    "other python": (
        *(lambda f: other_environment(f, 4, python="3.12.1"), "python", "gpu-4", "fail", "Python 3.12.1", "--fix"),
    ),
    "no environment": (
        *(lambda f: f.seen[0].facts.update(environment={"value": {"missing": NEEDS.interpreter}}), "interpreter"),
        *("gpu-1", "fail", "/shared/venv/bin/python is not there", "--fix makes one there"),
    ),
    "3 s clock skew": (
        *(lambda f: setattr(f.seen[1], "clock", (3.002, 0.0004)), "clock", "gpu-2", "fail", "3.0 s ahead", "chrony"),
    ),
    "this machine's own clock": (
        *(all_clocks, "clock", "this machine", "warn"),
        *("3.0 s ahead", "set the clock of this machine"),
    ),
    "full /dev/shm": (
        *(lambda f: value(f, 4, "shared_memory").update(free=0), "/dev/shm", "gpu-4", "fail", "0 B of 500.0 GiB"),
        "ls -l /dev/shm",
    ),
    "7 GPUs for 8 slots": (
        *(lambda f: (value(f, 1, "gpus").update(devices=7), value(f, 1, "gpus")["gpus"].pop()), "GPUs", "gpu-1"),
        *("fail", "7 GPU(s)", "set slots=7 for gpu-1"),
    ),
    "no GPU": (
        *(lambda f: f.seen[0].facts.update(gpus={"value": {"devices": 0, "visible": None}}), "GPUs", "gpu-1"),
        *("fail", "0 GPU(s)", "leave gpu-1 out"),
    ),
    "unreadable shard": (
        *(lambda f: value(f, 2, "packs")[0]["problems"].append({"file": "/p/shard.1.mds", "problem": "I/O error"}),),
        *("packs", "gpu-2", "fail", "/p/shard.1.mds: I/O error", "make it readable on gpu-2"),
    ),
    "a pack on one host only": (
        *(lambda f: f.seen[1].facts.update(packs={"value": [{**value(f, 2, "packs")[0], "digest": "d2" * 16}]}),),
        *("packs", "gpu-2", "fail", "is another pack: d2d2d2d2d2d2", "copy the pack to gpu-2"),
    ),
    "unreachable port": (
        *(lambda f: f.seen[2].dialled[0].update(problem="timed out"), "ports", "gpu-3", "fail"),
        *("cannot reach gpu-4 at 10.0.0.9 port 4000: timed out", "between gpu-3 and gpu-4: see `iptables -L`"),
    ),
    "slow reverse look-up": (
        *(slow_reverse, "reverse look-up", "gpu-2", "warn", "the name of 10.0.0.1 took 7.0 s", "/etc/nsswitch.conf"),
    ),
    "no answer to a reverse look-up": (
        *(no_reverse, "reverse look-up", "gpu-2", "warn", "the name of 10.0.0.1 gave no answer in time", "/etc/hosts"),
    ),
    "a head that means itself": (
        *(lambda f: value(f, 1, "names")[0].update(addresses=["127.0.1.1"]), "look-up", "gpu-1", "fail"),
        *("gpu-1 means 127.0.1.1, where no other host reaches it", "gpu-1 slots=8 address="),
    ),
    "a name that nobody knows": (
        *(lambda f: value(f, 3, "names")[1].update(error="Name or service not known"), "look-up", "gpu-3", "fail"),
        *("gpu-4: Name or service not known", "address="),
    ),
    "a process of somebody else": (
        *(lambda f: value(f, 3, "gpus")["processes"].append({"pid": 7, "name": "python", "gpu": "7", "ours": False}),),
        *("GPU processes", "gpu-3", "fail", "python (pid 7) compute there", "launch.exclude=[gpu-3]"),
    ),
    "memory of a GPU that nobody has": (
        *(lambda f: value(f, 3, "gpus")["gpus"][2].update({"memory.used": "70000"}), "GPU memory", "gpu-3", "warn"),
        *("GPU 2 has 68.4 GiB taken, and no process of it is seen", "`fuser -v /dev/nvidia*` on gpu-3"),
    ),
    "a GPU that is too small": (
        *(lambda f: value(f, 3, "gpus")["gpus"][2].update({"memory.total": "8192"}), "GPU memory", "gpu-3", "fail"),
        *("GPU 2: 8.0 GiB free", "a higher zero_stage"),
    ),
    "torch without CUDA": (
        *(other_cuda, "CUDA", "gpu-3", "fail", "torch without CUDA", "install torch for CUDA 12.8 into /shared/venv"),
    ),
    "rows to remap": (
        *(lambda f: value(f, 2, "gpus")["health"][5].update(remap_pending="1"), "GPU health", "gpu-2", "fail"),
        *("GPU 5 has rows to remap", "ROW_REMAPPER"),
    ),
    "memory errors": (
        *(lambda f: value(f, 2, "gpus")["health"][5].update(ecc="4"), "GPU health", "gpu-2", "fail"),
        *("GPU 5 has 4 uncorrected memory errors", "reset the GPU or reboot gpu-2"),
    ),
    "a hot GPU": (
        *(lambda f: value(f, 2, "gpus")["health"][0].update(slowed="0x40"), "GPU health", "gpu-2", "warn"),
        *("GPU 0 is slowed by heat or power (0x40)", "nvidia-smi -q"),
    ),
    "another driver": (
        *(lambda f: value(f, 4, "gpus")["gpus"][0].update(driver_version="550.9"), "driver", "gpu-4", "warn"),
        *("550.9", "make gpu-4 as the others"),
    ),
    "a driver older than torch": (
        *(lambda f: value(f, 4, "gpus").update(cuda="11.8"), "CUDA", "gpu-4", "fail"),
        *("driver for CUDA 11.8", "update the driver of gpu-4"),
    ),
    "little memory": (
        *(lambda f: value(f, 1, "memory").update(available=GIB), "RAM", "gpu-1", "fail", "1.0 GiB of", "fewer slots"),
    ),
    "few open files": (
        *(lambda f: value(f, 3, "limits")["soft"].update({"open files": 512}), "limits", "gpu-3", "fail"),
        *("open files: 512", "/etc/security/limits.conf on gpu-3"),
    ),
    "locked memory for InfiniBand": (
        *(lambda f: value(f, 3, "limits")["soft"].update({"locked memory": 8 << 20}), "limits", "gpu-3", "fail"),
        *("locked memory: 8.0 MiB", "limits.conf on gpu-3"),
    ),
    "a full disk": (
        *(lambda f: value(f, 1, "disk").update(free=100 * GIB), "space", "gpu-1", "fail", "100.0 GiB free in"),
        "checkpoint.keep_last",
    ),
    "no inodes": (
        *(
            lambda f: value(f, 1, "disk").update(inodes=100),
            "inodes",
            "gpu-1",
            "fail",
            "100 inodes free",
            "small files",
        ),
    ),
    "a file system that is read-only": (
        *(lambda f: value(f, 2, "disk").update(problem="Read-only file system"), "writable", "gpu-2", "fail"),
        *("/shared/runs: Read-only file system", "writable for this user on gpu-2"),
    ),
    "a file system that hangs": (
        *(lambda f: f.seen[3].facts.update(disk={"error": "no answer in 5 s"}), "writable", "gpu-4", "fail"),
        *("no answer in 5 s", "`df` on it may hang"),
    ),
    "a directory of its own": (
        *(lambda f: setattr(f.seen[3], "shared", "No such file or directory"), "shared directory", "gpu-4", "fail"),
        *("a file that gpu-1 wrote is not seen (No such file or directory, nfs4)", "--set run_dir="),
    ),
    "a way to the head by loopback": (
        *(lambda f: value(f, 2, "interface").update(to_head="lo"), "interface", "gpu-2", "fail"),
        *("the way to the head leaves by lo", "address="),
    ),
    "two names for one machine": (
        *(lambda f: value(f, 4, "system").update(machine_id=f"{0:032x}"), "machine", "gpu-4", "fail"),
        *("gpu-1 and gpu-4 are one machine", "keep one of the names"),
    ),
    "no backbone": (
        *(lambda f: f.seen[1].facts.update(backbone={"value": {"missing": "/h/snapshots/main"}}), "backbone", "gpu-2"),
        *("fail", "/h/snapshots/main is not there", "let HF_HOME name a directory that gpu-2 shares"),
    ),
    "another backbone": (
        *(lambda f: value(f, 2, "backbone")["sizes"].update({"model.safetensors": 9}), "backbone", "gpu-2", "fail"),
        *("model.safetensors: 9, the others 380", "copy the backbone to gpu-2 anew"),
    ),
    "orphans": (
        *(lambda f: value(f, 2, "leftovers")["processes"].append({"pid": 8, "started": 1, "command": "python -m x"}),),
        *("orphans", "gpu-2", "fail", "pid 8: python -m x", "--fix ends them"),
    ),
    "stale shared memory": (
        *(lambda f: value(f, 2, "leftovers")["segments"].append({"name": "nccl-X", "bytes": 9, "inode": 1}),),
        *("stale shared memory", "gpu-2", "warn", "nccl-X", "--fix removes them"),
    ),
    "a stale lock of a build": (
        *(
            lambda f: value(f, 2, "leftovers")["locks"].append("/e/lock"),
            "locks",
            "gpu-2",
            "fail",
            "/e/lock",
            "rm /e/lock",
        ),
    ),
    "no sum": (
        *(lambda f: setattr(f, "all_reduce", AllReduce(problems={"gpu-2": "gloo: no route"})), "all-reduce", "gpu-2"),
        *("fail", "gloo: no route", "NCCL_DEBUG=INFO"),
    ),
    "a slow login": (
        *(lambda f: setattr(f.seen[1], "reached_s", 9.0), "reachable", "gpu-2", "warn", "in 9.0 s", "UseDNS no"),
    ),
}


def test_hosts_in_good_order_have_only_green_checks() -> None:
    checks = judge(in_good_order())
    assert [c for c in checks if c.verdict != "ok"] == []
    for host in NEEDS.machines:
        # What there is nothing to look at for: an environment that is there, another host at the same place.
        silent = {"machine", "interpreter"}
        assert {c.name for c in checks if c.host == host.name} == {n for ns in COLUMNS.values() for n in ns} - silent
    assert Result(in_good_order(), checks).code == ExitCode.FINISHED


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_named_with_its_host_and_a_hint(what: str) -> None:
    plant, name, host, verdict, says, hint = PLANTED[what]
    found = in_good_order()
    plant(found)
    red = [c for c in judge(found) if c.verdict != "ok"]
    assert [(c.name, c.host, c.verdict) for c in red] == [(name, host, verdict)], red
    assert says in red[0].found and hint in red[0].hint, red[0]
    wanted = ExitCode.PREFLIGHT if verdict == "fail" else ExitCode.FINISHED
    assert Result(found, judge(found)).code == wanted


def test_of_two_that_differ_the_one_that_is_unlike_this_machine_is_odd() -> None:
    found = in_good_order()
    found.seen = found.seen[:2]
    found.needs = dataclasses.replace(NEEDS, machines=NEEDS.machines[:2])
    other_environment(found, 1, packages={**PACKAGES, "torch": "2.12.0"})
    red = [(c.name, c.host) for c in judge(found) if c.verdict == "fail"]
    assert red == [("packages", "gpu-1")]
    assert odd_ones({"a": 1, "b": 2}) == (1, ["b"])
    assert odd_ones({"a": 1, "b": 2}, 2) == (2, ["a"])
    assert odd_ones({"a": 1, "b": 2, "c": 2}, 1) == (2, ["a"])


def test_a_pack_that_is_nowhere_yet_is_no_fault_of_a_host() -> None:
    found = in_good_order()
    for k in range(1, 5):
        value(found, k, "packs")[0].update(missing=True)
        del value(found, k, "packs")[0]["digest"]
    red = [c for c in judge(found) if c.verdict != "ok"]
    assert {(c.name, c.verdict, c.hint) for c in red} == {("packs", "warn", "`speechctl pack RECIPE` makes it")}


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        ("ssh: Could not resolve hostname b: Name or service not known", "unknown name", "give the name"),
        ("ssh: connect to host b port 22: Connection refused", "refused", "start sshd on b"),
        ("ssh: connect to host b port 22: Connection timed out", "timed out", "launch.exclude=[b]"),
        ("ssh: connect to host b port 22: No route to host", "timed out", "launch.exclude=[b]"),
        ("Connection timed out during banner exchange", "no answer of sshd", "MaxStartups"),
        ("kex_exchange_identification: Connection closed by remote host", "no answer of sshd", "MaxStartups"),
        ("me@b: Permission denied (publickey).", "not let in", "`ssh me@b true`"),
        (
            "@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.",
            "changed host key",
            "ssh-keygen -R b",
        ),
        ("No ED25519 host key is known for b\nHost key verification failed.", "unknown host key", "asks once"),
        ("sh: 1: exec: python3: not found", "no python3", "install python3 on b"),
        ("something new", "failed", "`ssh me@b true`"),
    ],
)
def test_what_ssh_says_is_told_apart(said: str, kind: str, hint: str) -> None:
    trouble = ssh.trouble(said, Host("b", 1, user="me"))
    assert trouble.what == kind and hint in trouble.hint


# The probe -----------------------------------------------------------------------------------------------------------


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
    answer = probe.ask("facts", began + 20, needs=needs, names=["packs", "memory"], timeout_s=1)
    assert answer["packs"] == {"error": "no answer in 1 s"} and answer["memory"]["value"]["total"] > 0
    assert probe.ask("clock", time.monotonic() + 5) == pytest.approx(time.time(), abs=5)


AGENT = """
import signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", RANK, "-m", "launcher.worker", "train", *sys.argv[-1:]])
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
RANK = "import time; time.sleep(60)"


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
