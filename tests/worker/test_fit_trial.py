"""What a rank of a trial says of its end, and which step of a run it tries."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

from launcher.errors import PreflightError
from launcher.recipe_optimization import Freeze
from launcher.rundir import read_lines
from launcher.worker import fit
from launcher.worker.learning import Group
from tests.conftest import RECIPE
from tests.test_plan import recipe


def ended_with(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(*_: object) -> NoReturn:
        raise error

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    (folder / "stub.yaml").write_text(RECIPE)
    monkeypatch.setattr(fit.Trial, "run", run)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        fit.fit(argparse.Namespace(recipe=folder / "stub.yaml", folder=folder, budget=6.0, memory=None, headroom=0.1))
    assert isinstance(left.value.code, int)
    return left.value.code


def refused_by_the_allocator() -> RuntimeError:
    try:
        torch.empty(2**55, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("kind", ["cuda", "python", "allocator", "cublas"])
def test_memory_that_runs_out_is_said(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        "python": MemoryError(),
        "allocator": refused_by_the_allocator(),
        "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    }
    assert ended_with(errors[kind], tmp_path, monkeypatch) == 77
    (line,) = read_lines(tmp_path / "rank-0.jsonl")
    assert line["out_of_memory"] == (str(errors[kind]) or "MemoryError").splitlines()[0]


def test_other_errors_are_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_with(RuntimeError("shape mismatch"), tmp_path, monkeypatch) == 1
    assert "RuntimeError: shape mismatch" in capsys.readouterr().err
    assert ended_with(PreflightError("no room", hint="make room"), tmp_path, monkeypatch) == 4
    assert capsys.readouterr().err == "error: no room\n\nhint: make room\n"
    assert read_lines(tmp_path / "rank-0.jsonl") == []


def group(size: int, *frozen: Freeze) -> Group:
    return Group([torch.nn.Parameter(torch.zeros(size))], 0.0, 1.0, frozen)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group(5)], 0),
        ([group(5), group(9, Freeze(parts=["*"], until_steps=10))], 10),
        ([group(5), group(9, Freeze(parts=["*"], after_steps=3))], 0),
        ([group(5, Freeze(parts=["*"], after_steps=10)), group(9, Freeze(parts=["*"], until_steps=20))], 20),
        ([group(5), group(9, Freeze(parts=["*"], until_steps=500))], 0),
    ],
)
def test_steps_are_tried_where_most_learns(groups: list[Group], expected: int) -> None:
    """fairseq's recipes learn the head alone for 10,000 steps: a budget found there does not hold for the rest. A part
    that learns only behind the end of the run never does."""
    assert fit.hardest_step(groups, max_steps=100) == expected


def test_all_that_ever_learns_has_its_moments_before_anything_is_measured() -> None:
    """A part that learns first and one that learns then never have gradients together, but the run keeps the moments
    of both: a trial of the larger one alone found a budget that did not hold."""
    groups = [group(5, Freeze(parts=["*"], after_steps=10)), group(9, Freeze(parts=["*"], until_steps=10))]
    updated: list[int] = []
    engine = SimpleNamespace(
        groups=groups,
        device=torch.device("cpu"),
        model=SimpleNamespace(begin=lambda *_: None),
        begin=updated.append,
        backward=lambda *_, **__: None,
        step=lambda _: 1.0,
    )
    steps = fit.Steps(cast(Any, engine), recipe(max_steps=100), cast(Any, None), each=1)
    steps.warm_up({"inputs": torch.zeros(1)})
    assert all(any(not g.is_frozen(done) for done in updated) for g in groups)
    assert updated[-1] == steps.done == 10
