"""`prepare` over real ssh: what is in good order is green, and what is planted on a host is named with it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import pytest

import launcher
from launcher.errors import ExitCode
from tests.canaries import Watch
from tests.cluster.conftest import Cluster, empty
from tests.conftest import RECIPE, Golden, Stub, simulated_python
from tests.test_secret import PROXY, TOKEN

pytestmark = pytest.mark.cluster


@pytest.fixture
def three(stub: Stub, cluster: Cluster) -> Stub:
    """A stub whose recipe names three hosts by their addresses, and has packs of a kind."""
    lines = (f"{name} slots=1 address={address}\n" for name, address in cluster.hosts.items())
    (stub.root / "hosts").write_text("".join(lines))
    launch = f"{{backend: ssh, hostfile: {stub.root}/hosts, stop_grace: 5s}}"
    stub.recipe.write_text(RECIPE.replace("{processes: 2, stop_grace: 2s}", launch))
    stub.command = cluster.desk("env", "-C", str(stub.root), *stub.command)
    pack_of_a_kind(stub.root)
    return stub


def pack_of_a_kind(root: Path) -> None:
    """What `prepare` takes for the packs of `RECIPE`."""
    for subset in ("train-clean-100", "dev-clean"):
        pack = root / "packs" / subset
        pack.mkdir(parents=True)
        (pack / "shard.00000.mds").write_bytes(b"x" * 100)
        files = {"shard.00000.mds": {"bytes": 100}}
        (pack / "MANIFEST.json").write_text(json.dumps({"digest": "0" * 32, "files": files}))


@contextmanager
def planted(cluster: Cluster, name: str, *commands: tuple[str, ...]) -> Iterator[None]:
    """Commands on a host, each with its opposite after a `|`; the opposites are done at the end, last first."""
    undo = []
    try:
        for command in commands:
            at = command.index("|")
            done = cluster.on(name, *command[:at])
            assert done.returncode == 0, f"{command}: {done.stderr}"
            undo.append(command[at + 1 :])
        yield
    finally:
        for command in reversed(undo):
            done = cluster.on(name, *command)
            assert done.returncode == 0, f"{command}: {done.stderr}"


def over(source: Path, target: Path | str) -> tuple[str, ...]:
    """A file in place of another, on one host alone."""
    return ("mount", "--bind", str(source), str(target), "|", "umount", str(target))


def tmpfs(where: str, options: str = "size=1m") -> tuple[str, ...]:
    return ("mount", "-t", "tmpfs", "-o", options, "tmpfs", where, "|", "umount", where)


def changed(folder: Path, path: Path, old: str, new: str) -> Path:
    """A copy of a file that differs."""
    text = path.read_text()
    assert old in text
    copy = folder / secrets.token_hex(4)
    copy.write_text(text.replace(old, new, 1))
    return copy


def test_three_hosts_in_good_order_are_green(three: Stub, cluster: Cluster, tmp_path: Path) -> None:
    """With the real worker, whose ranks meet and compute a sum; and no secret of the user's comes to a host."""
    from tests.worker.runs import SPEECHCTL

    named, looks = {"HF_MINE": "a canary by name alone"}, {"HF_TOKEN": TOKEN, "https_proxy": PROXY}
    secret = {**named, **looks, "WANDB_API_KEY": "a canary that ranks have not"}
    three.recipe.write_text(three.recipe.read_text().replace(f"{three.root}/hosts", f"{three.root}/names"))
    cluster.hostfile(three.root / "names", *cluster.hosts)
    command = [*SPEECHCTL, "prepare", "stub.yaml", "--json", "--set", "launch.secrets=[HF_MINE]"]
    with Watch(secret.values()).running(on=cluster) as watch:
        done = cluster.at_desk("env", "-C", str(tmp_path), *command, timeout=200, env={**os.environ, **secret})
    assert watch.in_command_lines() == [] and watch.in_environments() == []
    assert watch.in_files(tmp_path) == [] and watch.in_files(cluster.folder) == []
    assert not watch.redactor.found((done.stdout + done.stderr).encode())
    assert any(b"allreduce" in line for line in watch.seen) and len(watch.environments) > 5
    value = json.loads(done.stdout)
    assert [c for c in value["checks"] if c["verdict"] != "ok"] == [], done.stderr
    assert done.returncode == ExitCode.FINISHED
    sums = {c["host"]: c["found"] for c in value["checks"] if c["name"] == "all-reduce"}
    assert set(sums) == set(cluster.hosts)
    assert all(re.fullmatch(r"gloo: [\d.]+ ms for 4.0 MiB, [\d.]+ Gbit/s; met in [\d.]+ s", s) for s in sums.values())
    way = "NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0"
    assert value["proposed"] == dict.fromkeys(cluster.hosts, way)
    assert empty(three.root, within_s=0)


