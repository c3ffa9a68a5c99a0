"""A SLURM job: inside it `node.sh` is started by one `srun` for each node; outside, `sbatch` asks for the job, or for
one like it that `prepare` looks at nodes in.

What a word of the command lines says comes from the recipe as it stands there, each value a word of its own: no shell
reads any of them. Jobs are submitted and asked about in `jobs.py`; `train.sbatch` is what runs as the job.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.backends.ssh import Trouble
from launcher.errors import HostError
from launcher.hosts import Host
from launcher.recipe import Recipe
from launcher.recipe_launch import Launch, Slurm
from launcher.rundir import Attempt, Run

SCRIPT = Path(__file__).with_name("train.sbatch")

SRUN = (
    "--nodes=1",
    "--ntasks=1",
    "--overlap",  # takes nothing from other steps, and does not wait for one of an earlier attempt to be gone
    "--export=ALL",  # whatever the job's own submission said about that
    "--cpu-bind=none",  # or all ranks of a node share the processor of one task
    "--mem=0",  # or the memory of one task
    "--mpi=none",  # ranks find each other through torchrun
)


def argv(attempt: Attempt, node_rank: int, host: Host) -> list[str]:
    return ["srun", *SRUN, f"--nodelist={host.name}", "bash", str(attempt.node_script), str(node_rank)]


def look_argv(host: Host, job: str, *command: str) -> list[str]:
    """A command on a node of a job that we may be outside of; otherwise as a node of a run is started, so that it
    finds the limits and devices that the ranks will."""
    return ["srun", *SRUN, f"--jobid={job}", f"--nodelist={host.name}", *command]


def start(attempt: Attempt, node_rank: int, host: Host) -> subprocess.Popen[bytes]:
    """What is written to srun's standard input reaches the node, and so does its end; a session of its own keeps the
    signals of the batch script's group away, at which srun would kill the node at once.

    Raises:
        HostError: there is no srun here.
    """
    with attempt.srun_log(node_rank).open("ab") as log:
        try:
            return subprocess.Popen(
                argv(attempt, node_rank, host), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise HostError(
                f"cannot start srun: {error.strerror}", hint="a job's nodes need SLURM's client commands on PATH"
            ) from error


def sbatch(recipe: Recipe, run: Run, avoided: Sequence[str] = (), more: Sequence[str] = ()) -> list[str]:
    """The command that asks for a job of this run.

    Args:
        avoided: hosts to leave out besides `slurm.exclude`.
        more: options of `speechctl resume` for the job's first life.
    """
    slurm = recipe.launch.slurm
    return [
        "sbatch",
        "--parsable",
        f"--job-name={recipe.name}",
        f"--nodes={recipe.launch.nodes}",
        "--ntasks-per-node=1",
        f"--signal=B:USR2@{round(slurm.warning)}",
        "--requeue",
        "--open-mode=append",
        "--export=ALL",  # of an environment that was filtered (`jobs.environment_of_a_job`)
        f"--chdir={run.root}",
        f"--output={str(run.root).replace('%', '%%')}/slurm/job-%j.log",
        *asked(slurm, slurm.time, avoided),
        str(SCRIPT),
        str(run.root),
        *more,
    ]


def sbatch_to_look(launch: Launch, name: str, minutes: int) -> list[str]:
    """The command that asks for the nodes that a job of this recipe would get, for a while in which nothing runs there
    but what is started by `look_argv`."""
    return [
        "sbatch",
        "--parsable",
        *asked(launch.slurm, None),
        # Behind the recipe's options, which may say something else about these.
        f"--job-name={name}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--time={minutes}",
        "--no-requeue",
        "--export=ALL",
        "--chdir=/",
        "--output=/dev/null",
        f"--wrap=exec sleep {minutes * 60}",
    ]


def asked(slurm: Slurm, time_s: float | None, avoided: Sequence[str] = ()) -> list[str]:
    """What the recipe says about its jobs, as options."""
    exclude = ",".join(filter(None, [slurm.exclude, *avoided]))
    options = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "gres": slurm.gres,
        "time": None if time_s is None else clock(time_s),
        "exclude": exclude or None,
    }
    return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *slurm.options]


def clock(seconds: float) -> str:
    """`D-HH:MM:SS`, which SLURM reads without a guess at the unit. It rounds up to whole minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{rest:02d}"


# How a node failed ---------------------------------------------------------------------------------------------------


def last_words(attempt: Attempt, node_rank: int) -> str:
    """What srun said last that says something."""
    log = attempt.srun_log(node_rank)
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if re.match(r"(srun|slurmstepd\S*): error: ", line)]
    return said[-1].partition("error: ")[2] if said else "srun said nothing"


def lost(attempt: Attempt, node_rank: int) -> bool:
    """Whether SLURM gave the node up, or srun could not reach it any more."""
    signs = "Node failure on|Communication connection failure|[Tt]imed out"
    return re.search(signs, last_words(attempt, node_rank)) is not None


TROUBLES = (
    Trouble("no python3", "python3: .*(not found|No such file)", "install python3 on {name}, 3.8 or newer"),
    Trouble(
        "the job is over",
        "Invalid job id|[Ee]xpired|already complet|REVOKED|CANCELLED|TIME LIMIT",
        "somebody cancelled it, or it took too long: once more; `speechctl prepare` inside a longer job takes that",
    ),
    Trouble(
        "no answer",
        "",
        "`scontrol show node {name}` says how it is; --set launch.slurm.exclude={name} leaves it out",
    ),
)


def trouble(said: str, host: Host) -> Trouble:
    """What kind of trouble srun's words mean, with a hint for this host."""
    kind = next(t for t in TROUBLES if re.search(t.sign, said))
    return kind._replace(hint=kind.hint.format(name=host.name))


def refusal(attempt: Attempt, node_rank: int, host: Host) -> HostError:
    """Why a node never came up."""
    return HostError(
        f"cannot start a node on {host.name}: {last_words(attempt, node_rank)}",
        hint=f"`scontrol show node {host.name}` says how it is; the run's directory and the environment of this command"
        " must be at the same path there",
    )
