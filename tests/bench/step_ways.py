"""One rank of `tests.bench.step`: the loops, and the CPU time of each.

torchrun … step_ways.py FOLDER WAY ROUNDS STEPS
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launcher import plan, recipe_file, rundir
from launcher.recipe import Recipe
from launcher.rundir import Run
from launcher.worker import train
from launcher.worker.learning import groups
from launcher.worker.models import build
from launcher.worker.pack import write_pack
from launcher.worker.waits import TIMED
from tests.conftest import make_corpus

LOG_EVERY = 1

Loop = Callable[[int], None]
"""Trains so many steps."""


def made(folder: Path, way: str) -> Recipe:
    rank = os.environ["RANK"]
    corpus = make_corpus(folder / f"corpus-{rank}")
    (folder / f"packs-{rank}").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, folder / f"packs-{rank}" / subset, 2**20, 1, lambda _: None)
    return Recipe.model_validate(
        {
            "name": "bench",
            "run_dir": folder / "run",
            "data": {"corpus": corpus, "packs": folder / f"packs-{rank}", "train": ["train-clean-100"]},
            "backbone": {"kind": "tiny-ctc", "hidden": 32, "layers": 2, "dropout": 0.0, "spec_augment": False},
            "zero_stage": way if way == "off" else int(way),
            "max_steps": 10**6,
            "batch": {"step_seconds": 4.0 * int(os.environ["WORLD_SIZE"]), "max_rank_seconds": 4},
            "optimizer": {"learning_rate": 1e-4},
            "evaluate": {"subsets": ["dev-clean"]},
            "checkpoint": {"every_steps": 10**6},
        }
    )


class Bench:
    def __init__(self, folder: Path, way: str) -> None:
        self.recipe = recipe = made(folder, way)
        run = Run(recipe.run_path)
        if os.environ["RANK"] == "0":
            for path in (run.root, run.checkpoints, run.stop_request.parent):
                path.mkdir()
            rundir.write_bytes(run.resolved, recipe_file.dump(recipe).encode())
            rundir.write_json(run.deepspeed, plan.deepspeed_config(recipe, 1, 10**5))
            run.new_attempt()
        while not run.attempts():
            time.sleep(0.1)
        time.sleep(0.5)
        self.training = train.Training(run.attempts()[0], [False], fresh=False)
        self.world_size = self.training.ranks.world_size
        self.step = self.training.begin_epoch()[0]
        loaded = self.training._load(0, self.step[self.training.ranks.rank])
        self.ids, self.batch = loaded
        self.count = sum(len(b.indices) for b in self.step)
        self.feed = itertools.repeat(loaded)
        self.config = {**plan.deepspeed_config(recipe, 1, 10**5)}

    # The loops -------------------------------------------------------------------------------------------------------

    def ours(self, steps: int) -> None:
        for _ in range(steps):
            self.training.one_step(self.step, self.feed)

    def optimizer(self, model: Any) -> torch.optim.AdamW:
        of = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups(model, self.recipe)]
        return torch.optim.AdamW(of, lr=1e-4, betas=(0.9, 0.98), eps=1e-8)

    def model(self) -> Any:
        return build(self.recipe.backbone, seed=1).train()

    def bare(self) -> Loop:
        model = self.model()
        if self.world_size > 1:
            wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
        else:
            wrapped = model
        optimizer = self.optimizer(model)
        factor = self.world_size / self.count

        def loop(steps: int) -> None:
            for _ in range(steps):
                losses, _ = wrapped(self.batch)
                total = losses.sum()
                (total * factor).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                log(float(total))

        return loop

    def deepspeed(self) -> Loop:
        import deepspeed

        model = self.model()
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=self.optimizer(model), config=copy.deepcopy(self.config)
        )
        factor = self.world_size / self.count
        backend = deepspeed.comm.comm.cdb

        def loop(steps: int) -> None:
            for name in TIMED:
                setattr(backend, name, getattr(backend, name).untimed)
            for _ in range(steps):
                losses, _ = engine(self.batch)
                total = losses.sum()
                engine.backward(total * factor)
                engine.step()
                log(float(total))
            self.training.engine.waits.time_calls(backend)

        return loop

    def accelerate(self) -> Loop:
        accelerator = self.training.engine.accelerator  # type: ignore[attr-defined]  # a process has one
        model = self.model()
        wrapped, optimizer = accelerator.prepare(model, self.optimizer(model))
        factor = self.world_size / self.count

        def loop(steps: int) -> None:
            for _ in range(steps):
                with accelerator.accumulate(wrapped):
                    losses, _ = wrapped(self.batch)
                    total = losses.sum()
                    accelerator.backward(total * factor)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                log(float(total))

        return loop

    def trainer(self, folder: Path) -> Loop:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        bench = self

        class Whole(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = bench.model()

            def forward(self, **tensors: Any) -> dict[str, torch.Tensor]:
                return {"loss": self.inner(tensors)[0].mean()}

        class Clock(TrainerCallback):  # type: ignore[misc]
            """From the first step to the last: the beginning of a training is not a step's."""

            began = ended = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = self.began or time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.ended = time.process_time()

        model = Whole()
        optimizer = self.optimizer(model.inner)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

        def loop(steps: int) -> None:
            arguments = TrainingArguments(
                output_dir=str(folder / "trainer"),
                max_steps=steps,
                per_device_train_batch_size=1,
                report_to=[],
                logging_steps=LOG_EVERY,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
                dataloader_num_workers=0,
                max_grad_norm=1.0,
            )
            clock = Clock()
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=[self.batch] * steps,
                data_collator=lambda rows: rows[0],
                optimizers=(optimizer, rate),
                callbacks=[clock],
            )
            trainer.log = lambda logs, *_, **__: log(logs.get("loss", 0.0))
            trainer.train()
            self.clocked = clock.ended - clock.began

        return loop


LOGGED: list[float] = []


def log(loss: float) -> None:
    LOGGED.append(loss)


def main() -> int:
    folder, way, rounds, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    bench = Bench(folder, way)
    if way == "off":
        loops: dict[str, Loop] = {"bare": bench.bare(), "speechctl": bench.ours, "bare again": bench.bare()}
        loops["Accelerate"] = bench.accelerate()
        if bench.world_size == 1:
            loops["Trainer"] = bench.trainer(folder)
    else:
        loops = {"bare": bench.deepspeed(), "speechctl": bench.ours, "bare again": bench.deepspeed()}
    result: list[dict[str, float]] = []
    for number in range(rounds + 1):
        row = {}
        for name, loop in loops.items() if number % 2 else reversed(loops.items()):
            bench.clocked = math.nan
            bench.training.ranks.barrier()
            began = time.process_time()
            loop(steps)
            took = time.process_time() - began
            row[name] = 1000 * (took if math.isnan(bench.clocked) else bench.clocked) / steps
        if number:  # the first is for caches
            result.append({name: row[name] for name in loops})
    if bench.training.ranks.rank == 0:
        (folder / f"{way}.json").write_text(json.dumps(result))
    bench.training.ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
