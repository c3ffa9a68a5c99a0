"""Who computes an evaluation during training: all ranks, rank 0 alone, or a process beside it. The WER is the same.

Nothing of it reaches training: the generators that training draws from are afterwards what they were before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from launcher.errors import StorageError
from launcher.marks import mark
from launcher.recipe import Recipe
from launcher.rundir import Attempt
from launcher.worker.checkpoint import rng_state, set_rng_state
from launcher.worker.engine import Engine
from launcher.worker.evaluate import Evaluator, Row
from launcher.worker.ranks import Ranks
from launcher.worker.sidecar import Outcome, Sidecar
from launcher.worker.waiting import Waiting

Stop = Callable[[], bool]
"""Whether this rank was asked to break off."""

AGAIN_S = 1.0
"""While all wait for the sidecar: how often rank 0 says that it has looked. The sidecar has deadlines of its own."""


def _short(outcome: Outcome) -> list[Any]:
    """What rank 0 tells the others."""
    return [outcome.step, outcome.result and {"criterion": outcome.result["criterion"]}, outcome.error]


@contextmanager
def untouched_dice() -> Iterator[None]:
    """Whatever is drawn inside, training goes on with the numbers that it would have drawn."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


class Evaluations:
    """One rank's part in the evaluations of its run. All ranks call the same methods in the same order."""

    def __init__(self, attempt: Attempt, recipe: Recipe, engine: Engine, ranks: Ranks, evaluator: Evaluator) -> None:
        self.attempt = attempt
        self.mode = recipe.evaluate.mode
        self.engine = engine
        self.ranks = ranks
        self.evaluator = evaluator
        self.sidecar: Sidecar | None = None
        if self.mode == "sidecar" and ranks.rank == 0:
            self.sidecar = Sidecar(attempt, recipe.evaluate, recipe.launch.deadlines)

    def now(self, step: int, stop: Stop) -> Outcome | None:
        """Evaluate the weights of now, or their moving average where the run keeps one, by all ranks or by rank 0
        alone, and publish the result. A disk that does not take it costs this evaluation, and no step.

        Returns:
            what came of it; on other ranks than 0 no more of a result than its `criterion`. None on all where one was
            asked to break off.
        """
        began = time.monotonic()
        with untouched_dice(), self.engine.averaged():
            if self.mode == "rank0":
                return self._by_rank_0(step, began, stop)
            rows = self.evaluator.compute(self.engine.infer, stop)
            if rows is None:
                return None
            mark("score")
            mine = self._publish(step, began, rows) if self.ranks.rank == 0 else None
            said = self.ranks.gather(None if mine is None else _short(mine))[0]
            assert said is not None
            return mine or Outcome(*said)

    def _by_rank_0(self, step: int, began: float, stop: Stop) -> Outcome | None:
        mark("collect")
        model = self.engine.alone()
        waiting = Waiting(self.ranks)
        if self.ranks.rank != 0:
            said = waiting.wait(stop)
            return None if said is None else Outcome(*said)
        rows = self.evaluator.alone(
            lambda tensors: self.engine.infer(tensors, model), lambda: waiting.beat("next batch") or stop()
        )
        if rows is None:
            waiting.over(None)
            return None
        waiting.beat("score")
        mine = self._publish(step, began, rows)
        waiting.over(_short(mine))
        return mine

    def _publish(self, step: int, began: float, rows: Sequence[Row]) -> Outcome:
        target, blocked_s = self.attempt.run.evaluation(step), time.monotonic() - began
        try:
            return Outcome(step, self.evaluator.publish(target, step, rows, self.attempt.number, blocked_s))
        except StorageError as error:
            for path in (target, self.attempt.run.hypotheses(step)):  # of an older attempt, whose step came to nothing
                with suppress(OSError):
                    path.unlink()
            return Outcome(step, None, error.message)

    # Beside training -------------------------------------------------------------------------------------------------

    def give(self, step: int) -> None:
        """The checkpoint of `step` is sealed: have it evaluated. Rank 0's alone; the others do nothing."""
        if self.sidecar is not None:
            self.sidecar.give(step)

    def look(self) -> Outcome | None:
        """What came of the next evaluation that is over; on other ranks than 0 nothing."""
        return None if self.sidecar is None else self.sidecar.look()

    def wait(self, stop: Stop) -> list[Outcome] | None:
        """What came of all that was given, on all ranks, in the order in which it came; the others have no more of a
        result than its `criterion`. None where a rank was asked to break off."""
        waiting = Waiting(self.ranks)
        if self.sidecar is None:
            said = waiting.wait(stop)
            return None if said is None else [Outcome(*row) for row in said]
        outcomes: list[Outcome] = []
        heard = -AGAIN_S
        while not self.sidecar.idle:
            if time.monotonic() - heard >= AGAIN_S:
                heard = time.monotonic()
                if waiting.beat("wait for the sidecar") or stop():
                    waiting.over(None)
                    return None
            if (outcome := self.sidecar.look()) is not None:
                outcomes.append(outcome)
            else:
                time.sleep(0.05)
        waiting.over([_short(outcome) for outcome in outcomes])
        return outcomes

    def close(self) -> None:
        if self.sidecar is not None:
            self.sidecar.close()
