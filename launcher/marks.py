"""Marks of progress: each rank says where it is, in a slot of memory that the agent of its node reads.

A mark is made where something was done, by whoever did it: never by a thread that would go on while the work stands
still. It is one `pwrite` of 64 bytes into a file that has no name: nothing is left behind, no file system takes part.
All ranks make the same marks in the same order, so their counts say who is behind.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Literal

VARIABLE = "SPEECHCTL_MARKS"
"""Names the file of the slots, for ranks. Without it (`--debug`) marks go nowhere."""

Phase = Literal["start", "step", "evaluate", "save"]
"""What a deadline is for. An evaluation batch has that of a step."""

END = "end"
"""The last mark: what comes after it is no failure of the training."""

SLOT = struct.Struct("<Qqii12s28s")


@dataclass(frozen=True)
class Mark:
    count: int
    """How many marks this rank has made; 0: none yet."""
    step: int
    pid: int
    rank: int
    phase: str
    at: str
    """Where in the phase."""


class Slots:
    """The agent's side: a slot for each of its ranks."""

    def __init__(self, count: int) -> None:
        self.fd = os.memfd_create("speechctl-marks")
        os.ftruncate(self.fd, count * SLOT.size)

    @property
    def path(self) -> str:
        """By which a process of the same user opens them."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def read(self, local_rank: int) -> Mark:
        count, step, pid, rank, phase, at = SLOT.unpack(os.pread(self.fd, SLOT.size, local_rank * SLOT.size))
        return Mark(count, step, pid, rank, _text(phase), _text(at))


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


_fd = -1
_place = 0
_count = 0
_phase: Phase = "start"
_step = 0
_who = (0, 0)


def open_slot(rank: int, local_rank: int) -> None:
    """The rank's side: have `mark` write into this rank's slot, where its environment names one."""
    global _fd, _place, _who
    path = os.environ.get(VARIABLE)
    if path is not None:
        _fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        _place, _who = local_rank * SLOT.size, (os.getpid(), rank)


def mark(at: str, phase: Phase | None = None, step: int | None = None) -> None:
    """Say where this rank is; phase and step stay what they were. 1.4 µs, measured on two busy cores."""
    global _count, _phase, _step
    if _fd < 0:
        return
    _count += 1
    _phase = phase or _phase
    _step = _step if step is None else step
    os.pwrite(_fd, SLOT.pack(_count, _step, *_who, _phase.encode(), at.encode()[:28]), _place)
