"""The demo and the debug way on one GPU. Everything else that runs on a GPU is the same code as on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.fit import PRECISION
from launcher.rundir import Run, read_json, read_lines
from tests.conftest import GPUS
from tests.worker.runs import kill_rank, speechctl, started, wait_for

RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = [pytest.mark.gpu, pytest.mark.ranks]


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")
        if GPUS is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", GPUS)
        code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", code], check=False).returncode:
            pytest.skip("no NVIDIA GPU that this torch can use")
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    done = speechctl("pack", str(RECIPES / "demo.yaml"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("stage", "precision"), [("2", "fp32"), ("2", "bf16"), ("3", "bf16"), ("off", "bf16")])
def test_the_demo_learns_on_one_gpu(packed: Path, stage: str, precision: str) -> None:
    run = Run(packed / f"demo-{stage}-{precision}")
    sets = [
        "launch.device=auto",
        "launch.processes=1",
        f"zero_stage={stage}",
        f"precision={precision}",
        f"run_dir={run.root}",
    ]
    options = [x for s in sets for x in ("--set", s)]
    done = speechctl("launch", str(RECIPES / "demo.yaml"), *options, cwd=packed)
    assert done.returncode == 0, done.stderr
    assert read_json(run.evaluation(400))["wer"] <= 0.3
    assert len(read_lines(run.attempts()[0].metrics)) == 400


def test_debug_runs_on_one_gpu(packed: Path) -> None:
    done = speechctl("launch", "--debug", str(RECIPES / "debug.yaml"), cwd=packed)
    assert done.returncode == 0, done.stderr


def test_killed_and_resumed_on_one_gpu(packed: Path) -> None:
    """As on a CPU, but to a tolerance: CUDA adds up the gradient of CTC in no fixed order."""
    sets = [
        "launch.device=auto",
        "launch.processes=1",
        "max_steps=200",
        "checkpoint.every_steps=10",
        "evaluate.every_steps=200",
    ]
    options = [x for s in sets for x in ("--set", s)]
    launch = ["launch", str(RECIPES / "demo.yaml"), *options, "--set"]
    done = speechctl(*launch, "run_dir=whole", cwd=packed)
    assert done.returncode == 0, done.stderr
    run = Run(packed / "cut")
    with started(*launch, "run_dir=cut", cwd=packed) as process:
        wait_for(lambda: run.exists() and 20 in run.sealed_steps(), process)
        kill_rank(run.attempts()[0], 0)
        assert process.wait(60) == 76
    done = speechctl("resume", "cut", cwd=packed)
    assert done.returncode == 0, done.stderr
    after = {m["step"]: m["loss"] for m in read_lines(run.attempts()[1].metrics)}
    before = {m["step"]: m["loss"] for m in read_lines(Run(packed / "whole").attempts()[0].metrics)}
    first = min(after)
    assert first > 20
    assert after[first] == pytest.approx(before[first], rel=1e-3)
    assert max(after) == 200


def test_the_largest_budget_on_one_gpu(packed: Path) -> None:
    """Of a GPU that may give no more than a whole step takes: the answer fits as it was run and stays under the limit,
    and one hardly larger is refused by CUDA itself."""
    recipe = str(RECIPES / "demo.yaml")
    sets = ["launch.device=auto", "launch.processes=1", "batch.step_seconds=2000s", "batch.max_rank_seconds=400s"]
    options = ["--json", *(x for s in sets for x in ("--set", s))]
    done = speechctl("fit", recipe, *options, "--headroom", "0", cwd=packed)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert whole["is_largest"] and whole["max_rank_seconds"] == 2000 and whole["device"] != "cpu"
    taken = {t["max_rank_seconds"]: t["needed_bytes"] for t in whole["trials"]}
    assert taken[2000] > taken[400]
    others = torch_total(packed) - whole["limit_bytes"]
    memory = (taken[400] + taken[2000]) // 2 + others
    done = speechctl("fit", recipe, *options, "--headroom", "0", "--memory", str(memory), cwd=packed)
    assert done.returncode == 0, done.stderr
    less = json.loads(done.stdout)
    good = [t for t in less["trials"] if t["fits"]]
    bad = [t for t in less["trials"] if not t["fits"]]
    assert 400 <= less["max_rank_seconds"] < 2000 and bad
    assert min(t["max_rank_seconds"] for t in bad) - less["max_rank_seconds"] <= PRECISION * 2000
    assert all(t["peak_bytes"] <= t["limit_bytes"] for t in good)
    assert all("out of memory" in t["why"] for t in bad)


def torch_total(folder: Path) -> int:
    """Of the GPU."""
    code = "import torch; print(torch.cuda.mem_get_info()[1])"
    return int(
        subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, check=True).stdout
    )


@pytest.mark.parametrize("stage", ["off", "0", "2", "3"])
def test_fp16_learns_and_takes_its_loss_scale_along(packed: Path, stage: str) -> None:
    """Gradients that overflow, by which DeepSpeed finds the scale, end no run, whatever the patience; a resume goes on
    with the scale that the checkpoint was sealed with, and not with the first one."""
    sets = [
        "launch.device=auto",
        "launch.processes=1",
        f"zero_stage={stage}",
        "precision=fp16",
        f"run_dir=fp16-{stage}",
    ]
    sets += ["checkpoint.every_steps=20", "evaluate.every_steps=100", "optimizer.nonfinite_patience=0", "max_steps=60"]
    if stage != "off":
        sets.append("deepspeed={fp16: {initial_scale_power: 32}}")  # more than any gradient bears
    options = [x for s in sets for x in ("--set", s)]
    run = Run(packed / f"fp16-{stage}")
    with started("launch", str(RECIPES / "demo.yaml"), *options, cwd=packed) as process:
        wait_for(lambda: 20 in run.sealed_steps() and len(read_lines(run.attempts()[0].metrics)) > 45, process)
        kill_rank(run.attempts()[0], 0)
        assert process.wait(60) == 76
    done = speechctl("resume", run.root.name, cwd=packed)
    assert done.returncode == 0, done.stderr
    before, after = ({m["step"]: m for m in read_lines(a.metrics)} for a in run.attempts())
    first = min(after)
    assert first > 20 and max(after) == 60
    assert after[first]["loss_scale"] == before[first]["loss_scale"]
    if stage != "off":
        assert before[1]["left_out"] and before[first]["loss_scale"] < before[1]["loss_scale"]
    losses = [m["loss"] for _, m in sorted({**before, **after}.items()) if not m.get("left_out")]
    assert sum(losses[-5:]) < sum(losses[:5])
