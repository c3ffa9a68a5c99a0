"""What rank 0 reports while it trains, read from its files as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher.rundir import Attempt

Tell = Callable[[dict[str, Any]], None]
"""Called with each event of an attempt, as it happens."""


class Follower:
    """Hands on the lines that rank 0 appends to its events and metrics, each once."""

    def __init__(self, attempt: Attempt, tell: Tell) -> None:
        self.offsets = dict.fromkeys((attempt.events, attempt.metrics), 0)
        self.tell = tell

    def once(self) -> None:
        fresh: list[dict[str, Any]] = []
        for path, offset in self.offsets.items():
            data = b""
            with suppress(OSError), path.open("rb") as file:  # a file server has its moments; what is new comes later
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.offsets[path] = offset + len(whole)
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # progress is not worth a run
                    row = json.loads(line)
                    fresh.append({**row, "time": float(row["time"])})
        for row in sorted(fresh, key=lambda r: r["time"]):
            self.tell(row)
