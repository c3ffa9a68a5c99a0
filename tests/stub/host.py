"""`python3` on a simulated host: runs its `-c` program, which sees what STUB_HOST says of the host in place of what
this machine has.

STUB_HOST is JSON: `name`, and where wanted `skew_s` (its clock), `shm_free` (bytes), `environment` (a file that has
what the probe's interpreter would answer), `address` (what every name means), `reverse_s` (how long a reverse look-up
takes).
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

host: dict[str, Any] = json.loads(os.environ["STUB_HOST"])
real_open, real_time, real_statvfs, real_popen = open, time.time, os.statvfs, subprocess.Popen


def its_open(path: Any, *arguments: Any, **options: Any) -> Any:
    if path == "/etc/machine-id":
        return io.StringIO(hashlib.md5(host["name"].encode()).hexdigest() + "\n")
    return real_open(path, *arguments, **options)


def its_statvfs(path: Any) -> Any:
    found = real_statvfs(path)
    if path != "/dev/shm" or "shm_free" not in host:
        return found
    values = list(found)
    values[4] = host["shm_free"] // found.f_frsize  # f_bavail
    return os.statvfs_result(values)


def its_popen(argv: Any, *arguments: Any, **options: Any) -> Any:
    if "environment" in host and len(argv) > 2 and argv[1] == "-c":
        argv = ["cat", host["environment"]]
    return real_popen(argv, *arguments, **options)


def its_nameinfo(address: Any, flags: int) -> tuple[str, str]:
    time.sleep(host.get("reverse_s", 0))
    return (address[0], "0")


builtins.open = its_open  # type: ignore[assignment]
os.statvfs = its_statvfs
time.time = lambda: real_time() + host.get("skew_s", 0)
socket.gethostname = lambda: host["name"]
socket.getnameinfo = its_nameinfo
subprocess.Popen = its_popen  # type: ignore[assignment, misc]
if "address" in host:
    # `socket.create_connection` comes by here too, with an address and a port.
    socket.getaddrinfo = lambda _, port, *__, **___: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host["address"], port or 0))
    ]
exec(sys.argv[2])  # noqa: S102
