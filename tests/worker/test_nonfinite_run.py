"""A run that is not finite any more ends as it promises, and goes on from what is sound: by the commands, in real
processes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.errors import TrainingError
from launcher.rundir import Run, read_json, read_lines
from launcher.sealing import manifest_of
from launcher.worker import pack
from launcher.worker.engine import AccelerateEngine
from launcher.worker.weights import weights_of
from tests.conftest import make_corpus
from tests.worker.runs import events, speechctl

pytestmark = pytest.mark.ranks

RECIPE = """\
name: bad
launch: {{processes: 2, device: cpu}}
data: {{corpus: {root}/LibriSpeech, packs: {root}/packs, train: [train-clean-100]}}
backbone: {{kind: tiny-ctc, hidden: 16, layers: 1}}
zero_stage: off
max_steps: 9
batch: {{step_seconds: 12s, max_rank_seconds: 6s}}
optimizer: {{learning_rate: 1e-3, nonfinite_patience: 2}}
evaluate: {{subsets: [dev-clean]}}
checkpoint: {{every_steps: 3}}
"""

SITE = """\
import os, sys
if os.environ.get("RANK") == "1" and "train" in sys.orig_argv:
    bad = open(os.path.dirname(__file__) + "/bad").read()
    from launcher.worker.engine import AccelerateEngine
    backward, step = AccelerateEngine.backward, AccelerateEngine.step

    def bad_backward(self, tensors, factor, last):
        if bad == "sound" and self.done + 1 >= 5:
            tensors["inputs"][0] = float("nan")
        return backward(self, tensors, factor, last)

    def bad_step(self, rate):
        norm = step(self, rate)
        if bad == "weight" and self.done + 1 == 9:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")
        return norm

    AccelerateEngine.backward, AccelerateEngine.step = bad_backward, bad_step
"""


def test_it_ends_and_goes_on_from_what_is_sound(tmp_path: Path) -> None:
    """First rank 1 hears what is not a number, from step 5 on: the third such step in a row ends the run, with exit
    code 1, and `why` names the utterance. Then one of its weights is infinite at the last step: nothing is sealed.
    After both, `resume` finishes from the newest checkpoint; with a lower rate and in smaller micro-batches, as it was
    told: both were refused, so that a run that came to this could only be thrown away."""
    make_corpus(tmp_path / "LibriSpeech")
    for subset in ("train-clean-100", "dev-clean"):
        pack.write_pack(tmp_path / "LibriSpeech", subset, tmp_path / "packs" / subset, 2**20, 1, lambda line: None)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    (tmp_path / "sitecustomize.py").write_text(SITE)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = Run(tmp_path / "runs" / "bad")

    (tmp_path / "bad").write_text("sound")
    done = speechctl("launch", "recipe.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    first = run.attempts()[0]
    told = events(first, "left_out")
    assert [(e["step"], e["in_row"]) for e in told] == [(5, 1), (6, 2), (7, 3)]
    utterance = told[-1]["utterances"]["1"][0]
    failure = read_json(first.failure)
    assert (failure["kind"], failure["code"], failure["verdict"]) == ("training", 1, "mend")
    said = "so it was in 3 steps in a row, and optimizer.nonfinite_patience is 2"
    why = speechctl("why", str(run.root), cwd=tmp_path)
    for text in (failure["message"], " ".join(done.stderr.split()), " ".join(why.stdout.split())):
        assert "step 7: the loss is not finite (rank 1: " in text and utterance in text and said in text, text
    assert run.sealed_steps() == [3, 6]
    progress = manifest_of(run.checkpoint(6))["progress"]
    assert (progress["left_out"], progress["left_out_in_row"]) == (2, 2)
    assert "3 steps with a loss or gradient that was not finite" in speechctl("status", "runs/bad", cwd=tmp_path).stdout

    (tmp_path / "bad").write_text("weight")
    done = speechctl("resume", "runs/bad", cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    second = run.attempts()[1]
    refused = "step 9: the weights are not finite, and are not saved"
    assert read_json(second.failure)["message"].endswith(refused)
    why = speechctl("why", "runs/bad", cwd=tmp_path)
    assert refused in " ".join(why.stdout.split()) and "the newest checkpoint is sound" in " ".join(why.stdout.split())
    assert run.sealed_steps() == [3, 6] and not second.exit.exists()
    assert [row["step"] for row in read_lines(second.metrics)] == [7, 8, 9]
    assert not any(row.get("left_out") for row in read_lines(second.metrics))

    changed = ["--set", "optimizer.learning_rate=5e-4", "--set", "batch.max_rank_seconds=3s"]
    done = speechctl("resume", "runs/bad", *changed, "--set", "activation_checkpointing=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    third = run.attempts()[2]
    assert read_json(third.exit) == {"code": 0, "step": 9, "sealed_step": 9}
    assert [(e["step"], e["accumulation"]) for e in events(third, "started")] == [(6, 2)]
    rates = [[row["learning_rate"] for row in read_lines(a.metrics)] for a in (second, third)]
    assert rates[1] == pytest.approx([rate / 2 for rate in rates[0]])
    assert all(bool(w.isfinite().all()) for step in run.sealed_steps() for w in weights_of(run, step).values())
    assert math.isfinite(read_json(run.evaluation(9))["wer"])
    done = speechctl("audit", "runs/bad", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fp16_that_cannot_be_scaled_down_any_further_ends() -> None:
    """Without ZeRO torch's scaler halves its scale for ever, and every step is left out; DeepSpeed has a floor."""
    scale = [4.0]
    scaler = SimpleNamespace(get_scale=lambda: scale[0])
    accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=lambda _: None)
    weight = torch.nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([weight])

    def step() -> None:
        scale[0] /= 2

    optimizer = SimpleNamespace(param_groups=[], step=step, zero_grad=inner.zero_grad)
    rank: Any = SimpleNamespace(
        accelerator=accelerator, optimizer=optimizer, parameters=[weight], groups=[], grad_clip=0, done=0
    )
    for _ in range(2):  # 4 to 1
        weight.grad = torch.tensor([math.inf])
        assert math.isnan(AccelerateEngine.step(rank, 0.1))
    weight.grad = torch.tensor([math.inf])
    with pytest.raises(TrainingError, match="overflows fp16"):
        AccelerateEngine.step(rank, 0.1)
