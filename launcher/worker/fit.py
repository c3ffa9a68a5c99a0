"""One trial of `speechctl fit`, on one rank: real steps on the hardest micro-batches of one budget, and the hardest
batches of the run's evaluations.

Model, adapters, engine, optimizer and micro-batches are those of training. Its sound is noise, which takes as much
memory as speech; the texts are the packs' own, the longest of each length. Every rank computes on the same shape at
once. What a rank finds is appended to a file as it goes, so that a kill by the kernel leaves what was known.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launcher import recipe_file, rundir
from launcher.errors import ExitCode, PreflightError, SpeechctlError, TrainingError, in_bytes
from launcher.recipe import Evaluate, Recipe
from launcher.worker import learning, vocabularies
from launcher.worker.data import Tensors, pad_to
from launcher.worker.engine import Engine, check_precision
from launcher.worker.evaluate import Evaluator
from launcher.worker.extremes import Extreme, extremes, of_evaluation
from launcher.worker.host_memory import HostMemory
from launcher.worker.learning import Group
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.models import build
from launcher.worker.out_of_memory import first_line, is_of_memory
from launcher.worker.ranks import Ranks
from launcher.worker.sampler import accumulation
from launcher.worker.train import engine_for
from launcher.worker.training_set import TrainingSet

WARM_UP = 30
"""Steps at most until the first update: fp16 scales the loss down from 2^16 for about so many."""

TIMED = 2
"""Steps of the modal shape that are timed; the faster one counts."""


class Trial:
    """One rank of a trial.

    Args:
        folder: what all ranks of this trial share, empty but for DeepSpeed's configuration.
        budget_s: padded seconds, as `batch.max_rank_seconds`.
    """

    def __init__(self, recipe: Recipe, folder: Path, budget_s: float) -> None:
        self.recipe = recipe
        self.folder = folder
        self.budget_s = budget_s
        self.ranks = Ranks()
        self.file = folder / f"rank-{self.ranks.rank}.jsonl"
        self.is_cuda = self.ranks.device.type == "cuda"

    def say(self, **facts: Any) -> None:
        rundir.append_line(self.file, facts)

    def run(self, memory: int | None, headroom: float) -> None:
        recipe, ranks = self.recipe, self.ranks
        check_precision(recipe, ranks.device)
        self.say(**self._limited(memory, headroom))
        self._meet()
        vocabulary = vocabularies.of_recipe(recipe)
        model = learning.prepare(build(recipe.backbone, seed=recipe.seed, vocabulary=vocabulary), recipe)
        batch = recipe.batch
        # The third micro-batch of a step takes no more than the second.
        each = min(2, accumulation(batch.step_seconds, self.budget_s, ranks.world_size))
        config = {**(rundir.read_json(self.folder / "deepspeed.json") or {}), "gradient_accumulation_steps": each}
        self.model = model
        engine = engine_for(model, recipe, each, config, ranks)
        ranks.connect()
        data = TrainingSet.open(recipe, model)
        cut = batch.model_copy(update={"step_seconds": self.budget_s * ranks.world_size})
        sampler = data.sampler(recipe.model_copy(update={"batch": cut}))
        chars = data.utterances.lengths["n_chars"][data.usable].astype(np.int64)
        modal, *others = extremes(sampler, chars, ranks.world_size)
        steps = Steps(engine, recipe, ranks, each)
        self.say(**self._peak())  # of loading and dividing the model
        tensors = self._collated(data, modal)
        self._measured(modal, lambda: steps.warm_up(tensors))  # from here on there are moments
        if recipe.checkpoint.asynchronous and not self.is_cuda:
            kept = HostMemory(copies=True)
            engine.snapshot(kept)  # what a save copies to the memory that is measured here
        if evaluates_on_ranks(recipe.evaluate):
            self._evaluate(engine)
        for shape in others:
            hard = self._collated(data, shape)
            self._measured(shape, lambda hard=hard: steps.one(hard))  # type: ignore[misc]
        self._measured(modal, lambda: min(steps.one(tensors) for _ in range(TIMED)), of_step=each * modal.padded_s)
        ranks.close()

    def _evaluate(self, engine: Engine) -> None:
        """Batches of an evaluation, computed by whom `evaluate.mode` says. They come before the harder steps, so that
        little of the budget is in what they take."""
        evaluator = Evaluator(self.recipe, self.model, self.ranks)
        chars = evaluator.utterances.lengths["n_chars"].astype(np.int64)
        for shape in of_evaluation(evaluator.batches, evaluator.seconds, chars):
            indices = shape.indices  # read in there: that, too, may be too much
            self._measured(shape, lambda indices=indices: self._infer(engine, evaluator.load(indices)))  # type: ignore[misc]

    def _infer(self, engine: Engine, tensors: Tensors) -> None:
        with engine.averaged():
            if self.recipe.evaluate.mode != "rank0":
                engine.infer(tensors)
                return
            model = engine.alone()
            if self.ranks.rank == 0:
                engine.infer(tensors, model)
            self.ranks.barrier()

    def _limited(self, memory: int | None, headroom: float) -> dict[str, Any]:
        """What this rank may use of a GPU, and have torch refuse more; on a CPU, whoever watches this process sees to
        that.

        Raises:
            PreflightError: others leave nothing of it.
        """
        if not self.is_cuda:
            return {"device": "cpu"}
        device = self.ranks.device
        torch.empty(1, device=device)  # the context, too, takes its share
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        others = total - free - held
        limit = int(min(memory or total, total) * (1 - headroom)) - others
        name = torch.cuda.get_device_name(device)
        if limit <= 0:
            raise PreflightError(
                f"{name}: {in_bytes(others)} of {in_bytes(total)} are taken before training begins",
                hint="end what else runs on this GPU (`nvidia-smi` lists it), or give more --memory",
            )
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        return {"device": name, "limit_bytes": limit}

    def _meet(self) -> None:
        """All ranks are on this machine: a file is enough, and no port is open to anybody."""
        ranks = self.ranks
        if self.recipe.zero_stage == "off" and ranks.world_size == 1:
            return
        dist.init_process_group(
            "nccl" if self.is_cuda else "gloo",
            init_method=f"file://{self.folder / 'meeting'}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=ranks.timeout,
        )

    def _collated(self, data: TrainingSet, shape: Extreme) -> Tensors:
        model, items = self.model, shape.indices.tolist()
        dice = np.random.default_rng(self.recipe.seed)
        samples = round(shape.seconds * SAMPLE_RATE_HZ)
        sound = [dice.normal(0, 0.1, samples).astype(np.float32) for _ in items]
        texts = [str(data.utterances.row(int(data.usable[item]))["text"]) for item in items]
        tensors = pad_to(model.collate(sound, texts), samples)
        return model.augment(tensors, [data.dice(item, 0) for item in items])

    def _measured(self, shape: Extreme, work: Callable[[], Any], of_step: float | None = None) -> None:
        """Do it, and say what it took. No rank begins while another may yet run out of memory in what came before."""
        about = {
            "shape": shape.name,
            "utterances": len(shape.indices),
            "seconds": round(shape.seconds, 3),
            "chars": shape.chars,
        }
        self.ranks.barrier()
        self.say(begins=about)
        self._reset_peak()
        step_s = work()
        self.say(**about, **self._peak(), **({} if of_step is None else {"step_s": step_s, "padded_s": of_step}))

    def _reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.ranks.device)
        with suppress(OSError):  # then it is the peak of all so far
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> dict[str, int]:
        """`peak_bytes` of the device, and `host_peak_bytes`; of a GPU also `allocated_bytes`, without what torch keeps
        for later."""
        found = re.search(r"(?m)^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text())
        host = int(found[1]) * 1024 if found else 0
        if not self.is_cuda:
            return {"peak_bytes": host, "host_peak_bytes": host}
        device = self.ranks.device
        return {
            "peak_bytes": torch.cuda.max_memory_reserved(device),
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "host_peak_bytes": host,
        }


class Steps:
    """Optimizer steps of one engine, all of the same micro-batch."""

    def __init__(self, engine: Engine, recipe: Recipe, ranks: Ranks, each: int) -> None:
        self.engine = engine
        self.each = each
        self.ranks = ranks
        self.moments = moments(engine.groups, recipe.max_steps)
        self.done = hardest_step(engine.groups, recipe.max_steps)

    def one(self, tensors: Tensors) -> float:
        """How long it took. The learning rate is 0: the steps are about memory, and each is to find what the last one
        found."""
        engine = self.engine
        began = time.monotonic()
        engine.begin(self.done)
        for number in range(self.each):
            engine.model.begin(self.done, number)
            engine.backward(tensors, 1 / len(tensors["inputs"]), last=number == self.each - 1)
        self.updated = math.isfinite(engine.step(0.0))
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return time.monotonic() - began

    def warm_up(self, tensors: Tensors) -> None:
        """Updates at every moment, those of the hardest step last: what is frozen by then has its moments from before,
        or will have them besides.

        Raises:
            TrainingError: no step has a finite gradient.
        """
        hardest = self.done
        for moment in (*(m for m in self.moments if m != hardest), hardest):
            self.done = moment
            self._update(tensors)

    def _update(self, tensors: Tensors) -> None:
        for _ in range(WARM_UP):
            self.one(tensors)
            if self.updated:
                return
        raise TrainingError(
            f"none of {WARM_UP} steps had a loss and a gradient that are finite",
            hint="look at the backbone and at `precision`; `speechctl launch --debug RECIPE` shows one process",
        )


def evaluates_on_ranks(cadence: Evaluate) -> bool:
    """Whether a run evaluates in the memory that it trains in."""
    ever = cadence.at_start or cadence.at_end or cadence.every_steps or cadence.every_epochs or cadence.every_minutes
    return cadence.mode != "sidecar" and bool(ever)


def moments(groups: Sequence[Group], max_steps: int) -> list[int]:
    """How many steps are done when what learns changes, and at the beginning."""
    found = {0, *(m for g in groups for f in g.frozen for m in (f.after_steps, f.until_steps) if m is not None)}
    return sorted(m for m in found if m < max_steps)


def hardest_step(groups: Sequence[Group], max_steps: int) -> int:
    """How many steps are done when most of the model learns at once: what is frozen by then has no gradients."""
    learns = {
        m: sum(p.numel() for g in groups if not g.is_frozen(m) for p in g.parameters)
        for m in moments(groups, max_steps)
    }
    return max(learns, key=lambda m: learns[m])


def fit(options: argparse.Namespace) -> int:
    """A trial, to its end; 77 where memory ran out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel is to take a trial before anything else
    trial = Trial(recipe_file.load(options.recipe), options.folder, options.budget)
    try:
        trial.run(options.memory, options.headroom)
    except BaseException as error:
        if isinstance(error, SpeechctlError):
            print(error.render(), file=sys.stderr, flush=True)
            code = int(error.exit_code)
        elif is_of_memory(error):
            trial.say(out_of_memory=first_line(error))
            code = int(ExitCode.OUT_OF_MEMORY)
        else:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)  # not by way of destructors: a process group whose peers are gone can hang there
    return 0
