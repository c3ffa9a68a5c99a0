"""The facts of a host. Each function takes what the recipe needs and the moment until which it may take its time."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import time
from collections.abc import Callable
from typing import Any

from launcher.probe import machine

# What an interpreter tells of itself and its packages, without importing any of them.
ENVIRONMENT = r"""
import hashlib, importlib.util, json, os, re, sys
from importlib import metadata
packages = {}
for d in metadata.distributions():
    name = d.metadata["Name"]
    if name:
        packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), d.version)
def folder(name):
    spec = importlib.util.find_spec(name)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
code, at = hashlib.sha256(), folder("launcher")
for base, folders, names in os.walk(at or ""):
    folders.sort()
    for name in sorted(n for n in names if n.endswith(".py")):
        path = os.path.join(base, name)
        with open(path, "rb") as file:
            code.update(os.path.relpath(path, at).encode() + b"\0" + file.read() + b"\0")
cuda, torch = None, folder("torch")
if torch and os.path.exists(os.path.join(torch, "version.py")):
    with open(os.path.join(torch, "version.py")) as file:
        found = re.search(r"^cuda\b.*=\s*['\"]([0-9.]+)", file.read(), re.M)
    cuda = found and found[1]
print(json.dumps({"python": sys.version.split()[0], "prefix": sys.prefix, "packages": packages, "cuda": cuda,
                  "code": code.hexdigest()[:12] if at else None, "folder": at}))
"""


def system(needs: dict[str, Any], until: float) -> dict[str, Any]:
    machine_id = machine.text("/etc/machine-id").strip()
    return {"host": socket.gethostname(), "machine_id": machine_id, "kernel": os.uname().release}


def environment(needs: dict[str, Any], until: float) -> dict[str, Any]:
    python = needs["interpreter"]
    if not os.path.exists(python):
        return {"missing": python}
    env = dict(os.environ, PYTHONSAFEPATH="1", PYTHONPATH=needs["pythonpath"])
    done = machine.run([python, "-c", ENVIRONMENT], until, env)
    if done.returncode != 0:
        return {"broken": machine.last_line(done.stderr)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["folder"]:
        git = machine.run(["git", "-C", found["folder"], "rev-parse", "--short=12", "HEAD"], until)
        found["revision"] = git.stdout.strip() or None
    return found


def gpus(needs: dict[str, Any], until: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "devices": len([n for n in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", n)]),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if shutil.which("nvidia-smi") is None:
        return found
    # In groups: a field that this driver does not know makes a whole query fail.
    found["gpus"] = _smi("index,uuid,name,driver_version,memory.total,memory.used", until)
    found["health"] = _health(until)
    which = {row["uuid"]: row["index"] for row in found["gpus"]}
    fields = "--query-compute-apps=gpu_uuid,pid,process_name"
    apps = machine.run(["nvidia-smi", fields, "--format=csv,noheader"], until)
    rows = [[v.strip() for v in line.split(",", 2)] for line in apps.stdout.splitlines() if line.count(",") > 1]
    found["processes"] = [
        {
            "pid": int(pid),
            "name": name,
            "gpu": which.get(uuid),
            "ours": machine.is_of_run(int(pid), needs["run"], needs["modules"]),
        }
        for uuid, pid, name in rows
        if pid.isdigit()
    ]
    cuda = re.search(r"CUDA Version:\s*([0-9.]+)", machine.run(["nvidia-smi"], until).stdout)
    found["cuda"] = cuda[1] if cuda else None
    return found


HEALTH = {
    "ecc": ("ecc.errors.uncorrected.volatile.total",),
    "retired": ("retired_pages.pending",),
    "remap_pending": ("remapped_rows.pending",),
    "remap_failure": ("remapped_rows.failure",),
    "slowed": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),  # the older drivers' name for it
}
"""What is asked about each GPU's health, each by the first of its names that the driver knows."""


