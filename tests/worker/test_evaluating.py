"""What an evaluation leaves behind in training, how ranks wait for rank 0, and when a run ends early."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore

from launcher import recipe as schema
from launcher.worker.cadence import Patience, why_early
from launcher.worker.checkpoint import Progress
from launcher.worker.evaluating import untouched_dice
from launcher.worker.ranks import Ranks
from launcher.worker.waiting import Waiting

# Dice ----------------------------------------------------------------------------------------------------------------


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_training_draws_what_it_would_have_drawn() -> None:
    """From each of the three generators; also where the evaluation seeds them, or raises."""
    with untouched_dice():
        wanted = [draw(), draw()]
    for spoil in (draw, lambda: torch.manual_seed(1), lambda: np.random.seed(2), lambda: random.seed(3)):
        with untouched_dice():
            with untouched_dice():
                spoil()
            assert [draw(), draw()] == wanted
    with untouched_dice():
        with pytest.raises(ValueError, match="boom"), untouched_dice():
            draw()
            raise ValueError("boom")
        assert draw() == wanted[0]


# Waiting -------------------------------------------------------------------------------------------------------------


class Together(Ranks):
    """A rank of several in one process, with a store between them."""

    def __init__(self, rank: int, store: Any, timeout_s: float = 60) -> None:
        self.rank, self.world_size, self._store = rank, 2, store
        self.timeout = timedelta(seconds=timeout_s)

    def store(self, name: str) -> Any:
        return self._store


def both(timeout_s: float = 60) -> tuple[Waiting, Waiting]:
    store = HashStore()
    return Waiting(Together(0, store)), Waiting(Together(1, store, timeout_s))


def test_the_others_wait_for_as_long_as_rank_0_gets_on() -> None:
    """Three times as long as a silence may be, and then they have what it found."""
    first, second = both(timeout_s=2)

    def work() -> None:
        for _ in range(8):
            first.beat("next batch")
            time.sleep(0.8)
        first.over({"criterion": {"wer": 0.25}})

    thread = threading.Thread(target=work)
    thread.start()
    assert second.wait(lambda: False) == {"criterion": {"wer": 0.25}}
    thread.join()


def test_they_do_not_wait_for_one_that_does_nothing() -> None:
    first, second = both(timeout_s=0.1)
    first.beat("next batch")
    with pytest.raises(RuntimeError, match="rank 0 has done nothing for"):
        second.wait(lambda: False)


def test_rank_0_hears_that_another_was_asked_to_stop() -> None:
    first, second = both()
    thread = threading.Thread(target=second.wait, args=(lambda: True,))
    thread.start()
    deadline = time.monotonic() + 30
    while not first.beat("next batch") and time.monotonic() < deadline:
        time.sleep(0.01)
    first.over(None)
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() < deadline


@pytest.mark.parametrize("beats", [0, 1, 5])
def test_of_a_hang_it_is_rank_0_that_is_behind(monkeypatch: pytest.MonkeyPatch, beats: int) -> None:
    """The launcher names the rank with the fewest marks: while rank 0 works, those that wait are one ahead; afterwards
    all have made as many."""
    made = {0: 0, 1: 0}
    for_whom = {"MainThread": 0, "waits": 1}
    monkeypatch.setattr(
        "launcher.worker.waiting.mark",
        lambda at: made.update({(who := for_whom[threading.current_thread().name]): made[who] + 1}),
    )
    first, second = both()
    thread = threading.Thread(target=second.wait, args=(lambda: False,), name="waits")
    thread.start()
    for n in itertools.count():
        deadline = time.monotonic() + 30
        while made[1] < n + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert made == {0: n, 1: n + 1}
        if n == beats:
            break
        first.beat("next batch")
    first.over(None)
    thread.join(30)
    assert made[0] == made[1] == beats + 1


# Early stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "min_delta", "wers", "ends_at"),
    [
        (2, 0.0, [0.5, 0.4, 0.4, 0.4], 4),  # as low is not lower
        (2, 0.0, [0.5, 0.6, 0.4, 0.45, 0.41], 5),
        (3, 0.0, [0.5, 0.6, 0.4, 0.45, 0.41], None),
        (1, 0.0, [0.5, 0.4, 0.3, 0.31], 4),
        (2, 0.05, [0.5, 0.46, 0.44, 0.43], None),  # measured from 0.5, and then from 0.44
        (2, 0.05, [0.5, 0.46, 0.455, 0.3], 3),
        (2, 0.0, [math.nan, math.nan], 2),  # a WER of no words is not lower
        (1, 0.0, [0.5], None),  # the first is the lowest
    ],
)
def test_a_run_ends_after_so_many_evaluations_in_vain(
    patience: int, min_delta: float, wers: list[float], ends_at: int | None
) -> None:
    rules = schema.EarlyStopping(patience=patience, min_delta=min_delta)
    state, ended = Patience(), None
    for number, wer in enumerate(wers, start=1):
        state = Progress.from_json(Progress(patience=state.after(rules, wer)).to_json()).patience  # as after a resume
        if state.is_over(rules):
            ended = number
            break
    assert ended == ends_at
    assert not state.is_over(None)


def test_why_it_ended() -> None:
    options = schema.Evaluate.model_validate(
        {
            "subsets": ["dev-clean", "dev-other"],
            "best_on": "dev-other",
            "every_steps": 1,
            "early_stopping": {"patience": 2, "min_delta": 0.001},
        }
    )
    told = why_early(Patience(0.1234, 2), options)
    assert (
        told == "early stopping: in 2 evaluations the WER on dev-other has not fallen by more than 0.001 below 12.34%"
    )


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"best_on": "dev-other"}, "best_on dev-other is none of the subsets to evaluate on: dev-clean"),
        ({"early_stopping": {"patience": 2}}, "early_stopping needs evaluations"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schema.Evaluate.model_validate({"subsets": ["dev-clean"], **values})


def test_progress_of_before_is_read(tmp_path: Path) -> None:
    """Checkpoints that were sealed before there was early stopping say nothing of it."""
    value = Progress(step=3, best_wer=0.5, best_step=2).to_json()
    for new in ("lowest_wer", "in_vain", "awaiting"):
        del value[new]
    assert Progress.from_json(value) == Progress(step=3, best_wer=0.5, best_step=2)
    rich = Progress(step=3, awaiting=[1, 2], patience=Patience(0.25, 1))
    assert Progress.from_json(rich.to_json()) == rich
