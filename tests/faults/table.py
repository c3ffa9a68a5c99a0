"""The table of faults: what each must come to, on every backend. Written before the code that has to keep it.

A failure's `kind` is what happened first; its `code` is what the attempt ends with; `culprit` is what its message
names; its `verdict` says what follows: `again` is a relaunch from the newest checkpoint, after which the run finishes;
`mend` is for a person, because the same would happen again.
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
