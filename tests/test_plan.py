"""The plan is a value: the same recipe, hosts and facts give the same plan, and its numbers can be checked by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher import plan
from launcher.hosts import Host
from launcher.recipe import Recipe
from tests.conftest import Golden

WAV2VEC2 = {
    "name": "base-100h",
    "run_dir": "/shared/runs/base-100h",
    "data": {"corpus": "LibriSpeech", "packs": "packs", "train": ["train-clean-100"]},
    "backbone": {"kind": "wav2vec2", "source": "facebook/wav2vec2-base"},
    "precision": "bf16",
    "max_steps": 80_000,
    "batch": {"step_seconds": 1600, "max_rank_seconds": 200},
    "optimizer": {"learning_rate": 3e-5},
    "evaluate": {"subsets": ["dev-other"], "every_steps": 1000},
    "checkpoint": {"every_steps": 1000},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**WAV2VEC2, **changes})


def facts(accumulation: int) -> dict[str, Any]:
    """What the worker would answer. The arithmetic of `accumulation` is its sampler's."""
    return {
        "parameters": 94_396_320,
        "trained_parameters": 90_195_872,
        "utterances": 28_539,
        "left_out": {"longer than data.max_utterance": 3},
        "audio_s": 362_160.0,
        "accumulation": accumulation,
        "steps_per_epoch": 228,
        "padding": 0.0125,
        "straggler": 1.004,
        "padded_lengths": 80,
        "evaluation_utterances": 2864,
        "packs": "0" * 32,
    }


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_the_published_batch_on_any_number_of_ranks(ranks: int, accumulation: int, golden: Golden) -> None:
    """fairseq's base_100h: 2 GPUs x 4 micro-batches x 200 s. The experiment stays 1,600 s a step on 1, 2 and 8."""
    asked, given = recipe(), facts(accumulation)
    made = plan.make(asked, [Host("localhost", ranks)], given)
    assert made == plan.make(asked, [Host("localhost", ranks)], given)
    assert (asked, given) == (recipe(), facts(accumulation)), "a plan changes nothing"
    assert made.micro_batch_seconds == 200
    assert made.world_size * made.accumulation * made.micro_batch_seconds == made.step_seconds == 1600
    golden(f"plan/{ranks}-ranks.json", json.dumps(made.to_json(), indent=1) + "\n")


def test_ranks_of_several_hosts_add_up() -> None:
    made = plan.make(recipe(), [Host("a", 4), Host("b", 3), Host("c", 1)], facts(1))
    assert made.world_size == 8
    node = "/shared/runs/base-100h/attempts/0001/node.sh"
    assert made.commands == [["bash", node, str(k)] for k in range(3)]


@pytest.mark.parametrize(
    ("stage", "precision", "per_rank", "checkpoint"),
    [
        # 1,000 weights, 800 of them trained, on 4 ranks; bytes.
        ("off", "fp32", 1000 * 4 + 800 * 4 + 800 * 8, 1000 * 4 + 800 * 8),
        ("off", "bf16", 1000 * 4 + 800 * 4 + 800 * 8, 1000 * 4 + 800 * 8),  # autocast: the weights stay fp32
        (0, "fp32", 1000 * 4 + 800 * 4 + 800 * 8, 1000 * 4 + 800 * 8),
        (0, "bf16", 1000 * 2 + 800 * 2 + 800 * 12, 1000 * 2 + 800 * 12),
        (1, "fp32", 1000 * 4 + 800 * 4 + 800 * 12 // 4, 1000 * 4 + 800 * 12),
        (1, "bf16", 1000 * 2 + 800 * 2 + 800 * 12 // 4, 1000 * 2 + 800 * 12),
        (2, "bf16", 1000 * 2 + 800 * 2 // 4 + 800 * 12 // 4, 1000 * 2 + 800 * 12),
        (3, "bf16", 1000 * 2 // 4 + 800 * 2 // 4 + 800 * 12 // 4, 200 * 2 + 800 * 12),
        (3, "fp32", 1000 * 4 // 4 + 800 * 4 // 4 + 800 * 12 // 4, 200 * 4 + 800 * 12),
    ],
)
def test_memory_by_hand(stage: str | int, precision: str, per_rank: int, checkpoint: int) -> None:
    asked = recipe(zero_stage=stage, precision=precision)
    assert plan.state_bytes(asked, weights=1000, trained=800, world_size=4) == (per_rank, 0, checkpoint)


def test_without_zero_there_is_nothing_for_deepspeed() -> None:
    assert plan.make(recipe(zero_stage="off"), [Host("localhost", 1)], facts(8)).deepspeed is None
