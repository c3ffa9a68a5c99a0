"""How long this rank waited for the others inside collectives of the engine. What is left of a step is its own time,
and says which rank the others wait for.

gloo works in the caller's thread: a call, or the `wait` of one that was begun, is timed where DeepSpeed makes it. DDP
and NCCL work beside Python: there the wait is what lies between the last gradient of a backward pass on this rank and
its end, on a GPU by events of its stream. (Gathering weights at ZeRO 3 over NCCL is not seen: a rank that is slow there
looks like the others, never the other way round.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

TIMED = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce_coalesced"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier"),
)
"""Of DeepSpeed's backend."""


class Waits:
    """Adds them up until they are taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._times_calls = False
        self._events: list[tuple[Any, Any]] = []
        self._last_gradient: Any = None
        self._hook: Any = None

    def take(self) -> float:
        """Seconds since the last time. The device must have come to the end of the last backward pass."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        return seconds + sum(float(begin.elapsed_time(end)) for begin, end in events) / 1000

    # The calls of a backend -----------------------------------------------------------------------------------------

    def time_calls(self, backend: Any) -> None:
        """Of DeepSpeed's `backend`, which a process has once, and in the place of what `watch` sees."""
        self._times_calls = True
        for name in TIMED:
            whole = getattr(backend, name)
            setattr(backend, name, self._timed(getattr(whole, "untimed", whole)))

    def _timed(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            work = whole(*arguments, **options)
            self._seconds += time.perf_counter() - began
            return work if work is None or not hasattr(work, "wait") else _Work(work, self)

        call.untimed = whole  # type: ignore[attr-defined]
        return call

    def add(self, seconds: float) -> None:
        self._seconds += seconds

    # Between the last gradient and the end of a backward pass ---------------------------------------------------------

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the first of them that has a gradient: the last to get one, since it is nearest to the input."""
        if self._times_calls:
            return
        if self._hook is not None:
            self._hook.remove()
        first = next((p for p in parameters if p.requires_grad), None)
        self._hook = None if first is None else first.register_hook(self._reached)  # type: ignore[no-untyped-call]

    def _reached(self, _: Any) -> None:
        self._last_gradient = self._now()

    def backward_ended(self) -> None:
        if self._last_gradient is None:
            return
        begin, self._last_gradient = self._last_gradient, None
        if self.device.type == "cuda":
            self._events.append((begin, self._now()))
        else:
            self._seconds += self._now() - begin

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class _Work:
    """What a collective that was begun is waited for with."""

    def __init__(self, work: Any, waits: Waits) -> None:
        self._work = work
        self._waits = waits

    def wait(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._work.wait(*arguments, **options)
        finally:
            self._waits.add(time.perf_counter() - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
