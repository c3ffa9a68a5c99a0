"""`speechctl prepare` from its recipe to its exit code, and the short form of it that stands before every launch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import environment, hosts, secret, verbs
from launcher import plan as plans
from launcher.errors import ExitCode, HostError, PreflightError, SpeechctlError
from launcher.hosts import Host
from launcher.plan import Plan
from launcher.prepare import session
from launcher.prepare.allocation import allocation
from launcher.prepare.between_hosts import proposals
from launcher.prepare.checks import COLUMNS, Check
from launcher.prepare.findings import AllReduce, Findings
from launcher.prepare.judge import judge
from launcher.prepare.look import Crew, needs_of
from launcher.prepare.mend import mend
from launcher.recipe import Recipe

Sizes = Callable[[], Plan]
"""Works out the plan, for the sizes in it; raises SpeechctlError where it cannot."""

LOOK_MINUTES, FIX_MINUTES = 5, 60
"""Of a SLURM job to look at nodes in, and to install an environment from."""

NEEDED_FOR_A_SUM = (*COLUMNS["python"], *COLUMNS["net"], "GPUs", "CUDA", "look-up", "shared directory")


@dataclass
class Result:
    """What `prepare` says."""

    found: Findings
    checks: list[Check]
    mended: list[str] = field(default_factory=list)
    """What --fix did, and what it tried in vain."""

    @property
    def code(self) -> ExitCode:
        if any(s.trouble is not None for s in self.found.seen):
            return ExitCode.HOST
        return ExitCode.PREFLIGHT if any(c.verdict == "fail" for c in self.checks) else ExitCode.FINISHED

    def to_json(self) -> dict[str, Any]:
        return {
            "hosts": [s.host.to_json() for s in self.found.seen],
            "code": int(self.code),
            "checks": [c.to_json() for c in self.checks],
            "proposed": proposals(self.found),
            "mended": self.mended,
        }


@contextmanager
def reached_by(
    recipe: Recipe, minutes: int, say: Callable[[str], None]
) -> Iterator[tuple[list[Host], Callable[[Host], list[str]]]]:
    """(the hosts of the recipe, how the probe is started on each): under SLURM inside a job.

    Args:
        minutes: how long a job for that may last.

    Raises:
        UsageError: the hostfile cannot be used.
        HostError: SLURM gives no nodes.
    """
    if recipe.launch.backend == "slurm":
        with allocation(recipe.launch, minutes, say) as (job, machines):
            yield machines, lambda host: session.srun_argv(host, job)
    else:
        by_ssh = recipe.launch.backend == "ssh"
        yield environment.named(recipe), session.ssh_argv if by_ssh else lambda host: session.here_argv()


def prepare(recipe: Recipe, path: Path, *, fix: bool, say: Callable[[str], None] = print) -> Result:
    """Look at every host of the recipe, and with `fix` mend what is safe to mend and look again.

    Args:
        path: the recipe, resolved, for the worker.
        say: takes lines for whoever waits.
    """
    with reached_by(recipe, FIX_MINUTES if fix else LOOK_MINUTES, say) as (machines, argv):
        sizes, refused = planned_sizes(path, recipe, machines), refusals(recipe)
        with Crew(needs_of(recipe, machines), argv) as crew:
            result = examine(crew, sizes, refused)
            mended = mend(crew, result.checks) if fix else []
        if mended:
            with Crew(needs_of(recipe, machines), argv) as crew:
                result = examine(crew, sizes, refused)
    result.mended = mended
    return result


def refusals(recipe: Recipe) -> list[SpeechctlError]:
    """What a launch of the recipe would say before it looks at any host."""
    found = []
    for trial in (
        lambda: environment.machines(recipe),
        lambda: secret.read(environment.secrets(recipe.launch)),
    ):
        try:
            trial()
        except SpeechctlError as error:
            found.append(error)
    return found


def examine(crew: Crew, sizes: Sizes, refused: list[SpeechctlError]) -> Result:
    """Look at all hosts, and where nothing that it needs is red, have them compute one sum."""
    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(sizes)
        found = crew.look()
        found.refused = refused
        try:
            plan = planned.result()
            found.state_bytes_per_rank, found.checkpoint_bytes = plan.state_bytes_per_rank, plan.checkpoint_bytes
        except SpeechctlError as error:
            found.sizes_unknown = f"sizes unknown: {error.message}"
    red = [c for c in judge(found) if c.verdict == "fail" and c.name in NEEDED_FOR_A_SUM]
    lost = [s.name for s in found.seen if s.trouble is not None]
    if len(found.seen) == 1:
        pass
    elif lost:
        found.all_reduce = AllReduce(not_tried=f"{lost[0]} was not reached")
    elif red:
        found.all_reduce = AllReduce(not_tried=f"{red[0].name} of {red[0].host} first")
    else:
        found.all_reduce = crew.all_reduce()
    return Result(found, judge(found))


def planned_sizes(path: Path, recipe: Recipe, machines: Sequence[Host]) -> Sizes:
    """The plan, from the worker's facts, which are asked for in silence."""
    ranks = sum(h.slots for h in machines)

    def sizes() -> Plan:
        done = verbs.ask(["facts", str(path), "--world-size", str(ranks)], stderr=subprocess.PIPE)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            first = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), None)
            raise PreflightError(first or (said[-1] if said else "the worker said nothing"), hint="see above")
        return plans.make(recipe, machines, json.loads(done.stdout.splitlines()[-1]))

    return sizes


# Before a launch -----------------------------------------------------------------------------------------------------

QUICK = ("system", "environment", "disk")
QUICKLY = (*COLUMNS["reach"], *COLUMNS["python"], "writable", "shared directory")


def before_launch(recipe: Recipe, machines: Sequence[Host]) -> None:
    """The short form: that all hosts are reached, are as many machines, run the same code, and share one directory.

    Raises:
        HostError: a host cannot be reached, or two names are one machine.
        PreflightError: hosts differ.
    """
    if recipe.launch.backend != "ssh":
        return
    with Crew(needs_of(recipe, machines), session.ssh_argv) as crew:
        found = crew.look(QUICK, between=False)
    if lost := [s for s in found.seen if s.trouble is not None]:
        text = "\n".join(f"cannot start a node on {s.name}: {s.words}" for s in lost)
        raise HostError(text, hint=lost[0].trouble.hint if lost[0].trouble else "")
    hosts.same_machine({s.name: s.value("system")["machine_id"] for s in found.seen if s.value("system")})
    if red := [c for c in judge(found) if c.verdict == "fail" and c.name in QUICKLY]:
        text = "\n".join(
            f"{c.host}: {c.name}: {c.found}" + (f", expected {c.expected}" if c.expected else "") for c in red
        )
        raise PreflightError(text, hint=f"{red[0].hint}; `speechctl prepare RECIPE` looks at everything")
