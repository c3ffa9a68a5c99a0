"""Hosts that are simulated on this machine, many of them dead: a small `ssh` on PATH, and `tests/stub/host.py`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

from launcher.probe.facts import ENVIRONMENT
from tests.conftest import Stub, simulated_python

FAKE = """\
#!/usr/bin/env bash
host="${@:$#-1:1}"
printf '%s\\n' "$*" >>"$SSH_CALLS"
case "$host" in
refused-*) echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255 ;;
dead-*) sleep 9; echo "ssh: connect to host $host port 22: Connection timed out" >&2; exit 255 ;;
silent-*) exec sleep 60 ;;
unknown-*) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
key-*) echo "Host key verification failed." >&2; exit 255 ;;
changed-*)
  echo "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @" >&2
  echo "Host key verification failed." >&2
  exit 255
  ;;
denied-*) echo "me@$host: Permission denied (publickey)." >&2; exit 255 ;;
banner-*) sleep 9; echo "Connection timed out during banner exchange" >&2; exit 255 ;;
bare-*) echo "bash: line 1: exec: python3: not found" >&2; exit 127 ;;
slow-*) sleep 3 ;;
noisy-*) echo "Welcome to $host" ;;
esac
STUB_HOST="$(cat "$STUB_HOSTS/$host.json")"
export STUB_HOST
PATH="$SSH_PYTHON:$PATH"
eval "${@:$#}"
"""


class Simulated:
    """A stub whose hosts are simulated on this machine, where they meet at its own address."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.hosts = stub.root / "hosts.d"
        self.hosts.mkdir()
        (stub.root / "bin").mkdir()
        fake = stub.root / "bin" / "ssh"
        fake.write_text(FAKE)
        fake.chmod(0o755)
        self.calls = stub.root / "calls"
        python = simulated_python(stub.root / "python")
        stub.env |= {"SSH_CALLS": str(self.calls), "SSH_PYTHON": str(python), "STUB_HOSTS": str(self.hosts)}
        stub.env["PATH"] = f"{fake.parent}:{stub.env['PATH']}"
        self.environment = self._environment()

    def _environment(self) -> dict[str, Any]:
        """What the interpreter answers here, once for all hosts: 64 at once are too much for one machine."""
        env = {**self.stub.env, "PYTHONSAFEPATH": "1"}
        argv = [sys.executable, "-c", ENVIRONMENT]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    def add(self, *names: str, **what: Any) -> None:
        """Hosts that differ from this machine in `what` (tests/stub/host.py); their environment by its changes."""
        for name in names:
            file = self.hosts / f"{name}.environment"
            file.write_text(json.dumps({**self.environment, **what.get("environment", {})}))
            said = {"name": name, "address": address(), **what, "environment": str(file)}
            (self.hosts / f"{name}.json").write_text(json.dumps(said))

    def hostfile(self) -> str:
        names = sorted((p.stem for p in self.hosts.glob("*.json")), key=lambda n: (not n.startswith("fine"), n))
        (self.stub.root / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
        return f"launch={{backend: ssh, hostfile: {self.stub.root}/hosts, device: cpu}}"

    def prepare(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.stub.speechctl("prepare", "stub.yaml", "--set", self.hostfile(), *arguments, **options)

    def checks(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        done = self.prepare("--json", *arguments)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["checks"]


def address() -> str:
    """Of this machine, where others would reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
