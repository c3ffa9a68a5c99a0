"""The recipes that come with the program: each can be read, and says what it promises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import hosts, measured, plan, recipe_file, views
from launcher.hosts import Host
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


@dataclass(frozen=True)
class Published:
    """A recipe of the literature, in the terms of its own toolkit."""

    gpus: int
    update_freq: int
    """Micro-batches that a GPU adds up."""
    max_tokens: int
    """Samples at 16 kHz in a micro-batch."""
    updates: int
    learning_rate: float
    betas: tuple[float, float]
    stages: tuple[int, int]
    """Steps of warm-up and at the peak."""
    init_scale: float
    final_scale: float
    """The learning rate of the last step, as a share of the peak."""
    weight_decay: float = 0.0
    grad_clip: float = 0.0


PUBLISHED = {
    # fairseq, examples/wav2vec/config/finetuning
    "wav2vec2-base-100h": Published(2, 4, 3_200_000, 80_000, 3e-5, (0.9, 0.98), (8_000, 32_000), 0.01, 0.05),
    "wav2vec2-base-10h": Published(2, 4, 3_200_000, 20_000, 5e-5, (0.9, 0.98), (2_000, 8_000), 0.01, 0.05),
    "wav2vec2-large-lv60-100h": Published(4, 5, 1_280_000, 80_000, 3e-5, (0.9, 0.98), (8_000, 32_000), 0.01, 0.05),
    "wav2vec2-base-960h": Published(8, 1, 3_200_000, 320_000, 1e-4, (0.9, 0.98), (32_000, 128_000), 0.01, 0.05),
    # fairseq, examples/hubert/config/finetune: 8,000 of warm-up, 72,000 of decay, and the end after 25,000.
    "hubert-base-10h": Published(8, 1, 3_200_000, 25_000, 2e-5, (0.9, 0.98), (8_000, 0), 0.01, 0.05 ** (17 / 72)),
    # Hugging Face: 8 GPUs x 4 utterances of 12.69 s in the mean.
    "wavlm-base-plus-100h": Published(8, 1, 812_000, 2_676, 3e-4, (0.9, 0.999), (500, 0), 0.0, 0.0, 0.0, 1.0),
    # SpeechBrain: 16 utterances, each padded to 30 s; Noam's schedule ends at sqrt(warm-up / steps).
    "whisper-small-en": Published(
        1, 1, 16 * 480_000, 17_578, 1e-5, (0.9, 0.999), (500, 0), 1 / 500, (500 / 17_578) ** 0.5, 0.01, 2.0
    ),
    "whisper-small-en-lora": Published(
        1, 8, 2 * 480_000, 1_784, 1e-5, (0.9, 0.999), (500, 0), 1 / 500, (500 / 1_784) ** 0.5, 0.01, 2.0
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_batch(name: str) -> None:
    """GPUs x micro-batches x samples: the same audio in a step, cut as it was there on as many GPUs."""
    from launcher.worker.sampler import accumulation

    batch, published = load(name).batch, PUBLISHED[name]
    assert batch.max_rank_seconds * 16_000 == published.max_tokens
    assert batch.step_seconds * 16_000 == published.gpus * published.update_freq * published.max_tokens
    each = {n: accumulation(batch.step_seconds, batch.max_rank_seconds, n) for n in (1, published.gpus, 64)}
    assert each == {1: published.gpus * published.update_freq, published.gpus: published.update_freq, 64: 1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schedule(name: str) -> None:
    recipe, published = load(name), PUBLISHED[name]
    assert recipe.max_steps == published.updates
    climbed, decays = recipe.schedule.stages(recipe.max_steps)
    assert (round(climbed), round(decays - climbed)) == published.stages
    _, init_scale, final_scale = recipe.schedule.shape
    assert init_scale == pytest.approx(published.init_scale)
    assert final_scale == pytest.approx(published.final_scale, rel=1e-3)
    assert recipe.optimizer.learning_rate == published.learning_rate
    assert tuple(recipe.optimizer.betas) == published.betas
    assert (recipe.optimizer.weight_decay, recipe.optimizer.grad_clip) == (published.weight_decay, published.grad_clip)
    assert plan.deepspeed_config(recipe, 4, 10**9)["gradient_clipping"] == published.grad_clip


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_on_8_and_64_gpus_has_the_published_arithmetic(
    name: str, gpus: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `plan` prints for one machine of 8 GPUs, and for 8 of them."""
    from launcher.worker.sampler import accumulation

    monkeypatch.setenv("COLUMNS", "100")
    recipe, published = load(name), PUBLISHED[name]
    each = accumulation(recipe.batch.step_seconds, recipe.batch.max_rank_seconds, gpus)
    facts = {
        "parameters": 94_396_320,
        "trained_parameters": 90_195_872,
        "utterances": 28_539,
        "left_out": {},
        "audio_s": 362_160.0,
        "accumulation": each,
        "steps_per_epoch": 228,
        "padding": 0.0,
        "straggler": 1.0,
        "evaluation_utterances": 2864,
    }
    machines = [Host(f"gpu-{i:02d}", 8) for i in range(1, gpus // 8 + 1)]
    made = plan.make(recipe, machines, facts)
    views.plan(made, measured.planned(recipe, made))
    said = capsys.readouterr().out
    audio_s = published.gpus * published.update_freq * published.max_tokens / 16_000
    counted = "1 micro-batch" if each == 1 else f"{each} micro-batches"
    assert f"step        {audio_s:g} padded s = {gpus} ranks x {counted} x {audio_s / gpus / each:g} s\n" in said
    assert f"steps       {published.updates} = " in said


def test_wav2vec2_base_100h_evaluates_as_published() -> None:
    evaluate = load("wav2vec2-base-100h").evaluate
    assert (evaluate.after_steps, evaluate.subsets) == (10_000, ["dev-other"])


@pytest.mark.parametrize(
    ("name", "kind", "time", "channel", "layerdrop", "head_alone_until"),
    [
        ("wav2vec2-base-10h", "wav2vec2", 0.65, 0.5, 0.05, 10_000),
        ("wav2vec2-base-100h", "wav2vec2", 0.65, 0.5, 0.1, 0),
        ("wav2vec2-base-960h", "wav2vec2", 0.5, 0.1, 0.1, 0),
        ("wav2vec2-large-lv60-100h", "wav2vec2", 0.5, 0.5, 0.1, 10_000),
        ("hubert-base-10h", "hubert", 0.75, 0.5, 0.1, 10_000),
    ],
)
def test_the_published_masks_of_fairseq(
    name: str, kind: str, time: float, channel: float, layerdrop: float, head_alone_until: int
) -> None:
    recipe = load(name)
    backbone = recipe.backbone
    assert isinstance(backbone, Wav2Vec2) and backbone.kind == kind
    assert (backbone.mask_time_prob, backbone.mask_time_length) == (time, 10)
    assert (backbone.mask_channel_prob, backbone.mask_channel_length) == (channel, 64)
    assert (backbone.dropout, backbone.activation_dropout, backbone.layerdrop) == (0, 0.1, layerdrop)
    assert backbone.freeze_feature_encoder and backbone.normalize == ("lv60" in name)
    frozen = [(f.parts, f.but, f.after_steps, f.until_steps) for f in recipe.freeze]
    assert frozen == ([(["*"], ["head"], 0, head_alone_until)] if head_alone_until else [])


def test_ten_hours_are_all_of_libri_lights() -> None:
    subsets = load("wav2vec2-base-10h").data.train
    trees = ["9h", *(f"1h-{i}" for i in range(6))]
    assert subsets == [f"librilight-{tree}-{kind}" for tree in trees for kind in ("clean", "other")]
    assert load("hubert-base-10h").data.train == subsets


def test_wavlm_is_masked_as_the_script_does() -> None:
    recipe = load("wavlm-base-plus-100h")
    backbone = recipe.backbone
    assert isinstance(backbone, Wav2Vec2) and backbone.kind == "wavlm"
    assert (backbone.mask_time_prob, backbone.mask_time_length, backbone.mask_channel_prob) == (0.05, 10, 0)
    assert (backbone.dropout, backbone.activation_dropout, backbone.layerdrop) == (0, 0, 0)
    assert (recipe.schedule.kind, recipe.data.max_utterance) == ("linear", 20)


def test_whispers_adapters_are_as_published() -> None:
    recipe = load("whisper-small-en-lora")
    lora = recipe.lora
    assert lora is not None and (lora.rank, lora.alpha) == (16, 1)
    assert [(f.parts, f.is_forever) for f in recipe.freeze] == [(["feature_encoder", "encoder", "layer.*"], True)]
    assert set(lora.targets) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert load("whisper-small-en").lora is None


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
