"""How often to save: what a save costs, what a failure costs, and the interval between. Pure arithmetic.

Young (1974) and Daly (2006). Failures come without memory, one in `mtbf_s` on average, and may come in a save or in a
restart, too. The time that a restart itself takes is left out: it is the same for every interval.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

FAILURES_PER_NODE_DAY = 6.5e-3
"""Of nodes with 8 GPUs: Meta's RSC-1, 11 months (arXiv:2410.21680). Its sister RSC-2 had 2.34e-3."""

COPY_BYTES_PER_S = 2**30
"""What a rank copies to host memory in a second, where nothing was measured."""

WRITE_BYTES_PER_S, VOTES_S = 2**28, 0.1
"""What all ranks together write and hash in a second, and what the last fsyncs and the votes take besides, where
nothing was measured."""


@dataclass(frozen=True)
class Saves:
    """What a save takes."""

    stall_s: float
    """Training waits."""
    durable_s: float
    """From its begin until it is sealed."""
    source: str
    """How that is known."""


@dataclass(frozen=True)
class Steps:
    """What a step takes."""

    step_s: float | None
    source: str


@dataclass(frozen=True)
class Cadence:
    """How often a run saves, and how often it would have to for the least loss."""

    stall_s: float
    durable_s: float
    saves_source: str
    mtbf_s: float
    mtbf_source: str
    step_s: float | None
    """None: not known yet; and nor is what is counted in steps."""
    step_source: str
    best_interval_s: float
    best_loss: float
    """Share of the time that is lost to saves and to what failures undo."""
    best_every_steps: int | None
    every_steps: int
    """The recipe's `checkpoint.every_steps`."""
    every_steps_loss: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def assumed_saves(checkpoint_bytes: int, world_size: int, *, asynchronous: bool) -> Saves:
    copy_s, write_s = checkpoint_bytes / world_size / COPY_BYTES_PER_S, checkpoint_bytes / WRITE_BYTES_PER_S + VOTES_S
    source = "assumed: 1 GiB/s to host memory on each rank; then 0.1 s and 256 MiB/s to disk for all together"
    return Saves(copy_s if asynchronous else copy_s + write_s, copy_s + write_s, source)


def assumed_mtbf(nodes: int) -> tuple[float, str]:
    """Mean time between failures of so many nodes, and what it was taken from."""
    source = f"assumed: {1000 * FAILURES_PER_NODE_DAY:g} failures in 1,000 node-days, as on Meta's RSC-1"
    return 86_400 / (FAILURES_PER_NODE_DAY * nodes), source


def loss(interval_s: float, stall_s: float, durable_s: float, mtbf_s: float, restart_s: float = 0) -> float:
    """Share of the time that is lost, with a save after every `interval_s` of training.

    One save is in flight at a time: one that would begin earlier waits for the one before.

    Args:
        restart_s: from a failure until training goes on.
    """
    writing_s = durable_s - stall_s  # a failure in there falls back to the checkpoint before
    stall_s += max(0.0, writing_s - interval_s)
    try:
        cycle_s = mtbf_s * math.exp((restart_s + writing_s) / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    except OverflowError:
        return 1.0
    return max(0.0, 1 - interval_s / cycle_s)


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order estimate of the seconds of training between saves that lose least."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(stall_s / (2 * mtbf_s))
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + x / 3 + x**2 / 9) - stall_s


def cadence(
    saves: Saves, steps: Steps, mtbf_s: float, mtbf_source: str, *, every_steps: int, max_steps: int
) -> Cadence:
    def lost(interval_s: float) -> float:
        return loss(interval_s, saves.stall_s, saves.durable_s, mtbf_s)

    best_s = max(best_interval_s(saves.stall_s, mtbf_s), saves.durable_s - saves.stall_s)
    best_steps = own = None
    if (step_s := steps.step_s) is not None:
        below = min(max(1, math.floor(best_s / step_s)), max_steps)
        best_steps = min(below, min(below + 1, max_steps), key=lambda n: lost(n * step_s))
        best_s, own = best_steps * step_s, lost(every_steps * step_s)
    return Cadence(
        stall_s=saves.stall_s,
        durable_s=saves.durable_s,
        saves_source=saves.source,
        mtbf_s=mtbf_s,
        mtbf_source=mtbf_source,
        step_s=step_s,
        step_source=steps.source,
        best_interval_s=best_s,
        best_loss=lost(best_s) if best_s else 0.0,
        best_every_steps=best_steps,
        every_steps=every_steps,
        every_steps_loss=own,
    )
