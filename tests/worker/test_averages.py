"""Averages of checkpoints: the arithmetic, what is checked and kept meanwhile, and what an export says of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import recipe_file, sealed, sealing
from launcher.committer import Committer, File
from launcher.errors import DataError
from launcher.retention import Rules
from launcher.rundir import Run
from launcher.worker import __main__ as worker
from launcher.worker import weights
from launcher.worker.models import build
from tests.conftest import RECIPE
from tests.saving import Alone, new_run

STEPS = [3, 6, 9]


def seal(run: Run, step: int, state: dict[str, Any]) -> None:
    saved = io.BytesIO()
    torch.save({"model": state}, saved)
    file = File("accelerate.pt", len(saved.getvalue()), lambda sink: sink.write(saved.getvalue()))
    committer = Committer(run.attempts()[-1], Alone(), Rules(last=9))
    assert not committer.save(step, [file], {"identity": {"zero_stage": "off"}}).error


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With three sealed checkpoints of a model whose weights differ."""
    made = new_run(tmp_path / "run")
    made.resolved.write_text(RECIPE.replace("kind: tiny-ctc", "kind: tiny-ctc, hidden: 8, layers: 1"))
    backbone = recipe_file.load(made.resolved).backbone
    for step in STEPS:
        seal(made, step, build(backbone, seed=step).state_dict())
    return made


def test_each_element_is_averaged_in_float64_and_rounded_once(tmp_path: Path) -> None:
    """Against exact fractions: the nearest float32 to the mean of what was saved. 1e8 + 1 - 1e8 is lost in float32."""
    run = new_run(tmp_path / "run")
    dice = torch.Generator().manual_seed(1)
    states = [
        {
            "weight": torch.randn(50, 7, generator=dice) * 10.0 ** torch.randint(-6, 6, (50, 7), generator=dice),
            "cancels": torch.tensor([1e8, 1.0, -1e8]).roll(i),
            "half": torch.randn(9, generator=dice).bfloat16(),
            "frozen": torch.full((5,), 0.1),
            "counter": torch.tensor(100 + i),
            "mask": torch.tensor([i == 2]),
        }
        for i in range(3)
    ]
    for step, state in zip(STEPS, states, strict=True):
        seal(run, step, state)
    mean = weights.average_of(run, [9, 3, 6])
    for name in ("weight", "cancels", "half"):
        exact = torch.tensor(
            [sum(map(float, row)) / 3 for row in zip(*(s[name].flatten().tolist() for s in states), strict=True)],
            dtype=torch.float64,
        )
        assert torch.equal(mean[name].flatten(), exact.float()), name
        assert mean[name].dtype == torch.float32 and mean[name].shape == states[0][name].shape
    assert mean["cancels"].tolist() == [torch.tensor(1 / 3).item()] * 3
    assert torch.equal(mean["frozen"], states[0]["frozen"])
    assert (mean["counter"].item(), mean["mask"].item()) == (102, True)


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_the_mean_of_equals_is_the_same_bits(tmp_path: Path, count: int) -> None:
    run = new_run(tmp_path / "run")
    state = {"weight": torch.randn(1000, generator=torch.Generator().manual_seed(count)) * 1e-3}
    for step in range(1, count + 1):
        seal(run, step, state)
    assert torch.equal(weights.average_of(run, range(1, count + 1))["weight"], state["weight"])


def test_checkpoints_of_two_models_are_not_averaged(run: Run) -> None:
    seal(run, 12, build(recipe_file.load(run.resolved).backbone, seed=1).state_dict() | {"more": torch.zeros(1)})
    with pytest.raises(DataError, match=r"step-00000012 holds other weights than .*step-00000003"):
        weights.average_of(run, [3, 12])


def export(run: Run, target: Path) -> int:
    steps = [x for step in STEPS for x in ("--step", str(step))]
    return worker.main(["export", str(run.root), *steps, "--target", str(target)])


def test_an_export_of_an_average(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the mean's weights and says what they are of; none of the three is removed while one is read."""
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    removed: list[bool] = []
    own = weights.weights_of

    def watched(run: Run, step: int) -> dict[str, torch.Tensor]:
        removed.extend(sealed.remove(run, other) for other in STEPS)
        return own(run, step)

    monkeypatch.setattr(weights, "weights_of", watched)
    assert export(run, tmp_path / "x") == 0
    assert removed == [False] * 9
    digests = [sealing.manifest_of(run.checkpoint(step))["digest"] for step in STEPS]
    assert sealing.verify(tmp_path / "x")["source"] == {
        "run": str(run.root),
        "step": 9,
        "checkpoint": digests[-1],
        "weights": "average",
        "average_of": [{"step": s, "checkpoint": d} for s, d in zip(STEPS, digests, strict=True)],
    }
    from safetensors.torch import load_file

    monkeypatch.setattr(weights, "weights_of", own)
    mean = weights.average_of(run, STEPS)
    written = load_file(tmp_path / "x" / "model.safetensors")
    assert written.keys() == {name.removeprefix("model.") for name in mean}
    assert all(torch.equal(written[name.removeprefix("model.")], tensor) for name, tensor in mean.items())


@pytest.mark.parametrize("step", STEPS)
def test_one_that_does_not_verify_ends_it(
    run: Run, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    path = run.checkpoint(step) / "accelerate.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert export(run, tmp_path / "x") == 5
    assert f"step-{step:08d}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
