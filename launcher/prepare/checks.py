"""A check: one thing that one host must have, what was found there, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Verdict = Literal["ok", "warn", "fail", "unknown"]
SEVERITY: tuple[Verdict, ...] = ("ok", "unknown", "warn", "fail")

COLUMNS: dict[str, tuple[str, ...]] = {
    "reach": ("reachable", "host key", "machine"),
    "python": ("interpreter", "python", "packages", "code"),
    "gpu": ("GPUs", "driver", "CUDA", "NCCL", "GPU processes", "GPU memory", "GPU health"),
    "memory": ("RAM", "/dev/shm"),
    "limits": ("limits",),
    "disk": ("space", "inodes", "writable", "shared directory"),
    "clock": ("clock",),
    "names": ("look-up", "reverse look-up"),
    "net": ("interface", "ports"),
    "data": ("packs", "backbone", "launch"),
    "left": ("locks", "stale shared memory", "orphans"),
    "sum": ("all-reduce",),
}
"""The columns of the table, and the checks in each."""


@dataclass(frozen=True)
class Check:
    name: str
    host: str
    verdict: Verdict
    found: str
    expected: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "column": next(c for c, names in COLUMNS.items() if self.name in names)}


Value = TypeVar("Value", bound=Hashable)


def odd_ones(values: Mapping[str, Value], reference: Value | None = None) -> tuple[Value, list[str]]:
    """(what most have, who has something else). Where as many have one thing as another, the reference decides, then
    the first."""
    count = Counter(values.values())
    most = max(count.values())
    tied = [value for value in values.values() if count[value] == most]
    usual = reference if reference is not None and reference in tied else tied[0]
    return usual, [name for name, value in values.items() if value != usual]


def cell(checks: Sequence[Check], host: str, column: str) -> Verdict | None:
    """The worst of the host's checks in a column; None where there is none."""
    verdicts = [c.verdict for c in checks if c.host == host and c.name in COLUMNS[column]]
    return max(verdicts, key=SEVERITY.index, default=None)


def several(names: Sequence[str], most: int = 4) -> str:
    """`a, b and c`, and of many only the first few."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def worst(checks: Iterator[Check] | Sequence[Check]) -> Verdict:
    return max((c.verdict for c in checks), key=SEVERITY.index, default="ok")
