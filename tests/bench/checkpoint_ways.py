"""One rank of `tests.bench.checkpoint`: a real engine, and every way to save its state, timed.

torchrun … checkpoint_ways.py FOLDER RECIPE STAGE RUNS
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from launcher import recipe_file
from launcher.committer import Outcome
from launcher.plan import deepspeed_config
from launcher.recipe import Checkpoint
from launcher.rundir import Run
from launcher.worker.checkpoint import Checkpoints, Identity, Progress
from launcher.worker.engine_deepspeed import DeepSpeedEngine
from launcher.worker.models import build
from launcher.worker.ranks import Ranks

PIECE = 4 << 20

Times = tuple[float, float]
"""When training could go on and when everything was durable, both on the machine's monotonic clock."""

Way = Callable[[Path], Times]
"""Saves into a new directory."""

ALL = {"data_parallel": "replica"}
"""The default, none, raises AttributeError: 'UniversalParallelInfo' object has no attribute 'dp_rank'."""

DEEPSPEEDS: dict[str, dict[str, Any] | None] = {
    "DeepSpeed torch": None,
    "DeepSpeed fast": {"type": "fast", **ALL},
    "DeepSpeed fast, python writer": {"type": "python", **ALL},
    "DeepSpeed decoupled": {"type": "fast", "decoupled": True, **ALL},
    "DeepSpeed decoupled, python writer": {"type": "python", "decoupled": True, **ALL},
}
"""Its own engines, by the `writer` of its configuration."""


