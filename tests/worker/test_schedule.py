"""Learning rates against the libraries that people know them from, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from launcher.recipe_optimization import Schedule
from launcher.worker import shims
from launcher.worker.schedule import learning_rate


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate(schedule, 3e-5, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_linear_and_cosine_are_those_of_transformers(kind: str) -> None:
    shims.apply()
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-5)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=30, num_training_steps=200)
    expected = []
    for _ in range(200):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    schedule = Schedule(kind=kind, warmup=30)  # type: ignore[arg-type]
    assert rates(schedule, 200) == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert rates(Schedule(kind=kind, warmup=0.15), 200) == rates(schedule, 200)  # type: ignore[arg-type]


def test_tri_stage_is_fairseqs() -> None:
    """fairseq, optim/lr_scheduler/tri_stage_lr_scheduler.py: decay_factor = -log(final_lr_scale) / decay_steps."""
    found = rates(Schedule(warmup=0.1, hold=0.4), 1000)
    assert found[0] == pytest.approx(3e-5 * 0.01)
    assert found[50] == pytest.approx(3e-5 * (0.01 + 0.99 * 0.5))
    assert found[100] == found[499] == found[500] == 3e-5
    assert found[750] == pytest.approx(3e-5 * math.exp(math.log(0.05) * 0.5))
    assert found[999] == pytest.approx(3e-5 * math.exp(math.log(0.05) * 499 / 500))


@pytest.mark.parametrize("kind", ["tri-stage", "linear", "cosine"])
def test_a_run_that_is_all_climb_and_hold_stays_at_the_peak(kind: str) -> None:
    schedule = Schedule(kind=kind, warmup=10, hold=90)  # type: ignore[arg-type]
    assert rates(schedule, 100)[10:] == [3e-5] * 90
