"""A hostfile for machines that are named by hand or by SLURM, with as many slots for each as it has GPUs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher import environment, hosts, jobs, rundir
from launcher.errors import HostError, UsageError
from launcher.hosts import Host
from launcher.nodelist import expand_nodelist
from launcher.prepare import session
from launcher.prepare.look import Crew, needs_of
from launcher.recipe import Recipe

USABLE = re.compile(r"(idle|mixed|mix|allocated|alloc|completing|comp)\+?")


def write(path: Path, machines: Sequence[Host]) -> str:
    """
    Raises:
        UsageError: the file is there already.
    """
    if path.exists():
        raise UsageError(f"{path} exists already", hint="remove it, or name another file")
    text = hosts.dump_hostfile(machines)
    rundir.write_bytes(path, text.encode())
    return text


def from_list(recipe: Recipe, texts: Sequence[str]) -> list[Host]:
    """The machines that these lines of a hostfile name. Where one leaves slots out, the machine is asked for its GPUs.

    Raises:
        HostfileError: a line is wrong.
        HostError: a machine cannot be reached, or two of them are one.
    """
    open_ = [re.search(r"\b(slots|gpus)=", text) is None for text in texts]
    lines = [f"{text} slots=1" if ask else text for text, ask in zip(texts, open_, strict=True)]
    found = hosts.parse_hostfile("\n".join(lines), "the list of hosts")
    needs = dataclasses.replace(needs_of(recipe, found), backend="ssh")
    with Crew(needs, session.ssh_argv) as crew:
        seen = crew.look(("system", "gpus"), between=False).seen
    if lost := [s for s in seen if s.trouble is not None]:
        text = "\n".join(f"{s.name} cannot be reached: {s.words}" for s in lost)
        raise HostError(text, hint=lost[0].trouble.hint if lost[0].trouble else "")
    hosts.same_machine({s.name: s.value("system")["machine_id"] for s in seen if s.value("system")})
    counts = [(s.value("gpus") or {}).get("devices", 0) for s in seen]
    rows = zip(found, open_, counts, strict=True)
    return [dataclasses.replace(host, slots=count or 1) if ask else host for host, ask, count in rows]


def from_slurm(recipe: Recipe) -> list[Host]:
    """The nodes of the job we are in, or else those of the recipe's partition that are up and not excluded.

    Raises:
        HostError: SLURM is not here or has no node.
    """
    slurm, own = recipe.launch.slurm, environment.slots_of_job(recipe.launch)
    if (nodes := os.environ.get("SLURM_JOB_NODELIST")) is not None:
        given = os.environ.get("SLURM_GPUS_ON_NODE", "")
        return [Host(name, int(given) if given.isdigit() and int(given) else own) for name in expand_nodelist(nodes)]
    where = [f"--partition={slurm.partition}"] if slurm.partition else []
    said = jobs.ask(["sinfo", "--noheader", "--Node", "--format=%N %t %G", *where])
    found = {}
    for name, state, gres in (line.split(None, 2) for line in said.stdout.splitlines() if line.count(" ") > 1):
        if USABLE.fullmatch(state):
            found[name] = Host(name, environment.gpus_of_gres(gres.strip()) or own)
    with suppress(UsageError):  # it may be the name of a file
        for name in expand_nodelist(slurm.exclude or ""):
            found.pop(name, None)
    if not found:
        words = said.stderr.strip() or "it lists no node that is up"
        raise HostError(f"sinfo: {words}", hint="look at `sinfo`, or name the hosts")
    return list(found.values())
