"""Runs without torch in which the real sampler hands out utterances and attempts are killed anywhere."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from launcher import rundir, sealing
from launcher.rundir import Attempt, Run
from launcher.worker.sampler import Cursor, Sampler, accumulation
from tests.conftest import RECIPE

STEP_SECONDS = 250.0


@dataclass
class Made:
    """A run whose directory has what training writes of what it read: events, ledgers, metrics, sealed progress."""

    run: Run
    utterances: int
    seed: int = 1
    sealed: dict[int, Cursor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seconds = np.clip(np.random.default_rng(self.utterances).normal(12.8, 3.8, self.utterances), 1.4, 24.5)
        self.sampler = Sampler(seconds, step_seconds=STEP_SECONDS, seed=self.seed)
        self.run.checkpoints.mkdir(parents=True)
        self.run.resolved.write_text(RECIPE)
        rundir.write_json(self.run.plan, {"name": "stub", "max_steps": 1000})

    def attempt(self, world_size: int, steps: int, every: int = 1000, each: int = 0, dies: float | None = None) -> None:
        """Go on from the newest sealed step for so many steps; each `every`th is sealed, and the last unless it dies.

        Args:
            each: accumulation; 0: as the recipe would have it.
            dies: how far into one more step each rank gets, of those that get anywhere: its line may be whole, torn, or
                not begun.
        """
        each = each or accumulation(STEP_SECONDS, 125, world_size)
        begun = max(self.sealed, default=0)
        cursor = Cursor.from_json(self.sealed[begun].to_json()) if begun else Cursor(0, [])
        attempt = self.run.new_attempt()
        shape = {"world_size": world_size, "accumulation": each, "utterances": self.utterances}
        rundir.append_line(attempt.events, {"event": "started", "time": 1.0, "step": begun, **shape})
        for step in range(begun + 1, begun + steps + 1):
            self.step(attempt, cursor, step, shape)
            if step % every == 0 or (step == begun + steps and dies is None):
                self.seal(step, cursor)
        if dies is not None:
            self.step(attempt, cursor, begun + steps + 1, shape, random.Random(dies))

    def step(
        self, attempt: Attempt, cursor: Cursor, step: int, shape: dict[str, int], dice: random.Random | None = None
    ) -> None:
        world_size, each = shape["world_size"], shape["accumulation"]
        left = self.sampler.steps_left(cursor, world_size, each)
        if not left:
            cursor.epoch, cursor.history = cursor.epoch + 1, []
            left = self.sampler.steps_left(cursor, world_size, each)
        cursor.advance(world_size, each)
        count = 0
        for rank in range(world_size):
            ids = [name(int(i)) for b in left[0][rank::world_size] if not b.filler for i in b.indices]
            line = json.dumps({"step": step, "epoch": cursor.epoch, "ids": ids}) + "\n"
            with attempt.ledger(rank).open("a") as file:
                file.write(line if dice is None else line[: dice.choice([0, len(line) // 2, len(line)])])
            count += len(ids)
        if dice is None:
            row = {"step": step, "epoch": cursor.epoch, "utterances": count, "audio_s": 12.8 * count, "step_s": 0.5}
            rundir.append_line(attempt.metrics, row)

    def seal(self, step: int, cursor: Cursor) -> None:
        self.sealed[step] = Cursor.from_json(cursor.to_json())
        staged = self.run.checkpoints / ".staged"
        staged.mkdir()
        sealing.seal(staged, self.run.checkpoint(step), {"progress": {"step": step, "cursor": cursor.to_json()}}, {})


def name(index: int) -> str:
    return f"{100 + index // 50}-{index // 10}-{index % 10:04d}"


def made(root: Path, utterances: int, seed: int = 1) -> Made:
    return Made(Run(root), utterances, seed)
