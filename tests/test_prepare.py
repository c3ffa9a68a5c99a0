"""`prepare`: what it makes of facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from launcher.backends import slurm, ssh
from launcher.errors import ExitCode, PreflightError
from launcher.hosts import Host
from launcher.prepare.checks import COLUMNS, Verdict, odd_ones
from launcher.prepare.findings import AllReduce, Findings, Needs, Seen
from launcher.prepare.judge import judge
from launcher.prepare.look import packs_to_read
from launcher.prepare.run import Result
from launcher.recipe import Data

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
        *("GPU 2 has 68.4 GiB taken, and no process of it is seen", "`fuser` on gpu-3"),
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
    "a secret that is not there": (
        *(lambda f: f.refused.append(PreflightError("the secret X: expected", hint="export X")), "launch"),
        *("this machine", "fail", "the secret X: expected", "export X"),
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
        silent = {"machine", "interpreter", "launch"}
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


@pytest.mark.parametrize(
    ("remote", "looked_at"),
    [
        (None, "/here/packs/dev-clean"),
        ("/mnt/packs", "/mnt/packs/dev-clean"),
        ("file:///mnt/all%20packs", "/mnt/all packs/dev-clean"),
        ("s3://bucket/packs", None),
    ],
)
def test_packs_are_looked_at_where_the_hosts_read_them(remote: str | None, looked_at: str | None) -> None:
    """Those behind `data.remote` were not looked at, though it was a directory that some host had not mounted."""
    data = Data.model_validate({"corpus": "c", "packs": "/here/packs", "train": ["dev-clean"], "remote": remote})
    assert packs_to_read(data, data.train) == (() if looked_at is None else (looked_at,))


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


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        (
            "srun: error: Task launch for StepId=4.0 failed on node b: Communication connection failure",
            "no answer",
            "`scontrol show node b`",
        ),
        ("slurmstepd: error: execve(): python3: No such file or directory", "no python3", "install python3 on b"),
        ("srun: error: Unable to confirm allocation for job 7: Invalid job id specified", "the job is over", "longer"),
    ],
)
def test_what_srun_says_is_told_apart(said: str, kind: str, hint: str) -> None:
    trouble = slurm.trouble(said, Host("b", 1))
    assert trouble.what == kind and hint in trouble.hint
