"""Other machines: `node.sh` is started by the OpenSSH client, with the user's own configuration and known hosts.

Options that make it fail closed, and soon, stand before those of the configuration. The one remote command is fixed
but for a path and a number; whatever else a node needs it reads from files.
"""

from __future__ import annotations

import re
import shlex
import subprocess

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

FAILED = 255
"""ssh's own exit code, where it could not connect or lost the connection."""


def argv(attempt: Attempt, node_rank: int, host: Host) -> list[str]:
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    login = ["-l", host.user] if host.user else []
    port = ["-p", str(host.port)] if host.port else []
    # ssh joins what follows the host with blanks and hands it to a shell over there.
    return [
        "ssh",
        "-T",
        *options,
        *login,
        *port,
        "--",
        host.name,
        f"bash {shlex.quote(str(attempt.node_script))} {node_rank}",
    ]


def start(attempt: Attempt, node_rank: int, host: Host) -> subprocess.Popen[bytes]:
    """
    Raises:
        HostError: there is no ssh here.
    """
    with attempt.ssh_log(node_rank).open("ab") as log:
        try:
            return subprocess.Popen(
                argv(attempt, node_rank, host), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise HostError(f"cannot start ssh: {error.strerror}", hint="install OpenSSH's client here") from error


def last_words(attempt: Attempt, node_rank: int) -> str:
    """What ssh, or the shell over there, said last."""
    lines = attempt.ssh_log(node_rank).read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "ssh said nothing"


HINTS = (
    (
        "Host key verification failed|IDENTIFICATION HAS CHANGED",
        "compare its key with what its owner says, then put it into known_hosts: `ssh {host}` asks once",
    ),
    ("Could not resolve", "give the name that `ssh` takes, or an IP address, in the hostfile"),
    (
        "Permission denied",
        "have a key that it takes in ssh's agent or configuration, and the right user: `ssh {host} true`"
        " must ask nothing",
    ),
    (
        "No such file|not found",
        "the run's directory and the environment of this command must be at the same path there",
    ),
)


def refusal(attempt: Attempt, node_rank: int, host: Host) -> HostError:
    """Why a node never came up."""
    words = last_words(attempt, node_rank)
    login = f"{host.user}@{host.name}" if host.user else host.name
    hint = next(
        (hint for sign, hint in HINTS if re.search(sign, words)), "`ssh {host} true` must work, and ask nothing"
    )
    return HostError(f"cannot start a node on {host.name}: {words}", hint=hint.format(host=login))