def _health(until: float) -> list[dict[str, str]]:
    """A row for each GPU, with what its driver could tell."""
    rows: dict[str, dict[str, str]] = {}

    def one(name: str) -> None:
        said = next(filter(None, (_smi(f"index,{field}", until) for field in HEALTH[name])), [])
        for row in said:
            index, value = row.values()
            rows.setdefault(index, {"index": index})[name] = value

    machine.together(one, list(HEALTH), until)
    return [dict(row) for row in list(rows.values())]


def _smi(fields: str, until: float) -> list[dict[str, str]]:
    """A row for each GPU; none where the query fails."""
    done = machine.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], until)
    lines = [[v.strip() for v in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    names = fields.split(",")
    return [dict(zip(names, values)) for values in lines if len(values) == len(names)]  # noqa: B905


def memory(needs: dict[str, Any], until: float) -> dict[str, Any]:
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", machine.text("/proc/meminfo"), re.MULTILINE))
    limits = machine.memory_limits()
    return {
        "total": min([int(found["MemTotal"]) * 1024, *limits]),
        "available": min([int(found["MemAvailable"]) * 1024, *limits]),
    }


def shared_memory(needs: dict[str, Any], until: float) -> dict[str, Any]:
    found = os.statvfs(machine.SHARED_MEMORY_AT)
    return {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def limits(needs: dict[str, Any], until: float) -> dict[str, Any]:
    """Soft limits; None: there is none."""
    names = {"open files": "NOFILE", "processes": "NPROC", "locked memory": "MEMLOCK", "stack": "STACK"}
    soft = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{key}"))[0] for name, key in names.items()}
    found = {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()}
    return {"soft": found, "infiniband": os.path.isdir("/sys/class/infiniband")}


def disk(needs: dict[str, Any], until: float) -> dict[str, Any]:
    """Of the run's directory, or of the nearest one above it that is there. A file is written there and removed."""
    there = needs["run"]
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    found = os.statvfs(there)
    mounts = [line.split(" - ") for line in machine.text("/proc/self/mountinfo").splitlines()]
    above = [(m[0].split()[4], m[1].split()[0]) for m in mounts if machine.is_under(there, m[0].split()[4])]
    trial = os.path.join(there, f"{needs['token']}-{socket.gethostname()}-{os.getpid()}")
    problem = None
    try:
        with open(trial, "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror
    finally:
        if os.path.lexists(trial):
            os.unlink(trial)
    return {
        "folder": there,
        "free": found.f_bavail * found.f_frsize,
        "inodes": found.f_favail if found.f_files else None,
        "type": max(above, key=lambda m: len(m[0]))[1] if above else None,
        "problem": problem,
    }


def names(needs: dict[str, Any], until: float) -> list[dict[str, Any]]:
    """Forward and reverse look-ups of those hosts that this one will meet, all at once and each timed. A row without
    `forward_s`, or `reverse_s`, had no answer in time."""
    rows = [dict(peer) for peer in needs["peers"]]

    def look(row: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            found = socket.getaddrinfo(row["address"] or row["name"], None, type=socket.SOCK_STREAM)
        except OSError as error:
            row["error"] = error.strerror or str(error)
            return
        row["addresses"] = list(dict.fromkeys(str(a[4][0]) for a in found))
        row["forward_s"], began = time.monotonic() - began, time.monotonic()
        try:
            row["reverse"] = socket.getnameinfo((row["addresses"][0], 0), socket.NI_NAMEREQD)[0]
        except OSError:
            row["reverse"] = None
        row["reverse_s"] = time.monotonic() - began

    machine.together(look, rows, until - 0.3)
    return [dict(row) for row in rows]


def interface(needs: dict[str, Any], until: float) -> dict[str, Any]:
    """The interface that has the way to the head, as a node will choose it; and all that there are."""
    there = {}
    for name in sorted(os.listdir("/sys/class/net")):
        state, speed = (machine.text(f"/sys/class/net/{name}/{f}").strip() for f in ("operstate", "speed"))
        there[name] = {"state": state, "mbit_s": int(speed) if re.fullmatch(r"[1-9]\d*", speed) else None}
    address = needs["head_address"]
    if address is None:
        address = str(socket.getaddrinfo(needs["head"], None, type=socket.SOCK_STREAM)[0][4][0])
    with socket.socket(machine.family(address), socket.SOCK_DGRAM) as trial:
        trial.connect((address, 9))  # sends nothing: the kernel only chooses the way
        ours = str(trial.getsockname()[0])
    to_head = next((n for n in there if machine.interface_has(n, ours)), None)
    return {"interfaces": there, "address": ours, "to_head": to_head}


def packs(needs: dict[str, Any], until: float) -> list[dict[str, Any]]:
    """Each file of each pack opened, a byte of it read and its size compared with the manifest's, as time allows."""
    rows = []
    for path in needs["packs"]:
        row: dict[str, Any] = {"path": path, "files": 0, "looked_at": 0, "problems": []}
        rows.append(row)
        if not os.path.isdir(path):
            row["missing"] = True
            continue
        try:
            with open(os.path.join(path, "MANIFEST.json"), "rb") as file:
                manifest = json.loads(file.read())
        except OSError as error:
            row["problems"].append({"file": f"{path}/MANIFEST.json", "problem": error.strerror})
            continue
        row["digest"], row["files"] = manifest["digest"], len(manifest["files"])
        for name, sealed in sorted(manifest["files"].items()):
            if time.monotonic() > until - 0.5:
                break
            problem = machine.unreadable(os.path.join(path, name), sealed["bytes"])
            row["looked_at"] += 1
            if problem:
                row["problems"].append({"file": os.path.join(path, name), "problem": problem})
    return rows


def backbone(needs: dict[str, Any], until: float) -> dict[str, Any] | None:
    """The files of the backbone, where it has any: of a directory, or of a snapshot in Hugging Face's cache."""
    source = needs["source"]
    if source is None:
        return None
    folder = source if os.path.isabs(source) else _snapshot(source, needs)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any(os.path.lexists(os.path.join(folder, name)) for name in weights):
        return {"missing": folder}
    paths = [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if not n.startswith(".")]
    found = [(p, machine.unreadable(p)) for p in paths if not os.path.isdir(p)]
    return {
        "folder": folder,
        "sizes": {os.path.basename(p): os.stat(p).st_size for p, problem in found if problem is None},
        "problems": [{"file": p, "problem": problem} for p, problem in found if problem],
    }


def _snapshot(source: str, needs: dict[str, Any]) -> str:
    """Where Hugging Face's cache has this revision, or would have it."""
    hub = needs["hub"] or os.path.join(os.path.expanduser("~"), ".cache", "huggingface", "hub")
    at = os.path.join(hub, "models--" + source.replace("/", "--"))
    revision = needs["revision"] or "main"
    return os.path.join(at, "snapshots", machine.text(os.path.join(at, "refs", revision)).strip() or revision)


def leftovers(needs: dict[str, Any], until: float) -> dict[str, Any]:
    """What runs of this path left: processes, segments of shared memory that nobody has open, locks of builds."""
    mine = [p for p in machine.pids() if machine.is_mine(f"/proc/{p}")]
    found = [p for p in mine if machine.is_of_run(p, needs["run"], needs["modules"])]
    rows = [{"pid": p, "started": machine.started(p), "command": " ".join(machine.words(p))[:200]} for p in found]
    locks = [os.path.join(base, "lock") for base, _, files in os.walk(needs["builds"]) if "lock" in files]
    holder = needs["holder"] or {}
    here = holder.get("host") == socket.gethostname()
    return {
        "processes": [row for row in rows if row["started"] is not None],
        "segments": machine.stale_segments(),
        "locks": [path for path in locks if time.time() - os.stat(path).st_mtime > 600],
        "holder_is_alive": machine.started(holder["pid"]) is not None if here else None,
    }


FACTS: dict[str, Callable[[dict[str, Any], float], Any]] = {
    f.__name__: f
    for f in (
        *(system, environment, gpus, memory, shared_memory, limits, disk),
        *(names, interface, packs, backbone, leftovers),
    )
}
