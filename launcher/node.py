"""On each node: starts torchrun with this attempt's ranks, ends every rank when told or left alone, reports.

`python -m launcher.node ATTEMPT_DIR NODE_RANK`, started by the attempt's `node.sh`. Values come from files; nothing is
spliced into a shell. It ends its ranks when its standard input closes, which is how it notices that the launcher is
gone; gently first, so that they can seal their work. Over a network that may be noticed by nobody, and then it ends
them because the launcher has stopped to renew its lease, a file of the attempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher import environment, ownership, redact, rundir, secret, shard_folder
from launcher.errors import HostError, SpeechctlError
from launcher.hosts import Host
from launcher.rundir import Attempt
from launcher.vitals import Vitals

WORKER = "launcher.worker"
"""The only name by which the control side knows the worker."""

END, KILL = b"end\n", b"kill\n"
"""What the launcher may write to a node's standard input: end the ranks gently, or at once."""

DUMP = b"dump\n"
"""Another such word: have the ranks write their stacks."""

OVER = b"over\n"
"""What the lease says once nobody is to go on."""

ANOTHER = "another node had ended"
"""Why a node ends its ranks that was asked to because another one failed."""

STOP = "a stop was asked for"
"""The same, where the run's file that asks for it was there."""

SILENCE = "nothing was heard of the launcher"
"""How it begins where the launcher's lease was not renewed."""

AFTER_DEATH_S = 5.0
"""How long the ranks beside one that died may take to say what they saw. They cannot seal without it, and where they
are blocked in a library they never hear torchrun's SIGTERM; torchrun itself would wait for 30 s."""

NODE_SCRIPT = """\
#!/usr/bin/env bash
# Starts this attempt's ranks on one node. Argument: the rank of the node, from 0.
set -euo pipefail
attempt=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHONSAFEPATH=1  # a folder called launcher where we stand is not ours
PYTHONPATH=$(cat "$attempt/pythonpath")
export PYTHONPATH
exec "$(cat "$attempt/interpreter")" -m launcher.node "$attempt" "$1"
"""


def torchrun_argv(
    python: str, hosts: Sequence[Host], node_rank: int, meeting: dict[str, Any], attempt: Path, listening: int | None
) -> list[str]:
    """torchrun with a static rendezvous and no restarts: a dynamic one runs the code of whoever reaches its port.

    Args:
        listening: on the head node, the socket that the others connect to; inherited.
    """
    return [
        *(python, "-m", "torch.distributed.run"),
        f"--nnodes={len(hosts)}",
        f"--nproc-per-node={hosts[node_rank].slots}",
        "--rdzv-backend=speechctl",  # launcher/worker/meeting.py
        f"--rdzv-endpoint={meeting['address']}:{meeting['port']}",
        f"--rdzv-conf=rank={node_rank}" + ("" if listening is None else f",listening={listening}"),
        "--max-restarts=0",
        f"--log-dir={attempt / 'logs' / 'torchrun'}",  # or it leaves an empty directory in /tmp at every start
        *("-m", WORKER, "train", str(attempt)),
    ]


