"""Where a run of stub ranks is, backend by backend: how it is started, and the ways to get at what it is made of."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.slurm import Slurm
from tests.conftest import Stub, wait_until


class Place:
    """A run on this machine, and the ways to get at it."""

    backend = "local"
    hosts: Sequence[str] = ("localhost",)
    """Of the first attempt, the head first. The last has the victim."""
    spare: str | None = None
    """The host that takes the place of one at which something failed."""
    launch = "processes: 2"
    stop_grace_s = 2.0
    deadline_s = 5.0
    """Of a step, where a hang is to be seen."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.run = stub.run
        self.process: subprocess.Popen[str] | None = None

    @contextmanager
    def launched(self) -> Iterator[None]:
        """The run under way. Nothing of it is left when this ends, nor is any host out of order."""
        options: dict[str, Any] = {"env": self.stub.env, "cwd": self.stub.root, "text": True}
        command = [*self.stub.command, "launch", "stub.yaml"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as self.process:
            try:
                yield
            finally:
                self.process.kill()
                self.clean()

    def clean(self) -> None:
        for left in self.processes():
            left.kill()

    def send(self, node_rank: int, pid: int, number: int) -> None:
        """A signal to a process of a node, by the pid that it has there."""
        os.kill(pid, number)

    def kill_launcher(self) -> None:
        assert self.process is not None
        self.process.kill()

    def lose_host(self, *, power: bool) -> None:
        """Take the last host away: its network, or its power. Here that is impossible, as the table says."""
        pytest.fail("there is only this machine")

    def end(self) -> tuple[int, str]:
        """The exit code of the whole run and what was said, once hosts have come back and, where nothing else does it,
        a person has asked for the run to go on."""
        assert self.process is not None
        _, stderr = self.process.communicate(timeout=300)
        if self.process.returncode != -signal.SIGKILL:
            return self.process.returncode, stderr
        done = self.stub.speechctl("resume", str(self.run.root))
        return done.returncode, done.stderr

    @contextmanager
    def bystanders(self) -> Iterator[Callable[[], list[str]]]:
        """A foreign process on every host; yields what names the hosts on which it is gone."""
        with subprocess.Popen(["sleep", "600"]) as process:
            try:
                yield lambda: ["localhost"] if process.poll() is not None else []
            finally:
                process.kill()

    def segments(self) -> list[str]:
        """Shared memory that the run has left. On this machine others have theirs too."""
        return []

    def processes(self) -> list[psutil.Process]:
        """Whatever is left of the run on any host: all of it has the run's path among its words."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if any(str(self.run.root) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


class OnHosts(Place):
    """The first two hosts of a cluster, and a user at the desk."""

    def __init__(self, stub: Stub, cluster: Cluster) -> None:
        super().__init__(stub)
        self.cluster = cluster
        self.hosts = list(cluster.hosts)[:2]
        self.lost: str | None = None
        stub.command = cluster.desk("env", "-C", str(stub.root), *stub.command)

    def send(self, node_rank: int, pid: int, number: int) -> None:
        done = self.cluster.on(self.hosts[node_rank], "kill", f"-{number}", str(pid))
        assert done.returncode == 0, done.stderr

    def lose_host(self, *, power: bool) -> None:
        self.lost = self.hosts[-1]
        self.cluster.power_off(self.lost) if power else self.cluster.cut(self.lost)

    def find_host(self) -> None:
        """The lost one is back."""
        if self.lost is not None and self.lost not in self.cluster.inside:
            self.cluster.power_on(self.lost)
        Cluster.mend(self.cluster)  # the network only

    def clean(self) -> None:
        super().clean()
        self.find_host()

    @contextmanager
    def bystanders(self) -> Iterator[Callable[[], list[str]]]:
        there: dict[str, psutil.Process] = {}
        with ExitStack() as stack:
            for name, init in self.cluster.inside.items():
                command = ["nsenter", "--target", str(init), "--pid", "--mount", "--", "sleep", "600"]
                parent = psutil.Process(stack.enter_context(subprocess.Popen(command)).pid)
                wait_until(parent.children)
                there[name] = parent.children()[0]
                stack.callback(end, there[name])
            yield lambda: [name for name, process in there.items() if not process.is_running()]

    def segments(self) -> list[str]:
        """Each host has its own memory, which nothing but the run has used."""
        found = {host: self.cluster.on(host, "ls", "/dev/shm").stdout.split() for host in self.cluster.inside}
        return [f"{host}: {name}" for host, names in found.items() for name in names]


class OverSsh(OnHosts):
    """A third host is in reserve where there is a `spare`."""

    backend = "ssh"

    def __init__(self, stub: Stub, cluster: Cluster, *, spare: bool) -> None:
        super().__init__(stub, cluster)
        self.spare = list(cluster.hosts)[2] if spare else None
        hostfile = cluster.hostfile(stub.root / "hosts", *self.hosts, *([self.spare] if self.spare else []))
        self.launch = f"backend: ssh, hostfile: {hostfile}, nodes: 2"

    def end(self) -> tuple[int, str]:
        if self.lost is not None and self.spare is None:  # it is still away at the second attempt
            wait_until(lambda: len(self.run.attempts()) > 1 and self.run.attempts()[1].failure.exists(), 120)
            self.find_host()
        code, said = super().end()
        self.find_host()
        return code, said


class InJob(OnHosts):
    """Both nodes of a partition."""

    backend = "slurm"
    launch = "backend: slurm, nodes: 2, slurm: {partition: main}"

    def __init__(self, stub: Stub, slurm: Slurm) -> None:
        bin_ = stub.root / "bin"
        bin_.mkdir()
        (bin_ / "speechctl").write_text(f'#!/bin/sh\nexec {shlex.join(stub.command)} "$@"\n')
        (bin_ / "speechctl").chmod(0o755)
        stub.env["PATH"] = f"{bin_}:{os.environ['PATH']}"
        super().__init__(stub, slurm)
        self.slurm = slurm
        self.job = ""

    @contextmanager
    def launched(self) -> Iterator[None]:
        done = self.stub.speechctl("launch", "stub.yaml")
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split()[1]
        try:
            yield
        finally:
            self.slurm.at_desk("scancel", self.job)
            self.clean()

    def kill_launcher(self) -> None:
        """Inside the job. The batch script outlives it."""
        next(process for process in self.processes() if "--in-allocation" in process.cmdline()).kill()

    def end(self) -> tuple[int, str]:
        if self.lost is not None:
            wait_until(lambda: self.slurm.show(self.job).get("Restarts") == "1", 60)
            wait_until(self.run.attempts()[0].failure.exists)
            self.find_host()
        facts = self.slurm.wait_for(self.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=300)
        code, _, number = facts["ExitCode"].partition(":")
        assert number == "0" and (facts["JobState"] == "COMPLETED") == (code == "0"), facts
        return int(code), (self.run.slurm / f"job-{self.job}.log").read_text()


def end(process: psutil.Process) -> None:
    if process.is_running():
        process.kill()
