"""Hosts: which machines an attempt runs on, and how many ranks each takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    slots: int
    """Ranks on this host."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def local(processes: int | Literal["auto"], gpus: int) -> list[Host]:
    """This machine alone: as many ranks as asked for, or one for each GPU, or one."""
    return [Host("localhost", (gpus or 1) if processes == "auto" else processes)]
