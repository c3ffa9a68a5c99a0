"""How the probe looks at its machine: programs, files that may hang, processes, interfaces."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

SHARED_MEMORY = re.compile(
    r"\d{6}_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data"
    r"|barrier_filelock|cache_filelock)|torch_\d+_\d+_\d+|nccl-\w+"
)
"""Names in /dev/shm that streaming, torch and NCCL give."""
SHARED_MEMORY_AT = "/dev/shm"

# Programs and threads ------------------------------------------------------------------------------------------------

CHILDREN: set[int] = set()
"""Programs under way, each the leader of a session of its own."""


class Done:
    def __init__(self, returncode: int, stdout: str, stderr: str) -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def run(argv: list[str], until: float, env: dict[str, str] | None = None) -> Done:
    """A program and what it said. One that cannot be started says why, with 127; one that takes too long, with 124."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        child = subprocess.Popen(argv, env=env, stdin=null, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        return Done(127, "", f"{argv[0]}: {error.strerror}")
    CHILDREN.add(child.pid)
    try:
        out, err = child.communicate(timeout=max(0.1, until - time.monotonic()))
        code = child.returncode
    except subprocess.TimeoutExpired:
        send(-child.pid, signal.SIGKILL)
        out, err = child.communicate()
        code, err = 124, err + b"\ntook too long"
    finally:
        CHILDREN.discard(child.pid)
    return Done(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def together(function: Callable[[Any], None], values: list[Any], until: float) -> None:
    """The function on each value, in a thread of its own; waits for them, but no longer than until then."""
    threads = [threading.Thread(target=function, args=(value,), daemon=True) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def send(pid: int, number: int) -> None:
    """A signal to a process, or where the number is negative, to a group; one that has ended does not get it."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)


# Files ---------------------------------------------------------------------------------------------------------------


def text(path: str) -> str:
    """What a file of the kernel or the system says, or nothing where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def memory_limits() -> list[int]:
    """Of the control groups that we are in, as SLURM and containers make them, and of those above; of both versions.
    Where there is no limit, version 1 says a number above all memory there is."""
    found = []
    for line in text("/proc/self/cgroup").splitlines():
        _, kind, path = line.split(":", 2)
        if kind == "":
            root, name = "/sys/fs/cgroup", "memory.max"
        elif kind == "memory":
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        above = [path.rstrip("/").rsplit("/", k)[0] for k in range(path.rstrip("/").count("/") + 1)]
        said = [text(f"{root}{group}/{name}").strip() for group in above]
        found += [int(limit) for limit in said if limit.isdigit()]
    return found


def last_line(said: str) -> str:
    return ([line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"])[-1][:300]


def unreadable(path: str, size: int | None = None) -> str | None:
    """Why a file cannot be used; None where it can."""
    try:
        with open(path, "rb") as file:
            file.read(1)
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        return error.strerror
    return None if size is None or found == size else f"{found} bytes, sealed with {size}"


def is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


# The network ---------------------------------------------------------------------------------------------------------


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def interface_has(interface: str, address: str) -> bool:
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = [row.split() for row in text("/proc/net/if_inet6").splitlines()]
        return any((row[0], row[5]) == (packed, interface) for row in rows)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            found = fcntl.ioctl(asked.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return False
    return socket.inet_ntoa(found[20:24]) == address


# Processes -----------------------------------------------------------------------------------------------------------


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def words(pid: int) -> list[str]:
    return text(f"/proc/{pid}/cmdline").split("\0")[:-1]


def started(pid: int) -> int | None:
    """When this process was started, in ticks since boot, or None where it has ended. A pid and this are one process
    for ever."""
    fields = text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] != "Z" else None


def is_mine(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False


def is_of_run(pid: int, run_root: str, modules: list[str]) -> bool:
    """Whether this is a node, torchrun or a rank of that run, and not an editor that has one of its files open."""
    said = words(pid)
    script = len(said) > 1 and os.path.basename(said[1]) == "node.sh"
    return (script or any(w in modules for w in said)) and any(is_under(w, run_root) for w in said)


def stale_segments() -> list[dict[str, Any]]:
    """Segments of ours in /dev/shm that nobody has open. Those of the last minute are left alone: a process may be
    about to open what it has made."""
    found = []
    for name in sorted(os.listdir(SHARED_MEMORY_AT)):
        path = os.path.join(SHARED_MEMORY_AT, name)
        if SHARED_MEMORY.fullmatch(name) and is_mine(path):
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and time.time() - max(info.st_mtime, info.st_ctime) > 60:
                found.append({"name": name, "bytes": info.st_size, "inode": info.st_ino})
    used = _open_inodes() if found else set()
    return [segment for segment in found if segment["inode"] not in used]


def _open_inodes() -> set[int]:
    """Of what is mapped from /dev/shm, and of whatever else is open, in all processes that we may look into."""
    found = set()
    for pid in pids():
        for line in text(f"/proc/{pid}/maps").splitlines():
            if SHARED_MEMORY_AT in line:
                found.add(int(line.split()[4]))
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(os.stat(f"/proc/{pid}/fd/{fd}").st_ino)
    return found
