"""`speechctl audit`: what sealed work has seen, over all ranks, kills and resumes, and where something is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import rundir
from launcher.audit import Audit, Standing, audit
from launcher.errors import DataError
from tests.conftest import Golden
from tests.ledgers import Made, made
from tests.test_cli import Transcript, compare, speechctl

__all__ = ["speechctl"]

SEED = int(os.environ.get("SPEECHCTL_TEST_SEED", "11"))
COUNT = int(os.environ.get("SPEECHCTL_TEST_COUNT", "20"))
"""Schedules of kills and numbers of ranks: 20 in the suite, 200 for the full claim."""


def random_schedule(root: Path, seed: int) -> Made:
    """Stops and kills anywhere, 1 to 8 ranks, at least two epochs."""
    dice = random.Random(seed)
    it = made(root, dice.randrange(1, 400), seed)
    while not (cursor := it.sealed.get(max(it.sealed, default=0))) or cursor.epoch < 2:
        dies = dice.random() if dice.random() < 0.6 else None
        world_size = dice.choice([1, 2, 3, 4, 8])
        each = dice.choice([0, 1, 2]) if world_size < 8 else 1
        it.attempt(world_size, dice.randrange(1, 12), dice.choice([2, 3, 5, 1000]), each, dies)
    return it


@pytest.mark.parametrize("number", range(COUNT))
def test_any_schedule_sees_each_utterance_once(tmp_path: Path, number: int) -> None:
    it = random_schedule(tmp_path / "run", SEED * 1000 + number)
    result = audit(it.run)
    assert result.discrepancies == []
    assert result.steps == result.sealed == max(it.sealed)
    assert len(result.epochs) >= 3
    for epoch in result.epochs[:-1]:
        assert (epoch.seen, epoch.repeated, epoch.lost) == (it.utterances, 0, 0)
    assert result.epochs[-1].repeated == 0
    stands = sum(s.last - s.first + 1 for s in result.stands)
    done = sum(len(rundir.read_lines(a.metrics)) for a in it.run.attempts())
    assert stands + sum(u.last - u.first + 1 for u in result.undone) == done


# What is wrong, and where --------------------------------------------------------------------------------------------


@pytest.fixture
def it(tmp_path: Path) -> Made:
    """Two ranks are killed in step 9, step 6 sealed; three go on and are killed in step 16 of the second epoch."""
    value = made(tmp_path / "runs" / "stub", 120)
    value.attempt(2, 8, every=3, dies=0.3)
    value.attempt(3, 9, every=3, dies=0.7)
    value.attempt(1, 4)
    return value


def test_two_kills_and_three_worlds(it: Made) -> None:
    result = audit(it.run)
    assert result.discrepancies == []
    assert result.stands == [Standing(1, 2, 1, 6), Standing(2, 3, 7, 15), Standing(3, 1, 16, 19)]
    assert [(u.attempt, u.first, u.last, u.pending) for u in result.undone] == [(1, 7, 8, False)]
    assert [(e.number, e.seen, e.lost) for e in result.epochs] == [(0, 120, 0), (1, 120, 0), (2, 89, None)]


def change(path: Path, step: int, how: Callable[[dict[str, object]], dict[str, object] | None]) -> None:
    kept = [how(row) if row["step"] == step else row for row in rundir.read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept if row is not None))


def ledger(it: Made, attempt: int, rank: int) -> Path:
    return it.run.attempts()[attempt - 1].ledger(rank)


def ids(path: Path, step: int) -> list[str]:
    return next(row["ids"] for row in rundir.read_lines(path) if row["step"] == step)


def first(result: Audit) -> str:
    with pytest.raises(DataError) as caught:
        result.complain()
    return caught.value.message


def test_a_repeated_utterance_is_located(it: Made) -> None:
    again = ids(ledger(it, 1, 0), 2)[0]
    change(ledger(it, 2, 1), 7, lambda row: {**row, "ids": [*row["ids"], again]})  # type: ignore[misc]
    result = audit(it.run)
    assert first(result) == f"attempt 2, rank 1, step 7: {again} is seen again in epoch 0"
    assert (result.epochs[0].repeated, result.epochs[0].lost) == (1, 0)


def test_a_lost_utterance_is_named(it: Made) -> None:
    lost = ids(ledger(it, 1, 1), 3)[0]
    change(ledger(it, 1, 1), 3, lambda row: {**row, "ids": row["ids"][1:]})  # type: ignore[index]
    result = audit(it.run)
    assert first(result) == f"epoch 0: {lost} was not seen in epoch 0"
    assert (result.epochs[0].seen, result.epochs[0].lost) == (119, 1)


def test_an_utterance_that_no_epoch_saw_is_missed(it: Made) -> None:
    lost = ids(ledger(it, 1, 1), 3)[0]
    for attempt in it.run.attempts():
        for path in attempt.ledger_dir.iterdir():
            path.write_text(path.read_text().replace(f'"{lost}", ', "").replace(f', "{lost}"', ""))
    assert first(audit(it.run)) == "epoch 0: 119 utterances were seen in epoch 0, and there are 120 (and 1 more)"


def test_a_line_that_is_missing_or_twice_is_located(it: Made) -> None:
    change(ledger(it, 2, 2), 8, lambda row: None)
    assert first(audit(it.run)).startswith("attempt 2, rank 2, step 8: the ledger has no line for this step")
    text = ledger(it, 1, 0).read_text().splitlines(keepends=True)
    ledger(it, 1, 0).write_text("".join([text[0], *text]))
    assert first(audit(it.run)).startswith("attempt 1, rank 0, step 1: the ledger has two lines for this step")


def test_half_a_line_that_its_writer_closed_is_passed_over(it: Made) -> None:
    """A disk took half of a line and could not give it back; the line was written again behind it."""
    path = ledger(it, 1, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9])
    for line in lines[1:]:
        rundir.append_line(path, json.loads(line))
    assert path.read_bytes().count(b"\n") == len(lines) + 1
    assert audit(it.run).discrepancies == []


def test_a_ledger_that_is_gone_is_missed(it: Made) -> None:
    ledger(it, 1, 1).unlink()
    assert first(audit(it.run)).startswith("attempt 1, rank 1, step 1: the ledger has no line for this step")


def test_a_checkpoint_that_counts_otherwise_is_named(it: Made) -> None:
    """As if the cursor had been saved a step too late: its work would be lost at the next resume."""
    folder = it.run.checkpoint(12)
    shutil.rmtree(folder)
    cursor = it.sealed[12]
    cursor.advance(3, 1)
    it.seal(12, cursor)
    assert re.match(
        r"attempt 2, step 12: the checkpoint says .*\[3, 1, 6\]+}, the ledgers .*\[3, 1, 5\]", first(audit(it.run))
    )


def test_an_attempt_that_is_gone_is_missed(it: Made) -> None:
    shutil.rmtree(it.run.attempts()[1].root)
    assert first(audit(it.run)).startswith("attempt 1, rank 0, step 9: the ledger has no line for this step")


def test_work_after_a_fresh_start_counts_alone(it: Made) -> None:
    """`resume --fresh` puts checkpoints aside: what was before is thrown away, every step of it."""
    for step in it.sealed:
        shutil.rmtree(it.run.checkpoint(step))
    it.sealed.clear()
    it.attempt(2, 5)
    result = audit(it.run)
    assert result.discrepancies == [] and result.stands == [Standing(4, 2, 1, 5)]
    assert [(u.attempt, u.first, u.last) for u in result.undone] == [(1, 1, 8), (2, 7, 15), (3, 16, 19)]


# As text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["audit stub", "audit runs/stub --json"])
def test_it_is_printed(it: Made, arguments: str, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    name = "audit-json" if "--json" in arguments else "audit"
    compare(name, arguments, 0, speechctl, tmp_path, golden)


def test_what_is_wrong_is_printed(it: Made, speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    """Exit 5; the table is there all the same."""
    again = ids(ledger(it, 1, 0), 2)[0]
    change(ledger(it, 2, 1), 7, lambda row: {**row, "ids": [*row["ids"], again]})  # type: ignore[misc]
    compare("audit-repeated", "audit stub", 5, speechctl, tmp_path, golden)


def test_work_that_no_checkpoint_has_is_not_counted(speechctl: Transcript, tmp_path: Path, golden: Golden) -> None:
    made(tmp_path / "runs" / "stub", 120).attempt(2, 3, dies=0.5)
    compare("audit-unsealed", "audit stub", 0, speechctl, tmp_path, golden)