class Keep(CheckpointEngine):  # type: ignore[misc]
    """Keeps what DeepSpeed wants saved, by its path: this rank's state, for those that save it without DeepSpeed."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def preserves_storage_sharing(self) -> bool:
        return False

    def save(self, state_dict: Any, path: str) -> None:
        self.states[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("nothing is loaded here")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def tensors_of(state: Any) -> list[Tensor]:
    """Each once, in the order of a pickle."""
    found: dict[int, Tensor] = {}

    def see(value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        found[id(value)] = value.detach()
        return id(value)

    pickler = pickle.Pickler(io.BytesIO())
    pickler.persistent_id = see  # type: ignore[method-assign]
    pickler.dump(state)
    return list(found.values())


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def cpu_s() -> float:
    """Of this rank and of the processes it keeps for saving."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Bench:
    def __init__(self, folder: Path, recipe: Path, stage: int) -> None:
        self.folder = folder
        self.ranks = Ranks()
        value = recipe_file.load(recipe)
        model = build(value.backbone, seed=1)
        trained = sum(p.numel() for p in model.parameters())
        self.engine = DeepSpeedEngine(model, value, deepspeed_config(value, 1, trained), self.ranks)
        self.ranks.connect()
        sound = [np.random.default_rng(self.ranks.rank).standard_normal(16000).astype("float32")]
        self.batch = model.collate(sound, ["HELLO"])
        self.count = 0
        self.sealed = 0.0
        self.deepspeed = self.engine.engine
        self.step()  # the optimizer's state comes to be
        self.group = dist.new_group(backend="gloo")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.checkpoints = {asynchronous: self._ours(stage, asynchronous) for asynchronous in (True, False)}
        self.checkpoints[True].warm()  # as training does
        self.memory = {name: [torch.zeros_like(t) for t in ts] for name, ts in self.tensors().items()}
        self.bytes = sum(t.numel() * t.element_size() for ts in self.memory.values() for t in ts)
        self.theirs: dict[str, tuple[Any, bool]] = {}
        self.cannot: dict[str, str] = {}

    def _ours(self, stage: int, asynchronous: bool) -> Checkpoints:
        run = Run(self.folder / f"run-{asynchronous}")
        if self.ranks.rank == 0:
            run.checkpoints.mkdir(parents=True)
            run.new_attempt()
        self.ranks.barrier()
        same = {"backbone": "b", "packs": "p", "evaluation": "e", "order": "o"}
        identity = Identity(world_size=self.ranks.world_size, zero_stage=str(stage), precision="fp32", **same)
        options = Checkpoint(every_steps=1, asynchronous=asynchronous)
        return Checkpoints(run.attempts()[-1], self.engine, self.ranks, identity, options, on_sealed=self._sealed)

    def _sealed(self, outcome: Outcome) -> None:
        self.sealed = time.monotonic()

    def step(self) -> None:
        self.engine.backward(self.batch, 1.0, last=True)
        self.engine.step(1e-4)

    # What is saved ---------------------------------------------------------------------------------------------------

    @contextmanager
    def saving_by(self, engine: Any, everywhere: bool = False) -> Iterator[None]:
        """DeepSpeed saves by this engine of its own. `everywhere`: every rank writes the model's file."""
        before = self.deepspeed.checkpoint_engine, self.deepspeed.save_non_zero_checkpoint
        self.deepspeed.checkpoint_engine = engine
        self.deepspeed.save_non_zero_checkpoint = before[1] or everywhere
        try:
            yield
        finally:
            self.deepspeed.checkpoint_engine, self.deepspeed.save_non_zero_checkpoint = before

    def states(self) -> dict[str, Any]:
        keep = Keep()
        with self.saving_by(keep):
            self.deepspeed.save_checkpoint("/nowhere", tag="x", save_latest=False)
        return keep.states

    def tensors(self) -> dict[str, list[Tensor]]:
        return {name: tensors_of(state) for name, state in self.states().items()}

    # The references --------------------------------------------------------------------------------------------------

    def host_copy(self) -> Way:
        """Each tensor into memory of its own that was used before."""
        tensors = self.tensors()

        def way(_: Path) -> Times:
            for name, those in tensors.items():
                for mine, tensor in zip(self.memory[name], those, strict=True):
                    mine.copy_(tensor)
            return (time.monotonic(),) * 2

        return way

    def write_fsync(self) -> Way:
        """The same bytes into as many files, one fsync each."""

        def way(folder: Path) -> Times:
            for name, those in self.memory.items():
                fd = os.open(folder / f"{self.ranks.rank}-{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                for tensor in those:
                    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
                    while len(rest):
                        rest = rest[os.write(fd, rest[:PIECE]) :]
                os.fsync(fd)
                os.close(fd)
            return (time.monotonic(),) * 2

        return way

    # Ours ------------------------------------------------------------------------------------------------------------

    def ours(self, asynchronous: bool) -> Way:
        them = self.checkpoints[asynchronous]
        self.count += 1

        def way(_: Path) -> Times:
            them.begin(Progress(step=self.count))
            blocked = time.monotonic()
            outcome = them.settle()
            assert not outcome.error, outcome.error
            durable = self.sealed if self.ranks.rank == 0 else 0.0
            return (blocked if asynchronous else time.monotonic(), durable)

        return way

    # Others ----------------------------------------------------------------------------------------------------------

    def torch_save(self) -> Way:
        states = self.states()

        def way(folder: Path) -> Times:
            for name, state in states.items():
                with open(folder / f"{self.ranks.rank}-{name}", "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            return (time.monotonic(),) * 2

        return way

    def add_deepspeeds(self, name: str, writer: dict[str, Any] | None) -> None:
        """One of DeepSpeed's own engines, as its configuration would make it; or why it cannot save this state."""
        before = self.deepspeed.checkpoint_engine, self.deepspeed.save_non_zero_checkpoint
        engine, why = None, ""
        try:
            given = {"checkpoint": {} if writer is None else {"writer": writer}}
            self.deepspeed._config.checkpoint_config = get_checkpoint_config(given)
            self.deepspeed.save_non_zero_checkpoint = False
            self.deepspeed._configure_checkpointing()
            engine = self.deepspeed.checkpoint_engine
            self.theirs[name] = (engine, self.deepspeed.save_non_zero_checkpoint)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        self.deepspeed.checkpoint_engine, self.deepspeed.save_non_zero_checkpoint = before
        if not (why := next((one for one in self.ranks.gather(why) if one), "")):
            try:
                self.measure(partial(self.deepspeeds, name))
                return
            except Exception as error:  # on both ranks, or the bench ends by its time limit
                why = f"{type(error).__name__}: {error}"
                shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        self.theirs.pop(name, None)
        self.cannot[name] = self.ranks.gather(why)[0]
        if engine is not None:
            engine.cleanup()

    def deepspeeds(self, name: str) -> Way:
        """DeepSpeed fsyncs nothing but in its aio writer; here this rank's files are, once training could go on. A
        decoupled one lets it go on as far as the end of the next step, where it waits for the whole write."""
        engine, everywhere = self.theirs[name]

        def way(folder: Path) -> Times:
            with self.saving_by(engine, everywhere):
                self.deepspeed.save_checkpoint(str(folder), tag="x")
                blocked = time.monotonic()
                if engine.is_decoupled():
                    self.deepspeed._commit_decoupled_checkpoint()
            for path in (folder / "x").iterdir():
                if ("rank_1_" in path.name) == (self.ranks.rank == 1):
                    sync(path)
            return (blocked, time.monotonic())

        return way

    def dcp_async(self) -> Way:
        """`async_save` with one stager that keeps its memory, and files fsynced: its best."""
        state = {f"rank-{self.ranks.rank}": self.states()}

        def way(folder: Path) -> Times:
            writer = FileSystemWriter(folder, sync_files=True)
            future = async_save(state, storage_writer=writer, process_group=self.group, async_stager=self.stager)
            blocked = time.monotonic()
            future.result()  # type: ignore[union-attr]
            return (blocked, time.monotonic())

        return way

    # Timing ----------------------------------------------------------------------------------------------------------

    def measure(self, make: Callable[[], Way]) -> dict[str, float]:
        """Seconds until the last rank could go on and until the last byte of all ranks was durable, in fresh files,
        with nothing of earlier ones left to write; CPU seconds of all ranks."""
        way = make()
        folder = self.folder / "fresh"
        if self.ranks.rank == 0:
            folder.mkdir()
            os.sync()
        self.ranks.barrier()
        began, cpu = time.monotonic(), cpu_s()
        blocked, durable = way(folder)
        self.ranks.barrier()
        rows = self.ranks.gather([began, blocked, durable, cpu_s() - cpu])
        if self.ranks.rank == 0:
            shutil.rmtree(folder)
        self.ranks.barrier()
        began = min(row[0] for row in rows)
        return {
            "blocked_s": max(row[1] for row in rows) - began,
            "durable_s": max(row[2] for row in rows) - began,
            "cpu_s": sum(row[3] for row in rows),
        }

    def references(self) -> tuple[float, float]:
        return self.measure(self.host_copy)["blocked_s"], self.measure(self.write_fsync)["durable_s"]

    def round(self, ways: Mapping[str, Callable[[], Way]], order: list[str]) -> dict[str, dict[str, float]]:
        """Every way once, each with the mean of the references before and after it."""
        rows = {}
        before = self.references()
        for name in order:
            took = self.measure(ways[name])
            after = self.references()
            copy_s, write_s = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            rows[name] = {**took, "copy_s": copy_s, "write_s": write_s}
            before = after
            if self.ranks.rank == 0:
                print(name, {what: round(s, 3) for what, s in rows[name].items()}, flush=True)
        return {name: rows[name] for name in ways}

    def beside(self) -> dict[str, float]:
        """Seconds of a training step alone, and while our save is written."""
        alone = [self._step_s() for _ in range(3)]
        during: list[float] = []
        self.count += 1
        them = self.checkpoints[True]
        them.begin(Progress(step=self.count))
        while not during or not all(self.ranks.gather(them.done)):
            during.append(self._step_s())
        outcome = them.settle()
        assert not outcome.error, outcome.error
        return {"alone_s": float(np.median(alone)), "during_s": float(np.median(during))}

    def _step_s(self) -> float:
        began = time.monotonic()
        self.step()
        self.ranks.barrier()
        return time.monotonic() - began


def main(folder: Path, recipe: Path, stage: int, runs: int) -> None:
    bench = Bench(folder, recipe, stage)
    ways: dict[str, Callable[[], Way]] = {
        "speechctl": partial(bench.ours, True),
        "speechctl, synchronous": partial(bench.ours, False),
        "torch.save + fsync": bench.torch_save,
        "torch DCP async_save": bench.dcp_async,
    }
    for name, writer in DEEPSPEEDS.items():
        bench.add_deepspeeds(name, writer)
        if name in bench.theirs:
            ways[name] = partial(bench.deepspeeds, name)
    rounds, beside = [], []
    for k in range(runs + 1):
        order = list(ways)
        random.Random(k).shuffle(order)
        rounds.append(bench.round(ways, order))
        beside.append(bench.beside())
    sizes = bench.ranks.gather(bench.bytes)
    if bench.ranks.rank == 0:
        result = {"bytes": sizes, "rounds": rounds, "beside": beside, "cannot": bench.cannot}
        (folder / "seen.json").write_text(json.dumps(result))
    for engine, _ in bench.theirs.values():
        engine.cleanup()
    bench.ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
