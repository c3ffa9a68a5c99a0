"""Other machines: `node.sh` is started by the OpenSSH client, with the user's own configuration and known hosts.

Options that make it fail closed, and soon, stand before those of the configuration. The one remote command is fixed
but for a path and a number; whatever else a node needs it reads from files.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from launcher.errors import HostError
from launcher.hosts import Host
from launcher.rundir import Attempt

OPTIONS = {
    "BatchMode": "yes",  # no question that nobody answers
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",  # a host that is silent for 15 s is lost
    "ServerAliveCountMax": "3",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "ControlMaster": "no",  # a shared connection would outlive us
    "ControlPath": "none",
    "LogLevel": "INFO",  # the user may have it quiet, and then no reason is given
}

AT_ONCE = 8
"""How many logins are under way at once: sshd drops some of more than ten (MaxStartups), and so does that of the one
host which all connections go through."""
LOGIN_S = 3.0
"""After so long a login is not waited for any more: it has succeeded, or the host is slow or dead."""

CROWDED = "kex_exchange_identification|Connection (reset|closed)"
"""How ssh says that an sshd let it go before it had looked at the key."""

FAILED = 255
"""ssh's own exit code, where it could not connect or lost the connection."""


def argv(attempt: Attempt, node_rank: int, host: Host) -> list[str]:
    return command_argv(host, f"bash {shlex.quote(str(attempt.node_script))} {node_rank}")


def command_argv(host: Host, command: str) -> list[str]:
    """
    Args:
        command: a fixed text. ssh hands it to a shell over there.
    """
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    login = ["-l", host.user] if host.user else []
    port = ["-p", str(host.port)] if host.port else []
    return ["ssh", "-T", *options, *login, *port, "--", host.name, command]


def start(attempt: Attempt, node_rank: int, host: Host) -> subprocess.Popen[bytes]:
    """
    Raises:
        HostError: there is no ssh here.
    """
    _wait_for_a_turn()
    with attempt.ssh_log(node_rank).open("ab") as log:
        try:
            ssh = subprocess.Popen(
                argv(attempt, node_rank, host), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise HostError(f"cannot start ssh: {error.strerror}", hint="install OpenSSH's client here") from error
    _logins.append((ssh, attempt.node(node_rank), time.monotonic()))
    return ssh


_logins: list[tuple[subprocess.Popen[bytes], Path, float]] = []
"""Those that may be under way: the process, the record by which it is known to be in, and since when."""


def _wait_for_a_turn() -> None:
    while True:
        late = time.monotonic() - LOGIN_S
        _logins[:] = [one for one in _logins if one[2] > late and one[0].poll() is None and not one[1].exists()]
        if len(_logins) < AT_ONCE:
            return
        time.sleep(0.05)


def last_words(attempt: Attempt, node_rank: int) -> str:
    """What ssh, or the shell over there, said last."""
    lines = attempt.ssh_log(node_rank).read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "ssh said nothing"


LOST = (
    r"client_loop|packet_write|Timeout, server|[Rr]ead from remote host|Broken pipe"
    r"|Connection .*(closed|reset|timed out)"
)
"""How ssh says that it lost a connection that stood. Hosts have banners, and shells over there words of their own."""


def lost_words(attempt: Attempt, node_rank: int) -> str | None:
    """What ssh said last of a connection that it lost, if it did."""
    log = attempt.ssh_log(node_rank)
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if re.search(LOST, line)), None)


class Trouble(NamedTuple):
    """Why ssh did not get there."""

    what: str
    sign: str
    """A pattern in what it, or the shell over there, said."""
    hint: str


TROUBLES = (
    Trouble("unknown name", "Could not resolve", "give the name that `ssh` takes, or an IP address, in the hostfile"),
    Trouble(
        "changed host key",
        "IDENTIFICATION HAS CHANGED",
        "its key is not the one in known_hosts: ask its owner why; if that is right, `ssh-keygen -R {name}`, and"
        " `ssh {login}` asks once",
    ),
    Trouble(
        "unknown host key",
        "Host key verification failed",
        "compare its key with what its owner says, then put it into known_hosts: `ssh {login}` asks once",
    ),
    Trouble(
        "no answer of sshd",
        f"banner exchange|{CROWDED}",
        "the machine is reached and its sshd does not answer: it is frozen, overloaded or full (MaxStartups)",
    ),
    Trouble("refused", "Connection refused", "start sshd on {name}, or give its port with port=… in the hostfile"),
    Trouble(
        "timed out",
        "timed out|No route to host|is unreachable|not responding",
        "look whether {name} is up and its address right, or leave it out: --set 'launch.exclude=[{name}]'",
    ),
    Trouble(
        "not let in",
        "Permission denied|Too many authentication failures",
        "have a key that it takes in ssh's agent or configuration, and the right user: `ssh {login} true`"
        " must ask nothing",
    ),
    Trouble("no python3", "python3: .*(not found|No such file)", "install python3 on {name}, 3.8 or newer"),
    Trouble(
        "no such path",
        "No such file|not found",
        "the run's directory and the environment of this command must be at the same path there",
    ),
)
UNKNOWN = Trouble("failed", "", "`ssh {login} true` must work, and ask nothing")


def trouble(said: str, host: Host) -> Trouble:
    """What kind of trouble ssh's words mean, with a hint for this host."""
    login = f"{host.user}@{host.name}" if host.user else host.name
    kind = next((t for t in TROUBLES if re.search(t.sign, said)), UNKNOWN)
    return kind._replace(hint=kind.hint.format(name=host.name, login=login))


def refusal(attempt: Attempt, node_rank: int, host: Host) -> HostError:
    """Why a node never came up."""
    said = attempt.ssh_log(node_rank).read_text(errors="replace")
    words = last_words(attempt, node_rank)
    return HostError(f"cannot start a node on {host.name}: {words}", hint=trouble(said, host).hint)
