"""Ranks that wait for rank 0, however long it takes, as long as it gets on.

A collective would end them after its timeout, whatever rank 0 does meanwhile. Here rank 0 tells of each piece of its
work through the store that the ranks met by, and the others look there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

from launcher.marks import mark
from launcher.worker.ranks import Ranks

LOOK_S = (0.01, 0.5)
"""Between two looks into the store: at first, and where nothing has changed for long."""

_numbers = itertools.count()


class Waiting:
    """One time that the others wait for rank 0. All ranks make it together.

    Marks: a waiting rank is one ahead of rank 0 until that is done, so that of a hang it is rank 0 that is behind.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.store = ranks.store(f"waiting-{next(_numbers)}")
        self.beats = 0

    def beat(self, at: str) -> bool:
        """Rank 0: it has come to the next piece of its work. Returns whether one that waits was asked to stop."""
        mark(at)
        self.beats += 1
        if self.store is None:
            return False
        self.store.set("beats", str(self.beats))
        return bool(self.store.check(["stop"]))

    def over(self, value: Any) -> None:
        """Rank 0: it is done. The others go on with `value`, which JSON can say."""
        mark("done")
        if self.store is not None:
            self.store.set("over", json.dumps(value))

    def wait(self, stop: Callable[[], bool]) -> Any:
        """The others: until rank 0 is done.

        Args:
            stop: whether this rank was asked to; rank 0 hears of it, and decides.

        Returns:
            what rank 0 gave to `over`.

        Raises:
            RuntimeError: rank 0 has done nothing for as long as one exchange among ranks may take.
        """
        assert self.store is not None
        mark("wait for rank 0")
        heard, told, pause = time.monotonic(), False, LOOK_S[0]
        while True:
            over = self.store.check(["over"])  # before the beats: none comes after it
            if new := self._beats() - self.beats:
                for _ in range(new):
                    mark("wait for rank 0")
                self.beats, heard, pause = self.beats + new, time.monotonic(), LOOK_S[0]
            if over:
                return json.loads(self.store.get("over"))
            if time.monotonic() - heard > self.ranks.timeout.total_seconds():
                raise RuntimeError(f"rank 0 has done nothing for {time.monotonic() - heard:.0f} s")
            if not told and stop():
                self.store.set("stop", "")
                told = True
            time.sleep(pause)
            pause = min(1.5 * pause, LOOK_S[1])

    def _beats(self) -> int:
        assert self.store is not None
        return int(self.store.get("beats")) if self.store.check(["beats"]) else 0