class Node:
    """The ranks of one attempt on this machine."""

    def __init__(self, attempt: Attempt, node_rank: int) -> None:
        self.attempt = attempt
        self.node_rank = node_rank
        self.env: dict[str, Any] = rundir.read_json(attempt.env)
        self.hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts)]
        self.host = self.hosts[node_rank]
        self.told_to_kill = False
        self.asked: str | None = None
        """Why the ranks were asked to end, where they were."""
        self.killed: str | None = None
        """Why this process killed them, where it did."""
        self.culprit = node_rank
        """The node that an error of this one is about."""
        self.told: set[int] = set()
        self.silenced: set[int] = set()
        """Ranks that were killed because another one had died."""
        self.files = Files(attempt)
        self.vitals = Vitals(attempt, node_rank, self.hosts)
        self.record: dict[str, Any] = {"node_rank": node_rank, "host": socket.gethostname(), "pid": os.getpid()}
        self.stdin_is_open = True
        self.listening: int | None = None
        """The head node's socket, open from the moment in which its port is chosen: nobody else can take that."""

    def meet(self) -> dict[str, Any]:
        """Where the ranks find each other: picked and published by the head node, awaited by the others.

        Raises:
            HostError: this is the head node and has no address that the others reach, or it never published one.
        """
        if self.node_rank == 0:
            address = self.env["address"] or head_address(self.hosts)
            try:
                with socket.socket(_family(address)) as door:
                    door.bind((address, 0))
                    door.listen(socket.SOMAXCONN)
                    port = door.getsockname()[1]
                    self.listening = door.detach()
            except OSError as error:
                raise HostError(
                    f"{self.host.name} cannot listen at {address}: {error.strerror}",
                    hint=f"give {self.host.name}, the head node, one of its own with address=… in the hostfile",
                ) from error
            meeting = {"address": address, "port": port, "id": self.env["rendezvous_id"]}
            rundir.write_json(self.attempt.rendezvous, meeting, mode=0o600)
            return meeting
        deadline = time.monotonic() + self.env["rendezvous_timeout_s"]
        while time.monotonic() < deadline:
            # By listing: NFS answers from cached attributes when it is asked for one name.
            if self.attempt.rendezvous.name in os.listdir(self.attempt.root):
                return dict(rundir.read_json(self.attempt.rendezvous))
            self._listen(0.2)
            if self.asked is not None or self.told_to_kill:
                raise HostError(
                    f"{self.host.name} was told to end before the ranks met", hint="look at the other nodes' logs"
                )
        self.culprit = 0
        raise HostError(
            f"{self.hosts[0].name}, the head node, has not said where the ranks meet: {self.host.name} found no"
            f" {self.attempt.rendezvous} in {self.env['rendezvous_timeout_s']:g} s",
            hint=f"look at {self.attempt.node_log(0)}; a node that is only slow has launch.deadlines.start",
        )

    def variables(self, meeting: dict[str, Any]) -> dict[str, str]:
        """The whole environment of the ranks: the attempt's, and what only this machine can say."""
        variables = environment.on_node(self.env["variables"], self.host, self.env["device"]) | self.vitals.variables
        interface = interface_to(meeting["address"])
        self.record |= {"address": meeting["address"], "interface": interface}
        variables[shard_folder.VARIABLE] = str(shard_folder.record(self.attempt, self.node_rank))
        variables["PET_RDZV_ID"] = meeting["id"]  # torchrun's --rdzv-id: all users of a machine see a command line
        if interface is not None:  # gloo would otherwise take what the host's own name resolves to
            variables.setdefault("GLOO_SOCKET_IFNAME", interface)
        print(
            f"node {self.node_rank}: the ranks meet at {meeting['address']}; the interface to there is {interface}, and"
            f" GLOO_SOCKET_IFNAME is {variables.get('GLOO_SOCKET_IFNAME')}",
            file=sys.stderr,
            flush=True,
        )
        return variables

    def run(self) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminated)
        adopt_orphans()
        ownership.only_we_write()
        # Held for as long as this process lives: the next attempt waits for the ranks that a lost launcher left here.
        alive = os.open(self.attempt.alive, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # From here on this node's log has one writer, on the node, also where our own output goes to another machine.
        log = os.open(self.attempt.node_log(self.node_rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self._write_record(returncode=None)
        try:
            secrets = secret.receive(self.env["secrets"])
            redact.use(secrets.values())
            redact.filter_output()
            meeting = self.meet()
            argv = torchrun_argv(sys.executable, self.hosts, self.node_rank, meeting, self.attempt.root, self.listening)
            argv += ["--fresh"] * self.env["fresh"]
            variables = self.variables(meeting) | secret.variables(secrets)
        except SpeechctlError as error:
            print(error.render(), file=sys.stderr)
            message, hint = map(redact.current.text, (error.message, error.hint))
            about = {"code": int(error.exit_code), "node_rank": self.culprit}
            self.record["error"] = {"message": message, "hint": hint, **about}
            redact.finish_output()
            self._write_record(returncode=1)
            return 1
        self._write_record(returncode=None)
        shard_folder.remove_older(self.attempt)
        torchrun = subprocess.Popen(
            argv,
            env=variables,
            cwd=self.attempt.root,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=() if self.listening is None else (self.listening,),
        )
        if self.listening is not None:
            os.close(self.listening)  # with torchrun it is gone
        returncode = self._watch(torchrun)
        kill_family()  # whatever outlived torchrun
        shard_folder.remove(shard_folder.record(self.attempt, self.node_rank))
        redact.finish_output()
        self.record["memory"] = self.vitals.memory_facts()
        self._write_record(returncode)
        return 0 if returncode == 0 else 1

    def _write_record(self, returncode: int | None) -> None:
        ended: dict[str, Any] = {"returncode": returncode, "asked": self.asked, "killed": self.killed}
        ended |= {"silenced": sorted(self.silenced), "time": time.time()}
        rundir.write_json(self.attempt.node(self.node_rank), {**self.record, **ended})

    def _watch(self, torchrun: subprocess.Popen[bytes]) -> int:
        self.files.follow()
        self.vitals.follow()
        deadline = death = math.inf
        grace_s, lease_s = self.env["stop_grace_s"], self.env["lease_s"]
        while torchrun.poll() is None:
            self._listen(0.2)
            if self.asked is None and self.files.over:
                self.asked = ANOTHER
            if self.asked is None and lease_s is not None and self.files.unchanged_s > lease_s:
                self.asked = f"{SILENCE} for {lease_s:g} s"
            if self.asked is not None:
                self._ask_ranks(torchrun)
            stop = self.files.stop_requested
            if deadline == math.inf and (stop or self.asked is not None):
                deadline = time.monotonic() + grace_s
            if time.monotonic() > deadline:
                why = self.asked or STOP
                self.killed = f"{why}, and launch.stop_grace, {grace_s:g} s, was over"
            elif self.told_to_kill:
                self.killed = "the launcher was told to end at once"
            if self.killed is not None:
                kill_family()
                break
            if death == math.inf and self.vitals.one_died():
                death = time.monotonic()
            if time.monotonic() - death > AFTER_DEATH_S:
                self._silence_ranks(torchrun)
        if self.asked is None and self.files.stop_requested:
            self.asked = STOP
        return torchrun.wait()

    def _terminated(self, *_: object) -> None:
        """SLURM says so before it ends a job, and an operating system before it goes down: there is time to seal."""
        self.asked = self.asked or "the node was sent SIGTERM, as by SLURM before it ends a job"

    def _listen(self, timeout_s: float) -> None:
        """Wait for a word of the launcher: `end` is gentle, like its silence for ever, and `kill` is not."""
        if not self.stdin_is_open:
            time.sleep(timeout_s)
            return
        readable, _, _ = select.select([0], [], [], timeout_s)
        if not readable:
            return
        words = os.read(0, 4096)
        if words == b"":
            self.stdin_is_open = False
            self.asked = self.asked or "the launcher went away"
        if DUMP in words:
            self.vitals.dump()
        if KILL in words:
            self.told_to_kill = True
        if END in words:
            self.asked = self.asked or ANOTHER

    def _ask_ranks(self, torchrun: subprocess.Popen[bytes]) -> None:
        """SIGTERM to every rank, once: they have sessions of their own, so a signal to torchrun's group would miss
        them. Called again and again, because torchrun may still be starting some."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(torchrun.pid).children():
                if rank.pid not in self.told:
                    self.told.add(rank.pid)
                    rank.terminate()

    def _silence_ranks(self, torchrun: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the ranks that are left, and not to torchrun, which then says in the log how each ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(torchrun.pid).children():
                if rank.pid in self.vitals.pids() - self.silenced and _is_running(rank):
                    self.silenced.add(rank.pid)
                    rank.kill()


class Files:
    """What the launcher says through files, looked at in a thread of its own: where the file system hangs, so does
    whoever looks, and that must not be the loop which ends the ranks."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.stop_requested = False
        self.over = False
        self._lease = b""
        self.unchanged_s = 0.0
        """How long the lease has stayed the same. By this machine's monotonic clock, since hosts do not agree on the
        time, and only as far as somebody was there to say so: a file server may be silent for longer than a lease."""

    def follow(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        looked = time.monotonic()
        while True:
            lease = self._lease
            with contextlib.suppress(OSError):
                self.stop_requested = rundir.there(self.attempt.run.stop_request)
                lease = self.attempt.lease.read_bytes()  # opened anew: NFS then asks its server
                self.over = lease == OVER
            now = time.monotonic()
            self.unchanged_s = 0.0 if lease != self._lease else self.unchanged_s + min(now - looked, 1.0)
            self._lease, looked = lease, now
            time.sleep(0.2)


def head_address(hosts: Sequence[Host]) -> str:
    """The address of this machine, the first host, at which the others reach it.

    Raises:
        HostError: its name does not resolve here, or only to loopback, and there are other hosts.
    """
    head = hosts[0]
    if head.address is not None:
        return head.address
    if len(hosts) == 1:
        return "127.0.0.1"
    hint = f"give it in the hostfile, at the line of the head node: {head.name} slots={head.slots} address=…"
    if "SLURM_JOB_ID" in os.environ:  # there is no hostfile
        hint = f"have /etc/hosts on {head.name} give it the address at which {hosts[1].name} reaches it"
    try:
        found = socket.getaddrinfo(head.name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise HostError(f"{head.name} cannot resolve its own name: {error.strerror}", hint=hint) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    reached = [a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    if not reached and "SLURM_JOB_ID" in os.environ and (way := _address_toward(hosts[1].name)) is not None:
        return way  # Debian's installer writes `127.0.1.1 NAME`
    if not reached:
        raise HostError(f"on {head.name}, its own name means {addresses[0]}, where no other host reaches it", hint=hint)
    return next((a for a in reached if ":" not in a), reached[0])


def _address_toward(name: str) -> str | None:
    """This machine's address on the way to another host, or None where that is not told or is loopback."""
    try:
        family, _, _, _, there = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing
            ours = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(ours.partition("%")[0]).is_loopback else ours


def interface_to(address: str) -> str | None:
    """The network interface of this machine that has the way to `address`, or None where that cannot be told."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the kernel only chooses the way
            ours = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs()
    return next((n for n, some in interfaces.items() if any(a.address.partition("%")[0] == ours for a in some)), None)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def adopt_orphans() -> None:
    """Have a process below this one become its child when its own parent dies, so that `kill_family` still finds it."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def kill_family() -> None:
    """SIGKILL to all processes below this one, until there are none: one of them may be starting another. Those that
    filter the ranks' logs have a moment to write the rest."""
    began = time.monotonic()
    while time.monotonic() - began < 10:
        family = psutil.Process().children(recursive=True)
        living = [p for p in family if _is_running(p) and p.pid != redact.own_filter]
        if not living:
            return
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() != redact.FILTER or time.monotonic() - began > 2:
                    process.kill()
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, whatever kills the parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(Node(Attempt(Path(sys.argv[1])), int(sys.argv[2])).run())
