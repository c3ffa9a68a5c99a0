"""The recipe on how a model learns: what it means, what it refuses, and what DeepSpeed is given for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import environment, plan, recipe_file
from launcher.errors import PreflightError
from launcher.hosts import Host
from launcher.recipe import Recipe
from launcher.recipe_file import RecipeError
from launcher.recipe_optimization import OWNED, Schedule, merged
from tests.test_plan import facts, recipe

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule={warmup: 0.7, hold: 0.4}", "warmup 0.7 and hold 0.4 are more than the whole run"),
        ("schedule={warmup: 300, hold: 200}", "warmup and hold take 500 steps, and max_steps is 400"),
        ("schedule.warmup=1.5", "expected a share up to 1, or a whole number of steps; 1.5 is neither"),
        ("schedule={final_scale: 0}", "does not reach a final_scale of 0; kinds linear and cosine do"),
        ("schedule.kind=cosin", "did you mean 'cosine'?"),
        ("freeze=[{parts: [head], after_steps: 9, until_steps: 9}]", "until_steps 9 is not behind after_steps 9"),
        ("freeze=[{parts: [head], until: 9}]", "freeze[0].until: there is no such key"),
        ("optimizer.ema=1", "optimizer.ema: "),
        ("optimizer.ema=0", "optimizer.ema: "),
        ("offload.optimizer=true zero_stage=0", "offload.optimizer needs zero_stage 1, 2 or 3, and it is 0"),
        ("offload.parameters=true", "offload.parameters needs zero_stage 3, and it is 2"),
        ("deepspeed={prescale_gradients: true} zero_stage=off", "these keys are for DeepSpeed, and zero_stage is off"),
    ],
)
def test_what_cannot_be_is_refused_where_it_stands(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_file.load(DEMO, override.rsplit(" ", 1) if "zero_stage" in override else [override])
    assert said in refused.value.message


@pytest.mark.parametrize("key", sorted(OWNED))
def test_a_key_of_deepspeed_that_is_ours_is_refused_by_name(key: str) -> None:
    """Also where it stands beside others, and with the recipe's own field, which there is."""
    *above, last = key.split(".")
    raw: dict[str, Any] = {last: {"enabled": True} if last in ("optimizer", "amp") else 1, "free": {"to": "say"}}
    for name in reversed(above):
        raw = {name: raw, "communication_data_type": "fp32"}
    with pytest.raises(ValueError, match=f"not to be set here: {key} ") as refused:
        recipe(deepspeed=raw)
    field = OWNED[key]
    assert (f"say {field}" if field else "speechctl sets it") in str(refused.value)
    section: Any = Recipe
    for name in field.split(".") if field else ():
        section = section.model_fields[name].annotation


def test_other_keys_of_deepspeed_are_laid_over_ours() -> None:
    raw = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "communication_data_type": "fp32"}
    config = plan.deepspeed_config(recipe(deepspeed=raw), 4, 10**6)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 7}
    assert config["communication_data_type"] == "fp32" and config["gradient_accumulation_steps"] == 4
    assert merged({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}}) == {"a": {"b": 1, "d": 3}, "c": 2}


def test_offloading_moves_bytes_to_the_host() -> None:
    """1,000 weights, 800 of them trained, on 4 ranks in bf16 at ZeRO 3; by hand."""
    nothing = plan.state_bytes(recipe(zero_stage=3), weights=1000, trained=800, world_size=4)
    both = recipe(zero_stage=3, offload={"optimizer": True, "parameters": True})
    weights, gradients, optimizer = 1000 * 2 // 4, 800 * 2 // 4, 800 * 12 // 4
    assert nothing[:2] == (weights + gradients + optimizer, 0)
    assert plan.state_bytes(both, weights=1000, trained=800, world_size=4) == (
        gradients,
        weights + optimizer + 800 * 4 // 4,
        nothing[2],
    )
    config = plan.deepspeed_config(both, 1, 800)
    on_host = {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["offload_optimizer"] == on_host == config["zero_optimization"]["offload_param"]
    assert config["zero_force_ds_cpu_optimizer"] is False  # nothing to compile
    made = plan.make(both, [Host("localhost", 4)], facts(1))
    assert made.host_bytes_per_rank > made.state_bytes_per_rank


def test_a_moving_average_takes_4_bytes_for_each_weight_that_learns() -> None:
    """1,000 weights, 800 of them trained, on 4 ranks; shared out and offloaded as the moments are, and saved."""

    def of(**options: Any) -> tuple[int, int, int]:
        without, averaged = (
            plan.state_bytes(recipe(optimizer={"learning_rate": 1e-3, "ema": ema}, **options), 1000, 800, 4)
            for ema in (None, 0.999)
        )
        device, host, saved = (after - before for after, before in zip(averaged, without, strict=True))
        return device, host, saved

    assert of(zero_stage="off") == of(zero_stage=0) == (800 * 4, 0, 800 * 4)
    assert of(zero_stage=1) == of(zero_stage=2) == of(zero_stage=3) == (800, 0, 800 * 4)
    assert of(zero_stage=2, offload={"optimizer": True}) == (0, 800, 800 * 4)


def test_a_plan_of_before_there_was_offloading_can_be_read() -> None:
    made = plan.make(recipe(), [Host("localhost", 2)], facts(4)).to_json()
    del made["host_bytes_per_rank"]
    assert plan.Plan.from_json(made).host_bytes_per_rank == 0


def test_fp16_without_a_gpu_is_refused_before_anything_starts() -> None:
    """A rank said so, after every rank had imported all it needs and built its model. What a hostfile's hosts and the
    nodes of a job have is known there alone, and the ranks say it."""
    asked, here = recipe(precision="fp16", launch={"backend": "local", "processes": 2}), [Host("localhost", 2)]
    with pytest.raises(
        PreflightError, match="precision fp16 needs NVIDIA GPUs, and this machine shows none"
    ) as refused:
        environment.check(asked, here, gpus=0)
    assert "bf16" in refused.value.hint
    environment.check(asked, here, gpus=2)
    elsewhere: list[dict[str, object]] = [{"backend": "slurm", "nodes": 1}, {"backend": "ssh", "hostfile": "hosts.txt"}]
    for more in elsewhere:
        environment.check(recipe(precision="fp16", launch=more), here, gpus=0)
        with pytest.raises(PreflightError, match="device is cpu"):
            environment.check(recipe(precision="fp16", launch={**more, "device": "cpu"}), here, gpus=0)


def test_fp16_scales_the_loss() -> None:
    config = plan.deepspeed_config(recipe(precision="fp16", zero_stage=2), 1, 10**6)
    assert config["fp16"] == {"enabled": True} and config["bf16"] == {"enabled": False}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_schedule_in_shares_and_in_steps_is_the_same() -> None:
    shares, steps = Schedule(warmup=0.1, hold=0.4), Schedule(warmup=8000, hold=32_000)
    assert shares.stages(80_000) == steps.stages(80_000) == (8_000, 40_000)
    assert Schedule(kind="cosine").shape == Schedule(kind="linear").shape == (0, 0, 0)
    assert Schedule().shape == (0.4, 0.01, 0.05)