@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables, to close a port")
def test_what_is_planted_is_named(three: Stub, cluster: Cluster, golden: Golden, tmp_path: Path) -> None:
    """One host has another package, other code and a closed port; one a full /dev/shm, few files for whom sshd lets in,
    and a name server that does not answer; one a shard that was cut short, another that its disk does not give, and a
    clock that is wrong. The clock alone is not real: time is one for all namespaces, so that `python3` there adds to
    it. (To read the first page of a process is an I/O error, always.)"""
    info = metadata.distribution("pydantic")._path / "METADATA"  # type: ignore[attr-defined]
    package = changed(tmp_path, info, f"Version: {metadata.version('pydantic')}", "Version: 1.2.3")
    nodelist = Path(launcher.__path__[0]) / "nodelist.py"
    code = changed(tmp_path, nodelist, "MAX_NAMES = 100_000", "MAX_NAMES = 100_001")
    dns, resolver, empty_file = (tmp_path / name for name in ("nsswitch", "resolv", "empty"))
    dns.write_text("passwd: files\ngroup: files\nshadow: files\nhosts: dns files\n")
    resolver.write_text("nameserver 10.91.7.250\noptions timeout:1 attempts:2\n")
    empty_file.touch()
    wrong = {"name": "node3", "skew_s": 3}
    python = simulated_python(tmp_path / "python")
    script = (python / "python3").read_text().replace("exec ", f"STUB_HOST='{json.dumps(wrong)}' exec ")
    (python / "python3").write_text(script)
    first = cluster.at_desk("ssh", "node3", "echo $PATH").stdout.split(":")[0]
    reject = ("INPUT", "-p", "tcp", "-s", cluster.hosts["node3"], "--dport", "1024:65535", "--syn", "-j", "REJECT")
    shards = [three.root / "packs" / subset / "shard.00000.mds" for subset in ("dev-clean", "train-clean-100")]
    files = cluster.on("node2", "sh", "-c", "ulimit -Sn").stdout.strip()
    fewer, as_before = (f'prlimit --nofile={n}: --pid "$(pgrep -xo sshd)"' for n in ("512", files))
    few = ("sh", "-c", fewer, "|", "sh", "-c", as_before)
    with (
        planted(cluster, "node1", over(package, info), over(code, nodelist)),
        planted(cluster, "node1", ("iptables", "-A", *reject, "|", "iptables", "-D", *reject)),
        planted(cluster, "node2", tmpfs("/dev/shm", "size=70m")),
        planted(cluster, "node2", ("fallocate", "-l", "70m", "/dev/shm/full", "|", "true"), few),
        planted(cluster, "node2", over(dns, "/etc/nsswitch.conf"), over(resolver, "/etc/resolv.conf")),
        planted(cluster, "node3", over(empty_file, shards[0]), over(Path("/proc/1/mem"), shards[1])),
        planted(cluster, "node3", over(python, first)),
    ):
        done = three.speechctl("prepare", "stub.yaml")
        began = time.monotonic()
        launched = three.speechctl("launch", "stub.yaml")
        print(f"refused in {time.monotonic() - began:.1f} s")
    assert done.returncode == ExitCode.PREFLIGHT, done.stderr
    text = (
        done.stdout.replace(str(three.root), "ROOT").replace(sys.prefix, "PREFIX").replace(str(nodelist.parent), "CODE")
    )
    text = re.sub(r"(?<!took )\b\d+\.\d+ (s|GiB)\b", r"#.# \1", text)
    text = re.sub(r"[0-9a-f]{12}( \(revision [0-9a-f]{12}\))?", "DIGEST", text)
    text = re.sub(r"port \d+", "port PORT", text).replace(metadata.version("pydantic"), "VERSION")
    golden("cluster/prepare.txt", re.sub(r"took [23]\.\d s", "took 2 s", text))
    assert launched.returncode == ExitCode.PREFLIGHT
    assert "error: node1: packages: pydantic 1.2.3, the others " in launched.stderr
    assert "node1: code: speechctl " in launched.stderr
    assert not three.run.root.exists(), "no run was made"
    assert empty(three.root, within_s=0)


SMI = """\
#!/bin/sh
case "$1" in
--query-gpu=*,*,*) cat "${0%/*}/gpus" ;;
--query-gpu=index,clocks_event_reasons.active) cat "${0%/*}/slowed" ;;
--query-gpu=*) sed 's/,.*/, 0/' "${0%/*}/gpus" ;;
--query-compute-apps=*) cat "${0%/*}/apps" ;;
*) echo "| NVIDIA-SMI 570.124.06   Driver Version: 570.124.06   CUDA Version: 12.8     |" ;;
esac
"""


