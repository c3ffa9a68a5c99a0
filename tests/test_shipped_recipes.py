"""The recipes that come with the program: each can be read, and says what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import hosts, plan, recipe_file
from launcher.recipe import Recipe, Wav2Vec2, Whisper

FOLDER = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    return recipe_file.load(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_recipe_loads_and_is_called_like_its_file(path: Path) -> None:
    recipe = recipe_file.load(path)
    assert recipe.name == path.stem
    assert not recipe.data.corpus.is_absolute() and not recipe.data.packs.is_absolute()
    assert recipe.run_path == Path("runs") / path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_recipe_says_how_to_start_it(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"speechctl pack recipes/{path.name} && speechctl launch" in line for line in comments)


def test_wav2vec2_base_100h_has_the_published_batch() -> None:
    """fairseq: 2 GPUs x update_freq 4 x max_tokens 3.2 M samples; the same step on any number of GPUs."""
    from launcher.worker.sampler import accumulation

    batch = load("wav2vec2-base-100h").batch
    assert batch.max_rank_seconds * 16_000 == 3_200_000
    assert batch.step_seconds * 16_000 == 2 * 4 * 3_200_000
    each = {n: accumulation(batch.step_seconds, batch.max_rank_seconds, n) for n in (1, 2, 4, 8, 16)}
    assert each == {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}


def test_wav2vec2_base_100h_has_the_published_schedule() -> None:
    recipe = load("wav2vec2-base-100h")
    steps, schedule = recipe.max_steps, recipe.schedule
    assert steps == 80_000
    assert schedule.stages(steps) == (8_000, 8_000 + 32_000)
    assert (schedule.init_scale, schedule.final_scale) == (0.01, 0.05)
    assert recipe.optimizer.learning_rate == 3e-5
    assert recipe.optimizer.betas == [0.9, 0.98]
    assert (recipe.optimizer.weight_decay, recipe.optimizer.grad_clip) == (0, 0)
    assert (recipe.evaluate.after_steps, recipe.evaluate.subsets) == (10_000, ["dev-other"])
    assert plan.deepspeed_config(recipe, 4, 10**9)["gradient_clipping"] == 0


def test_wav2vec2_base_100h_has_the_published_masks() -> None:
    backbone = load("wav2vec2-base-100h").backbone
    assert isinstance(backbone, Wav2Vec2)
    assert (backbone.mask_time_prob, backbone.mask_time_length) == (0.65, 10)
    assert (backbone.mask_channel_prob, backbone.mask_channel_length) == (0.5, 64)
    assert (backbone.dropout, backbone.activation_dropout, backbone.layerdrop) == (0, 0.1, 0.1)
    assert backbone.freeze_feature_encoder and not backbone.normalize


def test_whisper_sample_is_zero_shot_first_and_seals_its_last_step() -> None:
    recipe = load("whisper-tiny-en-sample")
    assert isinstance(recipe.backbone, Whisper)
    assert (recipe.zero_stage, recipe.precision) == (2, "fp32")
    assert recipe.evaluate.at_start and recipe.evaluate.at_end
    assert recipe.evaluate.normalizer == "whisper-english"
    assert recipe.max_steps >= 40
    assert recipe.batch.max_rank_seconds % 30 == 0  # every utterance takes 30 s


def test_debug_is_one_process_without_deepspeed() -> None:
    recipe = load("debug")
    assert recipe.zero_stage == "off"
    assert len(hosts.local(recipe.launch.processes, 8)) == 1
    assert recipe.launch.processes == 1
    assert recipe.data.packs == load("demo").data.packs
    assert recipe.data.synthesize == load("demo").data.synthesize
    assert recipe.data.max_train_utterances is not None and recipe.data.max_train_utterances <= 32
