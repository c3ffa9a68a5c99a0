"""The recipe's `launch` section: where its ranks run, and what happens when something under them fails."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from launcher.recipe_values import Location, Seconds, Section


class Deadlines(Section):
    """How long a rank may show no progress before the run is taken for hung: stacks are dumped, the rank that differs
    is named, and the attempt ends."""

    start: Seconds = 900
    """From the start of a rank to its first step, or from one sign of progress to the next in between: imports,
    weights, packs, the first meeting of the ranks."""

    step: Seconds = 300
    """Between two signs of progress in a step or an evaluation."""

    save: Seconds = 900
    """Inside the save of a checkpoint."""


class Relaunch(Section):
    """What follows a failure that is not of the recipe's or the code's making: all ranks start again, from the newest
    checkpoint that verifies."""

    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """So many attempts in a row without a new checkpoint end the run (exit 78)."""

    wait: Seconds = 5
    """Before the next attempt; doubled after each further one without a new checkpoint, up to ten minutes."""

    avoid: Seconds = 86400
    """How long a host at which a failure happened is left out, where another can take its place."""


SBATCH_OWN = (
    *("nodes", "ntasks", "ntasks-per-node", "export", "export-file", "requeue", "no-requeue", "open-mode", "signal"),
    *("output", "error", "array", "wrap", "parsable", "test-only", "wait", "chdir", "input"),
)
"""Options of sbatch that the launcher sets itself or cannot work with."""


def _sbatch_option(text: str) -> str:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", text, flags=re.DOTALL)
    if match is None:
        raise ValueError("expected a long option of sbatch, written as one word: --name or --name=value")
    if any(own.startswith(match[1]) for own in SBATCH_OWN):  # sbatch takes `--wra` for `--wrap`
        raise ValueError(f"--{match[1]} is set by speechctl or cannot be used here")
    return text


class Slurm(Section):
    """How a job is asked for. What is left out, the cluster decides."""

    partition: str | None = None
    """--partition."""

    account: str | None = None
    """--account."""

    qos: str | None = None
    """--qos."""

    gres: str | None = None
    """--gres for each node, such as `gpu:8`."""

    time: Seconds | None = None
    """--time, the limit of one job. A run that needs longer is saved, requeued and goes on."""

    exclude: str | None = None
    """--exclude, as a SLURM node list: `gpu[03-05]`."""

    warning: Seconds = 180
    """How long before the time limit the ranks are asked to save and stop. SLURM may say it up to a minute early."""

    options: list[Annotated[str, AfterValidator(_sbatch_option)]] = []
    """Any other options of sbatch, each as one word: `--mem=0`, `--constraint=h100`, `--comment=two words`."""


def _secret(text: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=/.+)?", text) is None:
        raise ValueError("expected NAME, or NAME=FILE with the file's absolute path")
    return text


class Launch(Section):
    backend: Literal["local", "ssh", "slurm"] = "local"
    """How the nodes are reached. `local`: this machine. `ssh`: the machines of `hostfile`. `slurm`: a job's."""

    nodes: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """How many hosts to use. ssh: of those in the hostfile, in its order, and the others take the place of one that
    fails; `auto`: all. slurm: how many to ask for."""

    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Ranks on each node. `auto`: one for each GPU, or one where there is none; with slurm, as many as `slurm.gres`
    has GPUs. Over ssh the hostfile says it."""

    hostfile: Location | None = None
    """The machines, a line for each: `gpu-01 slots=8`. The first is the head node, where the ranks meet."""

    include: list[str] = []
    """Use only these hosts and slots of the hostfile, in DeepSpeed's grammar: `gpu-01`, `gpu-02:0,2`, `gpu-0*`."""

    exclude: list[str] = []
    """Leave out these hosts and slots of the hostfile."""

    device: Literal["auto", "cpu"] = "auto"
    """What ranks compute on. `auto`: GPUs, where there are any. `cpu`: leave GPUs alone."""

    stop_grace: Seconds = 120
    """After a request to stop: how long ranks may take to finish their step and seal, before they are killed."""

    secrets: list[Annotated[str, AfterValidator(_secret)]] = []
    """Environment variables for the ranks that nobody else may see: `HF_TOKEN` takes the value from the environment of
    the launcher, `HF_TOKEN=/home/me/.token` from a file. No value is written anywhere; in logs it is blacked out."""

    deadlines: Deadlines = Deadlines()
    """When a rank that shows no progress is taken for hung."""

    relaunch: Relaunch = Relaunch()
    """What follows a failure of the machines."""

    slurm: Slurm = Slurm()
    """How a SLURM job is asked for; the other backends do not look at it."""

    @model_validator(mode="after")
    def _hosts(self) -> Launch:
        if self.backend == "ssh" and self.hostfile is None:
            raise ValueError("backend ssh needs launch.hostfile, the file that names its machines")
        if self.backend == "ssh" and self.processes != "auto":
            raise ValueError(
                "launch.processes is not for backend ssh: there the hostfile says slots=N for each host; say auto"
            )
        if self.backend != "ssh" and (self.hostfile or self.include or self.exclude):
            raise ValueError(f"hostfile, include and exclude are of backend ssh, and the backend is {self.backend}")
        if self.backend == "local" and self.nodes not in ("auto", 1):
            raise ValueError("backend local is this machine, one node; launch.nodes is of backends ssh and slurm")
        names = [entry.partition("=")[0] for entry in self.secrets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"secrets names {', '.join(twice)} twice")
        if self.backend == "slurm" and (waiting := [name for name in self.secrets if "=" not in name]):
            raise ValueError(
                f"under SLURM a secret comes from a file, as {waiting[0]}=/path/of/a/file: what is in the environment"
                " would wait in the queue with the job, where SLURM keeps it"
            )
        if self.backend == "slurm" and self.nodes == "auto":
            raise ValueError(
                "backend slurm needs launch.nodes, how many nodes to ask for, such as --set launch.nodes=2"
            )
        if self.backend == "slurm":
            self._time_to_save()
        return self

    def _time_to_save(self) -> None:
        """A job that SLURM ends in the middle of a save is not requeued by anybody."""
        time, warning, grace = self.slurm.time, self.slurm.warning, self.stop_grace
        if time is not None and time <= warning + 60:
            raise ValueError(
                f"slurm.time, {time:g} s, leaves nothing to train in: SLURM may warn slurm.warning, {warning:g} s, and"
                f" 60 s more before that, {warning + 60:g} s in all"
            )
        if warning < grace + 10:
            raise ValueError(
                f"slurm.warning, {warning:g} s, must be longer than launch.stop_grace, {grace:g} s, and 10 s for the"
                f" end of a job: at least {grace + 10:g} s"
            )