def with_gpus(folder: Path, count: int, driver: str, apps: str = "", slowed: str = "01") -> tuple[str, ...]:
    """A host with so many devices of NVIDIA's and a driver's nvidia-smi in `folder`: /dev is another, where each name
    leads to the true one."""
    folder.mkdir()
    rows = [f"{k}, GPU-{k}, NVIDIA H100 80GB HBM3, {driver}, 81559, 4\n" for k in range(count)]
    (folder / "gpus").write_text("".join(rows))
    (folder / "slowed").write_text("".join(f"{k}, 0x00000000000000{slowed}\n" for k in range(count)))
    (folder / "apps").write_text(apps)
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    script = (
        "mkdir /run/dev && mount --rbind /dev /run/dev && mount -t tmpfs tmpfs /dev && ln -s /run/dev/* /dev/ &&"
        f" for k in $(seq 0 {count - 1}); do mknod /dev/nvidia$k c 1 3; done"
    )
    return ("sh", "-c", script, "|", "sh", "-c", "umount -l /dev && umount -lR /run/dev && rmdir /run/dev")


def test_gpus_are_compared_with_slots_and_hosts(three: Stub, cluster: Cluster, tmp_path: Path) -> None:
    """Seven for eight slots, somebody else's process, and another driver that slows down; by what drivers say."""
    (three.root / "hosts").write_text((three.root / "hosts").read_text().replace("slots=1", "slots=8"))
    (three.packages / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    first = cluster.at_desk("ssh", "node3", "echo $PATH").stdout.split(":")[0]
    gpus = {
        "node1": with_gpus(tmp_path / "smi1", 8, "570.124.06", apps="GPU-6, 4242, /usr/bin/blender\n"),
        "node2": with_gpus(tmp_path / "smi2", 8, "550.54.15", slowed="40"),
        "node3": with_gpus(tmp_path / "smi3", 7, "570.124.06"),
    }
    with ExitStack() as hosts:
        for k, (name, devices) in enumerate(gpus.items(), start=1):
            hosts.enter_context(planted(cluster, name, devices, over(tmp_path / f"smi{k}", first)))
        done = three.speechctl("prepare", "stub.yaml", "--json")
    assert done.returncode == ExitCode.PREFLIGHT, done.stderr
    checks = json.loads(done.stdout)["checks"]
    red = {(c["name"], c["host"]): c for c in checks if c["column"] == "gpu" and c["verdict"] != "ok"}
    assert {key: (c["verdict"], c["found"]) for key, c in red.items()} == {
        ("GPUs", "node3"): ("fail", "7 GPU(s)"),
        ("GPU processes", "node1"): ("fail", "/usr/bin/blender (pid 4242) compute there"),
        ("driver", "node2"): ("warn", "550.54.15"),
        ("GPU health", "node2"): (
            "warn",
            "GPU 0 is slowed by heat or power (0x0000000000000040), GPU 1 is slowed by heat or power"
            " (0x0000000000000040), GPU 2 is slowed by heat or power (0x0000000000000040) and 5 others",
        ),
    }
    assert all(c["hint"] for c in red.values()) and "set slots=7 for node3" in red["GPUs", "node3"]["hint"]
    sums = {c["found"] for c in checks if c["name"] == "all-reduce"}
    assert sums == {"not tried: GPUs of node3 first"}


def test_a_host_that_was_cut_off_is_told_from_one_whose_key_changed(three: Stub, cluster: Cluster) -> None:
    cluster.cut("node2")
    known = cluster.folder / "known_hosts"
    keys = {row.split(",")[0]: row.split()[2] for row in known.read_text().splitlines()}
    known.write_text(known.read_text().replace(keys["node3"], keys["node1"]))
    began = time.monotonic()
    done = three.speechctl("prepare", "stub.yaml", "--json")
    print(f"in {time.monotonic() - began:.1f} s")
    assert done.returncode == ExitCode.HOST
    assert time.monotonic() - began < 30
    red = {c["host"]: (c["name"], c["found"]) for c in json.loads(done.stdout)["checks"] if c["verdict"] == "fail"}
    assert red.keys() == {"node2", "node3"}
    assert red["node2"][0] == "reachable" and red["node2"][1].startswith(
        "timed out: ssh: connect to host node2 port 22:"
    )
    assert red["node3"] == ("host key", "changed host key: Host key verification failed.")


def test_a_run_directory_that_is_not_shared_is_named(three: Stub, cluster: Cluster) -> None:
    with planted(cluster, "node3", tmpfs(str(three.root))):
        done = three.speechctl("prepare", "stub.yaml", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert [(c["host"], c["verdict"]) for c in checks if c["name"] == "shared directory"] == [
        ("node1", "ok"),
        ("node2", "ok"),
        ("node3", "fail"),
    ]
