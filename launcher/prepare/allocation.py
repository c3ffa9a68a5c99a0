"""A SLURM job to look at nodes in: the one we are in, or a short one that is asked for like a run's and given back."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from launcher import environment, jobs
from launcher.backends import slurm
from launcher.errors import HostError, SpeechctlError, UsageError
from launcher.hosts import Host
from launcher.nodelist import expand_nodelist
from launcher.recipe_launch import Launch

WAIT_S = 60.0
HOPELESS = re.compile(
    r"DOWN|DRAINED|ReqNodeNotAvail|Partition\w+|Invalid\w+|BadConstraints|JobHeld\w+|BeginTime|\w+Limit"
)
"""Why a job waits that will not start within a minute."""
HOPELESS_S = 10.0


@contextmanager
def allocation(launch: Launch, minutes: int, say: Callable[[str], None]) -> Iterator[tuple[str, list[Host]]]:
    """(the job's number, its nodes). A job that was asked for here is cancelled at the end, however that comes; where
    this process is killed, SLURM ends it after `minutes`.

    Raises:
        UsageError: the job around us has another number of nodes than the recipe asks for.
        HostError: SLURM is not here, or gave no nodes in time.
    """
    around = os.environ.get("SLURM_JOB_ID")
    if around is not None:
        yield around, _hosts(around, launch)
        return
    # Cancelled by its name: Ctrl-C may come before its number is known.
    name = f"speechctl-prepare-{secrets.token_hex(4)}"
    try:
        job = jobs.submitted(slurm.sbatch_to_look(launch, name, minutes), launch)
        _wait(job, launch, say)
        yield job, _hosts(job, launch)
    finally:
        with suppress(SpeechctlError):
            jobs.ask(["scancel", f"--name={name}"], jobs.PAUSES_S)


def _hosts(job: str, launch: Launch) -> list[Host]:
    """In SLURM's order, which is that of the run's nodes."""
    said = jobs.ask(["squeue", "--noheader", f"--jobs={job}", "--format=%N"], jobs.PAUSES_S)
    if said.returncode != 0:
        raise HostError(
            f"squeue: {jobs.words_of(said)}", hint="`scontrol ping` asks whether SLURM's controller answers"
        )
    names = expand_nodelist(said.stdout.strip())
    if len(names) != launch.nodes:
        raise UsageError(
            f"the recipe asks for {launch.nodes} nodes, and job {job}, which this runs in, has {len(names)}",
            hint=f"--set launch.nodes={len(names)}, or run this outside of the job, where it asks for nodes itself",
        )
    return [Host(name, environment.slots_of_job(launch)) for name in names]


def _wait(job: str, launch: Launch, say: Callable[[str], None]) -> None:
    """Until the job runs. A job that may run tomorrow is of no use to somebody who waits at a terminal."""
    began, pause_s, told = time.monotonic(), 0.2, False
    while True:
        now = jobs.look_up(job)
        waited_s = time.monotonic() - began
        if now.state == "RUNNING":
            return
        hopeless = HOPELESS.search(now.reason) and waited_s > HOPELESS_S
        if now.state in jobs.ENDED or hopeless or waited_s > WAIT_S:
            said = f"SLURM gave no nodes to look at in {waited_s:.0f} s: job {now}"
            raise HostError(
                "\n".join([said, *_out_of_order(launch)]),
                hint="nodes must be free: see `squeue` and `sinfo`, ask for fewer with --set launch.nodes=…, or run"
                " this inside a job",
            )
        if waited_s > 2 and not told:
            say(f"waiting for nodes: job {now}")
            told = True
        time.sleep(pause_s)
        pause_s = min(2.0, pause_s * 1.5)


def _out_of_order(launch: Launch) -> list[str]:
    """A line for each node of the partition that takes no jobs, with the reason that somebody gave for it."""
    where = [f"--partition={launch.slurm.partition}"] if launch.slurm.partition else []
    with suppress(SpeechctlError):
        said = jobs.ask(["sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N %T: %E", *where])
        return sorted(set(said.stdout.splitlines()))[:10]
    return []
