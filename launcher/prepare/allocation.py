"""A SLURM job to look at nodes in: the one we are in, or a short one that is asked for and given back."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.errors import HostError
from launcher.hosts import Host
from launcher.nodelist import expand_nodelist
from launcher.recipe_launch import Launch

WAIT_S = 60
MINUTES = 5


def salloc_argv(launch: Launch) -> list[str]:
    slurm = launch.slurm
    own = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "gres": slurm.gres}
    asked = [f"--{name}={value}" for name, value in {**own, "exclude": slurm.exclude}.items() if value is not None]
    return [
        *("salloc", "--no-shell", "--job-name=speechctl-prepare", f"--immediate={WAIT_S}", f"--time={MINUTES}"),
        *(f"--nodes={launch.nodes}", "--ntasks-per-node=1", *asked, *slurm.options),
    ]


@contextmanager
def allocation(launch: Launch) -> Iterator[tuple[str, list[Host]]]:
    """(the job's number, its nodes).

    Raises:
        HostError: SLURM is not here, or gave no nodes in time.
    """
    job = os.environ.get("SLURM_JOB_ID")
    asked = job is None
    if job is None:
        said = _run(*salloc_argv(launch))
        granted = re.search(r"Granted job allocation (\d+)", said)
        if granted is None:
            words = ([line for line in said.splitlines() if line.strip()] or ["salloc said nothing"])[-1]
            hint = f"nodes must be free for {WAIT_S} s: see `squeue` and `sinfo`, or run this inside a job"
            raise HostError(f"SLURM gave no nodes to look at: {words}", hint=hint)
        job = granted[1]
    try:
        nodes = _run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        yield job, [Host(name, slots(launch)) for name in expand_nodelist(nodes)]
    finally:
        if asked:
            _run("scancel", job)


def slots(launch: Launch) -> int:
    """Ranks on each node: as the recipe says, or as many as it asks GPUs for."""
    if launch.processes != "auto":
        return launch.processes
    return gpus(launch.slurm.gres or "") or 1


def gpus(gres: str) -> int:
    """How many GPUs SLURM means by `gpu:8`, `gpu:h100:8(S:0-1)` or `gpu`."""
    found = [
        re.fullmatch(r"gpu(?::[A-Za-z][^:(]*)?(?::(\d+))?(?:\(.*\))?", part) for part in re.split(r",(?![^(]*\))", gres)
    ]
    return sum(int(match[1] or 1) for match in found if match)


def _run(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise HostError(
            f"cannot start {argv[0]}: {error.strerror}", hint="run this where SLURM's commands are, on a login node"
        ) from error
    return done.stdout + done.stderr
