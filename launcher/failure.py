"""What `failure.json` says of an attempt: kind, culprit, evidence, and whether to try again. `cause` finds it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from launcher import rundir
from launcher.errors import DataError, ExitCode
from launcher.hosts import Host
from launcher.rundir import Attempt

Verdict = Literal["again", "mend"]

KINDS: dict[str, tuple[ExitCode, Verdict]] = {
    "training": (ExitCode.TRAINING_RAISED, "mend"),
    "recipe": (ExitCode.USAGE, "mend"),
    "host refused": (ExitCode.HOST, "mend"),
    "preflight": (ExitCode.PREFLIGHT, "mend"),
    "data": (ExitCode.DATA, "mend"),
    "bug": (ExitCode.BUG, "mend"),
    "storage": (ExitCode.STORAGE, "mend"),
    "host memory": (ExitCode.OUT_OF_MEMORY, "mend"),
    "device memory": (ExitCode.OUT_OF_MEMORY, "mend"),
    "no progress": (ExitCode.NO_PROGRESS, "mend"),
    "stopped by force": (ExitCode.INFRASTRUCTURE, "mend"),  # a person did that, and a person decides
    "superseded": (ExitCode.INFRASTRUCTURE, "mend"),  # another launcher has the run now
    "killed": (ExitCode.INFRASTRUCTURE, "again"),
    "hang": (ExitCode.INFRASTRUCTURE, "again"),
    "device": (ExitCode.INFRASTRUCTURE, "again"),
    "port": (ExitCode.INFRASTRUCTURE, "again"),
    "node lost": (ExitCode.INFRASTRUCTURE, "again"),
    "node failed": (ExitCode.INFRASTRUCTURE, "again"),
    "lost peer": (ExitCode.INFRASTRUCTURE, "again"),
    "launcher lost": (ExitCode.INFRASTRUCTURE, "again"),
    "time limit": (ExitCode.INFRASTRUCTURE, "again"),
    "preempted": (ExitCode.INFRASTRUCTURE, "again"),
}
"""What each kind ends an attempt with, and what follows: `again` from the newest checkpoint, or a person must `mend`
something because the same would happen again."""

OF_CODE = {
    ExitCode.TRAINING_RAISED: "training",
    ExitCode.USAGE: "recipe",
    ExitCode.HOST: "host refused",
    ExitCode.PREFLIGHT: "preflight",
    ExitCode.DATA: "data",
    ExitCode.BUG: "bug",
    ExitCode.STORAGE: "storage",
    ExitCode.INFRASTRUCTURE: "superseded",
    ExitCode.OUT_OF_MEMORY: "host memory",
}
"""The kind of a failure that a rank or a node gave a code itself."""


@dataclass(frozen=True)
class Failure:
    """What `failure.json` says of an attempt."""

    kind: str
    message: str
    """Names the rank and its host, where one is the cause."""
    hint: str
    rank: int | None = None
    host: str | None = None
    node_rank: int | None = None
    evidence: list[str] = field(default_factory=list)
    """Files worth reading, and lines worth seeing."""
    cause: dict[str, Any] | None = None
    """Of `no progress`: the failure of the last attempt."""
    code: ExitCode = ExitCode.BUG
    verdict: Verdict = "mend"
    time: float = 0.0

    def __post_init__(self) -> None:
        code, verdict = KINDS[self.kind]
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "verdict", verdict)
        object.__setattr__(self, "time", self.time or time.time())

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return value if self.cause is not None else {k: v for k, v in value.items() if k != "cause"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Failure:
        return cls(**{k: v for k, v in value.items() if k not in ("code", "verdict")})


def resume(attempt: Attempt) -> str:
    return f"`speechctl resume {attempt.run.root}` goes on from the newest checkpoint"


def places(attempt: Attempt) -> list[tuple[str, int]]:
    """(host, node rank) of every rank."""
    hosts = [Host.from_json(h) for h in rundir.read_json(attempt.hosts) or ()]
    return [(host.name, k) for k, host in enumerate(hosts) for _ in range(host.slots)]


def read_progress(attempt: Attempt, node_rank: int) -> dict[str, Any]:
    """A node's progress file; empty where there is none yet. It is rewritten in place, so it may be read half."""
    try:
        return dict(rundir.read_json(attempt.progress(node_rank)) or {})
    except (DataError, OSError):
        return {}
