"""Hosts for tests: network namespaces on this machine, each with an address, a name and a real sshd.

One more namespace, the desk, has the bridge that joins them, and is where the user's commands run. Every host is a
process tree of its own (a pid namespace), so that killing its first process ends all of it, whatever a test left
there. Nothing is added to the machine's own network, /etc or ~/.ssh: keys and configuration lie in a temporary
directory, and each namespace sees them where ssh looks for them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.conftest import wait_until

if TYPE_CHECKING:
    from tests.cluster.slurm import Slurm

NETWORK = "10.91.7"
"""Inside the namespaces only: two of these can be up at once."""

SSHD = """\
ListenAddress 0.0.0.0
HostKey {folder}/key-{name}
PidFile none
AuthorizedKeysFile {folder}/user.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
"""

SSH = """\
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
"""

# The first process of a namespace. Names come from a file alone: there is no name server that could be asked.
INIT = """\
set -e
mount --make-rprivate /
hostname "$2"
cd "$1"
for name in hosts nsswitch.conf resolv.conf ssh/ssh_config slurm; do
  [ ! -e "/etc/$name" ] || [ ! -e "${name#ssh/}" ] || mount --bind "${name#ssh/}" "/etc/$name"
done
[ ! -e /etc/machine-id ] || mount --bind "machine-id-$2" /etc/machine-id
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd /run/munge
ip link set lo up
[ "$2" = desk ] || "$3" -f "sshd-$2" -E "$1/log-$2"
touch "up-$2"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""


