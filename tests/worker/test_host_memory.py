"""What is written is what was there when it was taken, whatever training does meanwhile."""

from __future__ import annotations

import io
import resource
import signal
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import sealing
from launcher.committer import File, Sink, write_hashed
from launcher.recipe import Checkpoint
from launcher.rundir import Attempt, Run
from launcher.worker.checkpoint import Checkpoints, Identity, Progress
from launcher.worker.data import Tensors
from launcher.worker.engine import Engine
from launcher.worker.engine_deepspeed import CheckpointFiles
from launcher.worker.host_memory import HostMemory
from launcher.worker.ranks import Ranks

IDENTITY = Identity(world_size=1, zero_stage="2", precision="fp32", backbone="b", packs="p", evaluation="e", order="o")


class Scale:
    """As DeepSpeed's loss scaler: an object in the state that training changes."""

    def __init__(self) -> None:
        self.value = 1.0


def state_of(flat: torch.Tensor) -> dict[str, Any]:
    """Views of one flat buffer, tied weights, a scalar, nothing, and what is no tensor."""
    model = OrderedDict(a=flat[:6].view(2, 3), b=flat[6:8], tied=flat[6:8], turned=flat[:6].view(2, 3).t())
    model._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(2))
    return {"model": model, "step": torch.tensor(5), "none": torch.empty(0), "p": parameter, "list": [1, Scale()]}


def written(file: File) -> Any:
    out = io.BytesIO()
    file.write(out)
    assert file.size <= len(out.getvalue())
    out.seek(0)
    return torch.load(out, weights_only=False)


def test_a_copy_is_of_its_moment_and_its_memory_is_used_again() -> None:
    flat = torch.arange(10.0)
    memory = HostMemory(copies=True)
    places = []
    for _ in range(2):
        expected = flat.clone()
        state = state_of(flat)
        file = memory.file("x.pt", state)
        places.append([t.data_ptr() for t in memory._kept.values()])
        flat.mul_(-3).add_(100)  # in place, as an optimizer does
        state["step"].fill_(-1)
        state["p"].data.fill_(-1)
        state["list"][1].value = -1.0
        state["list"][0] = -1
        state["model"]["new"] = torch.ones(1)
        found = written(file)
        assert torch.equal(found["model"]["a"], expected[:6].view(2, 3))
        assert torch.equal(found["model"]["turned"], expected[:6].view(2, 3).t())
        assert torch.equal(found["model"]["tied"], expected[6:8])
        assert found["model"]["tied"].data_ptr() == found["model"]["b"].data_ptr()
        assert found["model"]._metadata == {"": {"version": 2}}
        assert sorted(found["model"]) == ["a", "b", "tied", "turned"]
        assert int(found["step"]) == 5 and found["none"].shape == (0,)
        assert torch.equal(found["p"], torch.ones(2))
        assert found["list"][0] == 1 and found["list"][1].value == 1.0
    assert places[0] == places[1]


def test_a_copy_of_a_view_is_of_the_view_alone() -> None:
    """DeepSpeed need not clone views before they get here: the weights were copied twice, once into fresh memory."""
    file = HostMemory(copies=True).file("x.pt", {"a": torch.zeros(1_000_000)[:8]})
    out = io.BytesIO()
    file.write(out)
    assert len(out.getvalue()) < 10_000
    files = CheckpointFiles()
    assert files.preserves_storage_sharing(), "a synchronous save takes no copy: DeepSpeed must"
    files.begin(HostMemory(copies=True))
    assert not files.preserves_storage_sharing()


