"""The interval between saves: published and hand-computed numbers, and where its inputs come from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher import cadence, measured, rundir
from launcher.cadence import Saves, Steps, best_interval_s, loss
from launcher.plan import Plan
from launcher.recipe_file import load
from launcher.rundir import Run
from tests.conftest import Golden, Stub, seed
from tests.test_cli import transcript


@pytest.mark.parametrize(
    ("nodes", "stall_s", "restart_s", "interval_s", "kept"),
    [
        # Meta's RSC-1, 6.5 failures in 1,000 days of a node of 8 GPUs; kept by a Monte Carlo simulation.
        (128, 60, 900, 3490, 0.958),
        (128, 5, 900, 1016, 0.982),
        (128, 1, 60, 455, 0.995),
        (2048, 60, 900, 843, 0.758),
        (2048, 5, 900, 251, 0.837),
        (2048, 1, 60, 113, 0.974),
    ],
)
def test_published_numbers(nodes: int, stall_s: float, restart_s: float, interval_s: float, kept: float) -> None:
    mtbf_s, source = cadence.assumed_mtbf(nodes)
    assert source == "assumed: 6.5 failures in 1,000 node-days, as on Meta's RSC-1"
    best = best_interval_s(stall_s, mtbf_s)
    assert best == pytest.approx(interval_s, abs=1)
    assert 1 - loss(best, stall_s, stall_s, mtbf_s, restart_s) == pytest.approx(kept, abs=0.001)


def test_by_hand() -> None:
    """A failure an hour, 2 s a save: sqrt(2 * 2 * 3600) = 120 s, x = sqrt(2 / 7200) = 1/60; to first order 1/60 is
    lost to saves and 60 s of 3,600 to what failures undo."""
    assert best_interval_s(2, 3600) == pytest.approx(120 * (1 + 1 / 180 + 1 / 32400) - 2)
    assert loss(120, 2, 2, 3600) == pytest.approx(2 / 120 + 60 / 3600, rel=0.03)
    # An asynchronous save of the same stall that is durable 36 s later: 36 s more are undone by each failure.
    assert loss(120, 2, 38, 3600) - loss(120, 2, 2, 3600) == pytest.approx(36 / 3600, rel=0.04)
    # One save is in flight at a time: after 10 s of training the next one waits 26 s for it, of which training is idle.
    assert loss(10, 2, 38, 3600) == pytest.approx(1 - 10 / (10 + 2 + 26), rel=0.02)
    assert best_interval_s(8000, 3600) == 3600 and loss(1e9, 1, 1, 60) == 1


def test_nothing_loses_less_than_the_best() -> None:
    dice = random.Random(seed(11))
    for _ in range(300):
        mtbf_s, step_s = 10 ** dice.uniform(3, 7), 10 ** dice.uniform(-2, 1.5)
        stall_s = min(10 ** dice.uniform(-2, 2), mtbf_s / 50)
        saves = Saves(stall_s, stall_s * dice.uniform(1, 20), "")
        made = cadence.cadence(saves, Steps(step_s, ""), mtbf_s, "", every_steps=200, max_steps=10**9)
        assert made.best_every_steps is not None and made.every_steps_loss is not None
        others = [max(1, round(made.best_every_steps * factor)) for factor in (0.2, 0.5, 0.8, 1.25, 2, 5)]
        least = min(loss(n * step_s, saves.stall_s, saves.durable_s, mtbf_s) for n in others)
        assert made.best_loss <= least * 1.002 and made.best_loss <= made.every_steps_loss * 1.002


def test_no_more_steps_than_the_run_has_and_no_fewer_than_one() -> None:
    saves = Saves(60, 60, "")
    made = cadence.cadence(saves, Steps(1, ""), 1e7, "", every_steps=5, max_steps=1000)
    assert (made.best_every_steps, made.best_interval_s) == (1000, 1000)
    made = cadence.cadence(Saves(0, 0, ""), Steps(30, ""), 1e7, "", every_steps=5, max_steps=1000)
    assert (made.best_every_steps, made.best_interval_s) == (1, 30)
    made = cadence.cadence(Saves(0, 0, ""), Steps(None, "none"), 1e7, "", every_steps=5, max_steps=1000)
    assert (made.best_every_steps, made.every_steps_loss, made.best_loss) == (None, None, 0)


# Where the numbers come from ------------------------------------------------------------------------------------------


def trained(run: Run, made: Plan, *, blocked_s: float = 0.5, durable_s: float = 4.0, step_s: float = 2.0) -> None:
    """What a run of this plan leaves of 3 saves and 10 steps, one of each very slow, behind many older lines."""
    run.root.mkdir(parents=True)
    run.resolved.touch()
    rundir.write_json(run.plan, made.to_json())
    old, new = run.new_attempt(), run.new_attempt()
    rundir.write_jsonl(old.events, [{"event": "sealed", "blocked_s": 9.0, "durable_s": 90.0, "bytes": 1}] * 30)
    many: list[dict[str, Any]] = [{"event": "saving", "text": "." * 1000}] * 400
    factors = [1] * 19 + [50]
    rundir.write_jsonl(
        new.events,
        many
        + [
            {"event": "sealed", "blocked_s": blocked_s * k, "durable_s": durable_s * k, "bytes": made.checkpoint_bytes}
            for k in factors
        ],
    )
    rundir.write_jsonl(new.metrics, [{"step": k, "step_s": step_s * (50 if k == 1 else 1)} for k in range(1, 11)])
    with new.metrics.open("a") as file:
        file.write('{"step": 11, "ste')


def test_of_this_run_of_one_like_it_and_of_another(stub: Stub) -> None:
    recipe, made = load(stub.recipe, ["run_dir=" + str(stub.run.root)]), stub.plan()
    before = measured.planned(recipe, made)
    assert before.saves_source.startswith("assumed: 1 GiB/s to host memory") and before.step_s is None
    # Another model on twice the ranks: by size, and nothing is known of steps.
    other = Plan(**{**vars(made), "world_size": 4, "checkpoint_bytes": made.checkpoint_bytes * 8, "parameters": 8000})
    trained(Run(stub.run.root.parent / "big"), other)
    seen = measured.planned(recipe, made)
    assert seen.saves_source == "measured: median of 20 saves of big, by their size"
    assert seen.stall_s == pytest.approx(0.5 / 8 * 4 / 2) and seen.durable_s == pytest.approx(seen.stall_s + 3.5 / 8)
    assert (seen.step_s, seen.every_steps_loss) == (None, None)
    # The same elsewhere, and at last this one.
    trained(Run(stub.run.root.parent / "like"), made, step_s=3)
    seen = measured.planned(recipe, made)
    assert (seen.step_s, seen.step_source) == (3, "measured: median of 10 steps of like")
    trained(stub.run, made, blocked_s=0.25)
    seen = measured.planned(recipe, made, mtbf_s=3600)
    assert (seen.stall_s, seen.durable_s, seen.step_s) == (0.25, 4.0, 2.0)
    assert (seen.saves_source, seen.step_source) == (
        "measured: median of 20 saves of this run",
        "measured: median of 10 steps of this run",
    )
    assert (seen.mtbf_s, seen.mtbf_source) == (3600, "as given")
    # Saves that training waited for tell nothing of those beside it, and the other way round.
    waiting = load(stub.recipe, ["run_dir=" + str(stub.run.root), "checkpoint.asynchronous=false"])
    assert measured.planned(waiting, made).saves_source.startswith("assumed")


def test_what_lies_beside_a_run_does_no_harm(stub: Stub) -> None:
    recipe, made = load(stub.recipe, ["run_dir=" + str(stub.run.root)]), stub.plan()
    for name, text in {"broken": "{", "odd": "[]", "empty": ""}.items():
        run = Run(stub.run.root.parent / name)
        trained(run, made)
        run.plan.write_text(text)
    run = Run(stub.run.root.parent / "torn")
    trained(run, made)
    run.attempts()[-1].events.write_text('[1]\n{"event": "sealed"}\n{"event": "sealed", "blocked_s": "x"}\nx\n')
    run.attempts()[-2].events.unlink()
    assert measured.planned(recipe, made).saves_source.startswith("assumed")


# What a person sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "known"),
    [
        ("plan", ["plan", "stub.yaml"], False),
        ("plan-measured", ["plan", "stub.yaml", "--mtbf", "6h"], True),
        ("plan-json", ["plan", "stub.yaml", "--json"], True),
        ("plan-bad-mtbf", ["plan", "stub.yaml", "--mtbf", "often"], False),
    ],
)
def test_transcripts(name: str, arguments: list[str], known: bool, stub: Stub, tmp_path: Path, golden: Golden) -> None:
    if known:
        trained(stub.run, stub.plan())
    done = stub.speechctl(*arguments)
    done.args = ["python", "-m", "speechctl", *arguments]
    if name == "plan-json" and done.returncode == 0:
        done.stdout = json.dumps(json.loads(done.stdout)["saving"], indent=1) + "\n"
    golden(f"cli/{name}.txt", transcript(done, tmp_path))