class Cluster:
    """A desk and some hosts, `node1` to `nodeN`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.hosts = {f"node{k}": f"{NETWORK}.{10 + k}" for k in range(1, count + 1)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.inside: dict[str, int] = {}
        """The pid of each namespace's first process, as it is seen from outside."""

    def up(self) -> None:
        known = [f"{NETWORK}.1 desk", "127.0.0.1 localhost", *(f"{a} {name}" for name, a in self.hosts.items())]
        (self.folder / "hosts").write_text("\n".join(known) + "\n")
        (self.folder / "init").write_text(INIT)  # once: a shell reads its script as it goes
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        (self.folder / "resolv.conf").touch()
        for name in ("desk", *self.hosts):
            (self.folder / f"machine-id-{name}").write_text(f"{secrets.token_hex(16)}\n")
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        for name in ("user", *(f"key-{host}" for host in self.hosts)):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(self.folder / name))
        for name in self.hosts:
            (self.folder / f"sshd-{name}").write_text(SSHD.format(folder=self.folder, name=name))
        self.trust(*self.hosts)
        for name in ("desk", *self.hosts):
            self._boot(name)
        desk = self._in("desk", "--net")
        self._run(*desk, "ip", "link", "add", "bridge0", "type", "bridge")
        self._run(*desk, "ip", "addr", "add", f"{NETWORK}.1/24", "dev", "bridge0")
        self._run(*desk, "ip", "link", "set", "bridge0", "up")
        for name in self.hosts:
            self._connect(name)

    def _connect(self, name: str) -> None:
        desk, address = self._in("desk", "--net"), self.hosts[name]
        card = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"  # the same after a boot: nobody asks for it anew
        peer = ("peer", "name", "eth0", "address", card, "netns", str(self.inside[name]))
        subprocess.run([*desk, "ip", "link", "del", f"to-{name}"], capture_output=True, check=False)  # of a life before
        self._run(*desk, "ip", "link", "add", f"to-{name}", "type", "veth", *peer)
        self._run(*desk, "ip", "link", "set", f"to-{name}", "master", "bridge0", "up")
        there = self._in(name, "--net")
        self._run(*there, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self._run(*there, "ip", "link", "set", "eth0", "up")
        wait_until(partial(self.answers, name))

    def answers(self, name: str) -> bool:
        return self.at_desk("ssh", "-oBatchMode=yes", "-oConnectTimeout=2", name, "true").returncode == 0

    def down(self) -> None:
        for name, process in self.processes.items():
            if name in self.inside and psutil.pid_exists(self.inside[name]):
                os.kill(self.inside[name], 9)  # the kernel ends the whole namespace with its first process
            process.wait(20)

    def _boot(self, name: str) -> None:
        spaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        command = ["unshare", *spaces, "bash", str(self.folder / "init"), str(self.folder), name, sshd() or ""]
        up = self.folder / f"up-{name}"
        up.unlink(missing_ok=True)
        with (self.folder / f"init-{name}").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[name] = process
        wait_until(lambda: up.exists() or process.poll() is not None)
        assert up.exists(), (self.folder / f"init-{name}").read_text()
        self.inside[name] = psutil.Process(process.pid).children()[0].pid

    def trust(self, *names: str) -> None:
        """Have exactly these hosts in the user's known_hosts."""
        keys = {n: " ".join((self.folder / f"key-{n}.pub").read_text().split()[:2]) for n in names}
        (self.folder / "known_hosts").write_text("".join(f"{n},{self.hosts[n]} {key}\n" for n, key in keys.items()))

    def power_off(self, name: str) -> None:
        """No process of the host says goodbye to anybody."""
        self.cut(name)
        os.kill(self.inside.pop(name), 9)
        self.processes[name].wait(20)

    def power_on(self, name: str) -> None:
        self._boot(name)
        self._connect(name)

    def cut(self, name: str) -> None:
        """The cable out: nobody is told."""
        self._run(*self._in("desk", "--net"), "ip", "link", "set", f"to-{name}", "down")

    def mend(self) -> None:
        """Everything as it was when the cluster came up."""
        for name in self.hosts:
            self._run(*self._in("desk", "--net"), "ip", "link", "set", f"to-{name}", "up")
        self.trust(*self.hosts)

    def desk(self, *command: str) -> list[str]:
        """`command` as the user types it: in the desk's network, in this machine's own process tree."""
        stay = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", os.getcwd())
        return [*self._in("desk", "--net", "--uts", "--mount"), *stay, *command]

    def at_desk(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.desk(*command), capture_output=True, text=True, check=False, **options)

    def on(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, not by ssh."""
        inside = self._in(name, "--net", "--uts", "--mount", "--pid")
        return subprocess.run([*inside, *command], capture_output=True, text=True, check=False)

    def hostfile(self, path: Path, *names: str) -> Path:
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return path

    def _in(self, name: str, *spaces: str) -> list[str]:
        return ["nsenter", "--target", str(self.inside[name]), *spaces, "--"]

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing() -> str | None:
    """Why there can be no cluster here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for namespaces"
    tools = [t for t in ("ip", "ssh", "ssh-keygen", "unshare", "nsenter") if shutil.which(t) is None]
    tools += ["sshd"] * (sshd() is None)
    if tools:
        return f"needs {', '.join(tools)} (packages openssh-server, openssh-client, iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "the kernel gives no namespaces here"


def skip(why: str) -> None:
    """Where the tests are told that there can be a cluster (as in CI), that there is none is a failure."""
    if os.environ.get("SPEECHCTL_TEST_CLUSTER") == "required":
        pytest.fail(f"SPEECHCTL_TEST_CLUSTER is `required`, but a cluster here {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (why := missing()) is not None:
        skip(why)
    made = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def cluster(booted: Cluster) -> Iterator[Cluster]:
    """Three hosts in good order."""
    yield booted
    booted.mend()


@pytest.fixture(scope="session")
def slurm_booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    from tests.cluster import slurm

    if (why := missing() or slurm.missing()) is not None:
        skip(why)
    made = slurm.Slurm(tmp_path_factory.mktemp("slurm"), 2)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def slurm(slurm_booted: Slurm) -> Iterator[Slurm]:
    """A partition of two nodes in good order."""
    yield slurm_booted
    slurm_booted.mend()


def processes_of(root: Path) -> list[psutil.Process]:
    """Every process on any host that has this run's path in its command line, but for ssh clients."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(str(root) in word for word in words) and not words[0].endswith("ssh"):
            found.append(process)
    return found


def empty(root: Path, within_s: float) -> bool:
    """Whether no process of the run is left in time."""
    deadline = time.monotonic() + within_s
    while left := processes_of(root):
        if time.monotonic() > deadline:
            print("left:", [p.pid for p in left])
            return False
        time.sleep(0.2)
    return True