class Slow(Engine):
    """One tensor, whose file waits to be written until the test says so."""

    def __init__(self) -> None:
        self.value = torch.arange(5.0)
        self.go = threading.Event()
        self.fails = False

    def backward(self, tensors: Tensors, factor: float, last: bool) -> torch.Tensor:
        raise AssertionError("not trained here")

    def step(self, learning_rate: float) -> float:
        raise AssertionError("not trained here")

    def snapshot(self, memory: HostMemory) -> list[File]:
        if self.fails:
            raise MemoryError("no room for a copy")
        file = memory.file("state.pt", {"value": self.value})

        def write(sink: Sink) -> None:
            assert self.go.wait(20)
            file.write(sink)

        return [File(file.name, file.size, write)]

    def load(self, folder: Path) -> None:
        self.value = torch.load(folder / "state.pt", weights_only=True)["value"]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    run = Run(tmp_path / "run")
    run.root.mkdir()
    run.checkpoints.mkdir()
    return run.new_attempt()


def of(attempt: Attempt, engine: Engine, asynchronous: bool = True) -> Checkpoints:
    return Checkpoints(attempt, engine, Ranks(), IDENTITY, Checkpoint(every_steps=1, asynchronous=asynchronous))


def test_training_goes_on_while_it_is_written(attempt: Attempt) -> None:
    """State, progress and random numbers are those of the step; a poisoned update comes before the first byte."""
    engine, progress = Slow(), Progress(step=3)
    them = of(attempt, engine)
    torch.manual_seed(1)
    them.begin(progress)
    drawn = torch.rand(3)
    assert not them.done and not attempt.run.sealed_steps()
    engine.value.fill_(float("nan"))
    progress.step = 4
    progress.cursor.advance(1, 1)
    engine.go.set()
    assert them.settle().error == ""
    restored, _ = of(attempt, engine).restore(fresh=False)
    assert restored is not None and restored.step == 3 and restored.cursor.history == []
    assert engine.value.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.rand(3), drawn)


def test_synchronous_takes_no_copy_and_is_durable_at_once(attempt: Attempt) -> None:
    engine = Slow()
    engine.go.set()
    them = of(attempt, engine, asynchronous=False)
    them.begin(Progress(step=3))
    assert attempt.run.sealed_steps() == [3]
    assert not them.memory._kept
    assert them.settle().error == ""


def test_the_memory_is_there_before_the_first_save(attempt: Attempt) -> None:
    """The first save waited five times as long for fresh memory as for the copy."""
    engine = Slow()
    engine.go.set()
    them = of(attempt, engine)
    them.warm()
    places = [t.data_ptr() for t in them.memory._kept.values()]
    assert places and not attempt.run.sealed_steps()
    engine.value.fill_(7)
    them.begin(Progress(step=3))
    assert them.settle().error == ""
    assert [t.data_ptr() for t in them.memory._kept.values()] == places
    engine.value.fill_(0)
    of(attempt, engine).restore(fresh=False)
    assert engine.value.tolist() == [7] * 5
    engine.fails = True
    them.warm()  # the saves will say it
    synchronous = of(attempt, engine, asynchronous=False)
    synchronous.warm()
    assert not synchronous.memory._kept


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_that_has_no_memory_for_the_copy_fails_the_save_and_no_more(
    attempt: Attempt, asynchronous: bool
) -> None:
    engine = Slow()
    engine.go.set()
    them = of(attempt, engine, asynchronous)
    engine.fails = True
    them.begin(Progress(step=3))
    assert them.settle().error == "rank 0: MemoryError: no room for a copy"
    engine.fails = False
    them.begin(Progress(step=4))
    assert them.settle().error == ""
    assert attempt.run.sealed_steps() == [4]


def test_a_full_disk_is_named(attempt: Attempt) -> None:
    """torch's writer only said `unexpected pos 342720 vs 342608`."""
    file = HostMemory(copies=False).file("x.pt", {"x": torch.zeros(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_hashed(attempt.run.root / "x.pt", file.write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_what_torch_writes_is_hashed_as_it_lies_there(attempt: Attempt) -> None:
    path = attempt.run.root / "x.pt"
    file = HostMemory(copies=True).file("x.pt", state_of(torch.arange(100_000.0)))
    assert write_hashed(path, file.write) == sealing.digest_file(path)
    assert torch.load(path, weights_only=False)["model"]["b"].tolist() == [6, 7]
