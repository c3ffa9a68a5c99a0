"""The table of faults: what each must come to, on every backend. Written before the code that has to keep it.

A failure's `kind` is what happened first; its `code` is what the attempt ends with; `culprit` is what its message
names; its `verdict` says what follows: `again` is a relaunch from the newest checkpoint, after which the run finishes;
`mend` is for a person, because the same would happen again. Under SLURM the relaunch is in the same life of the job,
or, where a host may be at fault (`recovery.AT_ITS_HOST`) or the launcher is lost, in its next: it is queued again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.errors import ExitCode

Culprit = Literal["rank", "node", "host", "launcher", "run"]


@dataclass(frozen=True)
class Cell:
    """One fault on one backend."""

    kind: str
    code: ExitCode
    culprit: Culprit
    verdict: Literal["again", "mend"]
    seen_within_s: float
    """From the fault to the end of the attempt. For a hang: after its deadline. For a lost host: after the larger of
    ssh's keepalive (15 s) and SLURM's SlurmdTimeout."""


@dataclass(frozen=True)
class Impossible:
    why: str


BACKENDS = ("local", "ssh", "slurm")

_ONE_MACHINE = Impossible(
    "the launcher is on the only host; what cuts that off or powers it off takes the launcher too"
)
_A_THREAD = Impossible(
    "the ranks read ahead in a thread: a process that feeds them does not exist (see `feed blocked`)"
)
_KILLED = Cell("killed", ExitCode.INFRASTRUCTURE, "rank", "again", 10)
_HANG = Cell("hang", ExitCode.INFRASTRUCTURE, "rank", "again", 10)
_HOST = Cell("node lost", ExitCode.INFRASTRUCTURE, "host", "again", 15)

TABLE: dict[str, dict[str, Cell | Impossible]] = {
    "exception": dict.fromkeys(BACKENDS, Cell("training", ExitCode.TRAINING_RAISED, "rank", "mend", 10)),
    "exit 7": dict.fromkeys(BACKENDS, Cell("training", ExitCode.TRAINING_RAISED, "rank", "mend", 10)),
    "SIGKILL rank": dict.fromkeys(BACKENDS, _KILLED),
    "SIGKILL node agent": dict.fromkeys(BACKENDS, Cell("node lost", ExitCode.INFRASTRUCTURE, "node", "again", 10)),
    # Nobody is left to write down the end: the next attempt does, or `status` and `why` where there is none yet. Under
    # SLURM the batch script outlives the launcher and requeues the job.
    "SIGKILL launcher": dict.fromkeys(
        BACKENDS, Cell("launcher lost", ExitCode.INFRASTRUCTURE, "launcher", "again", 10)
    ),
    "SIGSTOP rank": dict.fromkeys(BACKENDS, _HANG),
    "SIGSTOP feeding process": dict.fromkeys(BACKENDS, _A_THREAD),
    "feed blocked": dict.fromkeys(BACKENDS, _HANG),
    "host cut": {"local": _ONE_MACHINE, "ssh": _HOST, "slurm": _HOST},
    "host power-off": {"local": _ONE_MACHINE, "ssh": _HOST, "slurm": _HOST},
    "OOM by cgroup": dict.fromkeys(BACKENDS, Cell("host memory", ExitCode.OUT_OF_MEMORY, "rank", "mend", 10)),
    "port taken": dict.fromkeys(BACKENDS, Cell("port", ExitCode.INFRASTRUCTURE, "node", "again", 10)),
    "crash loop": dict.fromkeys(BACKENDS, Cell("no progress", ExitCode.NO_PROGRESS, "run", "mend", 10)),
}

# The others ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the command of another launcher came to, on one machine. It has no class, no verdict, and starts nothing
    again, but for the crash loop, in which it is allowed three restarts where it has any."""

    exit: int | None
    """Its exit code, negative for a signal; None: it hung."""
    after_s: int
    """From the fault to its end, or to the end of patience."""
    left: int = 0
    """Processes of the run 5 s after that."""
    named: bool = False
    """Whether what it printed names the rank."""


PEERS: dict[str, dict[str, Seen]] = {
    "exception": {
        "torchrun": Seen(1, 5, named=True),
        "deepspeed": Seen(1, 6, named=True),
        "accelerate launch": Seen(1, 5, named=True),
    },
    "exit 7": {
        "torchrun": Seen(1, 5, named=True),
        "deepspeed": Seen(7, 11),
        "accelerate launch": Seen(1, 5, named=True),
    },
    "SIGKILL rank": {
        "torchrun": Seen(1, 2, named=True),
        "deepspeed": Seen(247, 5),
        "accelerate launch": Seen(1, 4, named=True),
    },
    "SIGKILL node agent": {
        "torchrun": Seen(-9, 0, left=2),
        "deepspeed": Seen(0, 3, left=2),
        "accelerate launch": Seen(-9, 0, left=2),
    },
    "SIGKILL launcher": {
        "torchrun": Seen(-9, 0, left=2),
        "deepspeed": Seen(-9, 0, left=3),
        "accelerate launch": Seen(-9, 0, left=2),
    },
    "SIGSTOP rank": {  # the group's timeout is 20 s; unless told it is 30 min
        "torchrun": Seen(1, 55, named=True),
        "deepspeed": Seen(1, 59),
        "accelerate launch": Seen(1, 57, named=True),
    },
    "port taken": {
        "torchrun": Seen(1, 7),
        "deepspeed": Seen(1, 24),
        "accelerate launch": Seen(None, 130),
    },
    "crash loop": {
        "torchrun": Seen(1, 29, named=True),
        "deepspeed": Seen(247, 6),
        "accelerate launch": Seen(None, 70),
    },
}
"""The same faults under torchrun of torch 2.13.0, `deepspeed` 0.19.8 and `accelerate launch` 1.15.0, as
`python -m tests.faults.peers --limit 70` saw them in November 2026, on two busy cores."""
