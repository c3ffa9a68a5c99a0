"""What is drawn for an utterance: the same whoever reads it, and as much as the recipes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.worker import augment, masking, shims
from launcher.worker.backbone import SpeechModel
from launcher.worker.training_set import at_speed, samples_at
from tests.worker.backbones import make_wav2vec2, make_whisper, wav2vec2, whisper


def keys(count: int, subset: str = "train-clean-100", copy: int = 0) -> augment.Keys:
    return augment.keys_of(subset, np.arange(count), np.full(count, copy))


def test_another_utterance_copy_or_subset_has_another_key() -> None:
    found = np.concatenate([keys(50_000), keys(50_000, copy=1), keys(50_000, "train-other-500")])
    assert len(np.unique(found)) == 150_000
    assert (keys(100)[40:60] == augment.keys_of("train-clean-100", np.arange(40, 60), np.zeros(20, int))).all()


def test_a_choice_follows_from_seed_epoch_and_utterance() -> None:
    mine = keys(30_000)
    chosen = augment.choose(1, 0, mine, 3)
    assert (augment.choose(1, 0, mine[::-1], 3) == chosen[::-1]).all(), "whoever else is asked about"
    assert np.bincount(chosen).tolist() == pytest.approx([10_000] * 3, rel=0.05)
    for seed, epoch in ((1, 1), (2, 0)):
        other = augment.choose(seed, epoch, mine, 3)
        assert (other == chosen).mean() == pytest.approx(1 / 3, abs=0.02), "it says nothing about another"
    assert (augment.choose(1, 0, mine, 1) == 0).all()


def test_dice_are_an_utterance_s_own() -> None:
    mine = keys(3).tolist()
    first = [augment.dice(1, 0, key).random() for key in mine]
    assert first == [augment.dice(1, 0, key).random() for key in mine]
    assert len({*first, augment.dice(1, 1, mine[0]).random(), augment.dice(2, 0, mine[0]).random()}) == 5


# Masks ---------------------------------------------------------------------------------------------------------------


def fairseq_share(frames: int, prob: float, span: int, min_spans: int, rows: int) -> float:
    """What compute_mask_indices of fairseq (data/data_utils.py, static lengths) masks of rows of one length."""
    random, masked = np.random.default_rng(3), 0
    for _ in range(rows):
        spans = max(min_spans, int(prob * frames / span + random.random()))
        begins = random.choice(frames - span, spans, replace=False)
        masked += len({int(b) + k for b in begins for k in range(span)})
    return masked / rows / frames


@pytest.mark.parametrize(
    ("length", "prob", "span", "min_spans"),
    [(690, 0.65, 10, 2), (120, 0.65, 10, 2), (768, 0.5, 64, 0), (768, 0.1, 64, 0)],
)
def test_the_same_numbers_mask_as_much_as_fairseq_and_hugging_face(
    length: int, prob: float, span: int, min_spans: int
) -> None:
    """The recipe's values are those of fairseq's yaml files; base_100h has 0.65 by 10, and 0.5 by 64."""
    shims.apply()
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    rows = 1000
    dice = [augment.dice(1, 0, key) for key in range(rows)]
    ours = np.mean([augment.span_mask(d, length, prob, span, min_spans) for d in dice])
    np.random.seed(1)
    # A batch is rounded by one draw: rows in many batches.
    theirs = np.mean([_compute_mask_indices((10, length), prob, span, min_masks=min_spans) for _ in range(rows // 10)])
    assert ours == pytest.approx(theirs, abs=0.01)
    assert ours == pytest.approx(fairseq_share(length, prob, span, min_spans, rows), abs=0.01)
    if (length, prob) == (690, 0.65):
        assert ours == pytest.approx(0.49, abs=0.01), "what the docstring says of overlap"


def test_spans_are_whole_and_inside() -> None:
    for number in range(500):
        length = 1 + number % 60
        mask = augment.span_mask(augment.dice(1, 0, number), length, 0.65, 10, 2)
        assert mask.shape == (length,)
        assert length > 10 or not mask.all(), "something is left to be heard"
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        runs = edges[1::2] - edges[::2]
        assert len(runs) == 0 or runs.min() >= min(10, length - 1)
    assert not augment.span_mask(augment.dice(1, 0, 1), 100, 0.0, 10, 2).any()
    assert not augment.span_mask(augment.dice(1, 0, 1), 0, 0.65, 10, 2).any()


def test_one_span_is_as_wide_as_it_may_be_on_average_half() -> None:
    spans = np.array([augment.one_span(augment.dice(1, 0, k), 80, 15) for k in range(2000)])
    widths = spans[:, 1] - spans[:, 0]
    assert widths.min() == 0 and widths.max() == 14
    assert widths.mean() == pytest.approx(7, abs=0.3)
    assert spans.min() == 0 and spans[:, 1].max() <= 80


# In a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {"wav2vec2": make_wav2vec2(root / "wav2vec2"), "whisper": make_whisper(root / "whisper")}


def model_of(sources: dict[str, Path], kind: str) -> SpeechModel:
    from launcher.recipe import TinyCtc
    from launcher.worker.models import build

    if kind == "wav2vec2":
        return build(wav2vec2(sources[kind], activation_dropout=0), seed=1)
    if kind == "whisper":
        return build(whisper(sources[kind], spec_augment=True), seed=1)
    return build(TinyCtc(kind="tiny-ctc", hidden=32, layers=1, dropout=0), seed=1)


def heard(model: SpeechModel, lengths: list[int], keys: list[int], epoch: int | None) -> Any:
    """Losses of utterances that are told apart by key, after masking for an epoch."""
    sound = [
        0.1 * np.random.default_rng(key).standard_normal(n).astype(np.float32)
        for key, n in zip(keys, lengths, strict=True)
    ]
    batch = model.collate(sound, ["A B"] * len(sound))
    if epoch is not None:
        batch = model.augment(batch, [augment.dice(1, epoch, key) for key in keys])
    return model(batch)[0]


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper", "tiny-ctc"])
def test_masks_come_with_the_batch_and_hide_in_training_only(sources: dict[str, Path], kind: str) -> None:
    """No global dice decide: two ranks, or two attempts, at the same utterance in the same epoch hear the same."""
    model = model_of(sources, kind).train()
    lengths, mine = [16_000, 16_000, 16_000], [7, 8, 9]
    with torch.no_grad():
        first = heard(model, lengths, mine, epoch=0)
        np.random.seed(99)
        torch.manual_seed(99)
        assert torch.equal(first, heard(model, lengths, mine, epoch=0))
        assert not torch.equal(first, heard(model, lengths, mine, epoch=1))
        assert not torch.equal(first, heard(model, lengths, mine, epoch=None))
        torch.testing.assert_close(first[1:], heard(model, lengths[1:], mine[1:], epoch=0), rtol=1e-4, atol=1e-4)
        if kind != "whisper":  # whose features are masked before the model sees them, and only by training
            model.eval()
            assert torch.equal(heard(model, lengths, mine, epoch=0), heard(model, lengths, mine, epoch=None))


@pytest.mark.parametrize("masks", ["none", "empty", "some"])
def test_every_rank_has_the_same_graph_whatever_its_masks_hide(sources: dict[str, Path], masks: str) -> None:
    """transformers leaves the vector for masked frames out of the graph of a rank whose masks select nothing; plain
    data parallel then waits for its gradient for ever."""
    model = model_of(sources, "wav2vec2").train()
    batch = model.collate([np.ones(9_000, dtype=np.float32) * 0.1], ["A"])
    if masks != "none":
        batch = model.augment(batch, [augment.dice(1, 0, 1)])
        assert batch[masking.FRAMES].any() and batch[masking.FRAMES].dtype == torch.bool
        if masks == "empty":
            batch[masking.FRAMES][:] = False
    model(batch)[0].sum().backward()
    assert [name for name, p in model.trained() if p.grad is None] == []


def test_padding_is_never_masked(sources: dict[str, Path]) -> None:
    model = model_of(sources, "wav2vec2")
    batch = model.collate([np.ones(n, dtype=np.float32) for n in (16_000, 4_000)], ["A", "A"])
    batch["inputs"] = torch.nn.functional.pad(batch["inputs"], (0, 4_000))
    batch = model.augment(batch, [augment.dice(1, 0, key) for key in (1, 2)])
    frames = batch[masking.FRAMES]
    assert frames.shape == (2, 250)  # 200 a second in this small one
    assert not frames[0, 200:].any() and not frames[1, 50:].any()
    assert frames[1, :50].any()


# Speed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [0.9, 1.1, 0.83])
@pytest.mark.parametrize("n_samples", [1, 159, 16_000, 222_223])
def test_sound_is_as_long_as_was_planned(speed: float, n_samples: int) -> None:
    from torchaudio.functional import resample

    sound = np.random.default_rng(1).standard_normal(n_samples).astype(np.float32)
    planned = int(samples_at(np.array([n_samples]), speed)[0])
    played = at_speed(sound, speed, planned)
    assert played.shape == (planned,) and played.dtype == np.float32
    assert planned == pytest.approx(n_samples / speed, abs=1)
    theirs = resample(torch.from_numpy(sound), round(16_000 * speed), 16_000).numpy()
    assert abs(len(theirs) - planned) <= 1
    np.testing.assert_allclose(theirs[:planned], played[: len(theirs)], atol=1e-4)


def test_a_tone_is_higher_at_a_higher_speed() -> None:
    tone = np.sin(2 * np.pi * 400 * np.arange(16_000) / 16_000).astype(np.float32)
    played = at_speed(tone, 1.1, int(samples_at(np.array([16_000]), 1.1)[0]))
    spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
    assert np.argmax(spectrum) * 16_000 / len(played) == pytest.approx(440, abs=1)
