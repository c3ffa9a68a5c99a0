"""Pretrained models behind one face: shapes, what is refused, padding, export; and both kinds under ZeRO on two ranks.

The models have the real architectures and random weights (`backbones.py`). Real weights are in `test_real_speech.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher import recipe as schema
from launcher.errors import DataError, NotFoundError, UsageError
from launcher.rundir import Run, read_json, read_lines
from launcher.worker import __main__ as worker
from launcher.worker import masking, vocabulary
from launcher.worker.backbone import SpeechModel
from launcher.worker.data import Waveform
from launcher.worker.models import build, load_export, skeleton, write_export
from launcher.worker.pack import write_pack
from tests.worker.backbones import make_wav2vec2, make_whisper, wav2vec2, whisper, whisper_ctc
from tests.worker.groups import prepared, trained_together
from tests.worker.transcripts import transcribe


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`group` and `layer`: wav2vec2 with that norm. `whisper`."""
    root = tmp_path_factory.mktemp("backbones")
    made = {norm: make_wav2vec2(root / norm, norm) for norm in ("group", "layer")}
    others = {name: make_wav2vec2(root / name, family=f) for name, f in (("hubert", "Hubert"), ("wavlm", "WavLM"))}
    return {**made, **others, "whisper": make_whisper(root / "whisper")}


def backbone(sources: dict[str, Path], kind: str) -> schema.Backbone:
    if kind == "whisper-ctc":
        return whisper_ctc(sources["whisper"])
    family = {"kind": kind} if kind in ("hubert", "wavlm") else {}
    return whisper(sources[kind]) if kind == "whisper" else wav2vec2(sources[kind], **family)


def made(value: schema.Backbone, seed: int = 1) -> Any:
    return build(value, seed=seed).eval()


def noise(*n_samples: int) -> list[Waveform]:
    return [np.random.default_rng(n).standard_normal(n).astype(np.float32) * 0.1 for n in n_samples]


def hear(model: SpeechModel, waveforms: list[Waveform], texts: list[str]) -> tuple[list[float], list[str]]:
    with torch.no_grad():
        losses, heard = model(model.collate(waveforms, texts), transcribe=True)
    return losses.tolist(), heard


LENGTHS = np.dtype([("n_samples", "i8"), ("n_chars", "i8"), ("ctc_frames", "i8")])

# Batches -------------------------------------------------------------------------------------------------------------


def test_ctc_batch(sources: dict[str, Path]) -> None:
    batch = made(wav2vec2(sources["group"])).collate(noise(16_000, 9_000), ["HI YOU", "A"])
    assert batch["inputs"].shape == (2, 16_000)
    assert batch["lengths"].tolist() == [16_000, 9_000]
    assert batch["inputs"][1, 9_000:].abs().sum() == 0
    assert batch["labels"].tolist() == [vocabulary.encode("HI YOU"), vocabulary.encode("A") + [0] * 5]
    assert batch["label_lengths"].tolist() == [6, 1]


def test_normalized_batch_has_zero_mean_and_unit_variance(sources: dict[str, Path]) -> None:
    model = made(wav2vec2(sources["layer"], normalize=True))
    batch = model.collate([w * 7 + 1 for w in noise(16_000, 9_000)], ["A", "A"])
    for row, n in zip(batch["inputs"], (16_000, 9_000), strict=True):
        assert row[:n].mean().item() == pytest.approx(0, abs=1e-4)
        assert row[:n].std().item() == pytest.approx(1, abs=1e-3)
    assert batch["inputs"][1, 9_000:].abs().sum() == 0  # padding comes after, and stays silent


def test_whisper_batch(sources: dict[str, Path]) -> None:
    model = made(whisper(sources["whisper"]))
    batch = model.collate(noise(16_000, 32 * 16_000), ["HI", "A"])
    assert batch["inputs"].shape == (2, 80, 3000)  # 30 s, whatever the length
    tokenizer = model.tokenizer
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in labels] == [" hi", " a"]
    start, end = model.model.config.decoder_start_token_id, model.model.config.eos_token_id
    assert all(row[-1] == end and start not in row for row in labels)
    long = model.collate(noise(16_000), ["A" * 100])["labels"]
    assert long.shape == (1, 64)  # as many as the decoder has positions


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("n_samples", [80, 400, 5_599, 5_600, 16_000])
def test_frames_says_what_forward_returns(sources: dict[str, Path], kind: str, n_samples: int) -> None:
    value = wav2vec2(sources[kind])
    model = made(value).eval()
    with torch.no_grad():
        logits, frames = model.logits(model.collate(noise(n_samples), ["A"]))
    assert logits.shape == (1, int(frames[0]), len(vocabulary.LETTERS))
    empty: Any = skeleton(value)
    assert model.frames(np.array([n_samples])).tolist() == frames.tolist()
    assert empty.frames(np.array([n_samples])).tolist() == frames.tolist()


def test_less_than_one_frame_is_heard_as_nothing(sources: dict[str, Path]) -> None:
    for kind in ("group", "layer"):
        losses, texts = hear(made(wav2vec2(sources[kind])).eval(), noise(60), ["A"])
        assert (losses, texts) == ([0.0], [""])


def test_feasible_ctc(sources: dict[str, Path]) -> None:
    """200 frames a second: no letter without a frame, none shorter than a masked span, no unknown letters."""
    rows = [(16_000, 9, 9), (16_000, 99, 201), (16_000, 99, 200), (700, 1, 1), (16_000, 9, 0)]
    lengths = np.array(rows, dtype=LENGTHS)
    masked = made(wav2vec2(sources["group"], mask_time_length=10))
    assert masked.feasible(lengths).tolist() == [True, False, True, False, False]
    plain = made(wav2vec2(sources["group"], mask_time_prob=0))
    assert plain.feasible(lengths).tolist() == [True, False, True, True, False]


def test_feasible_whisper(sources: dict[str, Path]) -> None:
    lengths = np.array([(30 * 16_000, 9, 9), (30 * 16_000 + 1, 9, 9)], dtype=LENGTHS)
    model = made(whisper(sources["whisper"]))
    assert model.feasible(lengths).tolist() == [True, False]
    assert model.padded_samples(np.array([1, 480_001])).tolist() == [480_000, 480_000]
    assert model.max_samples == 480_000


@pytest.mark.parametrize("kind", ["tiny-ctc", "group", "layer", "whisper", "hubert", "wavlm", "whisper-ctc"])
def test_every_parameter_is_in_one_part_and_the_parts_are_in_order(sources: dict[str, Path], kind: str) -> None:
    value = schema.TinyCtc(kind="tiny-ctc", hidden=8, layers=2) if kind == "tiny-ctc" else backbone(sources, kind)
    model = made(value)
    parts = model.parts()
    for name, _ in model.named_parameters():
        assert len([part for part, starts in parts.items() if name.startswith(tuple(starts))]) == 1, name
    order = ["feature_encoder", "encoder", "layer.0", "layer.1", "decoder", "decoder_layer.0", "head"]
    assert list(parts) == [part for part in order if part in parts]
    assert {"feature_encoder", "layer.0", "head"} <= set(parts)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_layer_norm_model_does_not_hear_padding(sources: dict[str, Path]) -> None:
    model = made(wav2vec2(sources["layer"])).eval()
    short, long = noise(7_123, 16_000)
    alone, texts = hear(model, [short], ["HELLO"])
    padded, both = hear(model, [short, long], ["HELLO", "A"])
    assert padded[0] == pytest.approx(alone[0], rel=1e-4)
    assert both[0] == texts[0]


def test_masks_follow_the_pretraining(sources: dict[str, Path]) -> None:
    """Group-norm models never saw a mask, layer-norm models always did."""
    seen: dict[str, Any] = {}
    for kind in ("group", "layer"):
        model = made(wav2vec2(sources[kind])).eval()
        whole = model.body.forward

        def forward(*rest: Any, kind: str = kind, whole: Any = whole, **named: Any) -> Any:
            seen[kind] = named["attention_mask"]
            return whole(*rest, **named)

        model.body.forward = forward
        hear(model, noise(8_000, 16_000), ["A", "A"])
    assert seen["group"] is None
    assert seen["layer"].sum(1).tolist() == [8_000, 16_000]


def says(folder: Path, **values: Any) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(**values).save_pretrained(folder)


def test_a_checkpoint_says_how_it_listens(sources: dict[str, Path], tmp_path: Path) -> None:
    """By its preprocessor, or else by its architecture; and a recipe that contradicts a layer-norm model is refused."""
    heard = {kind: made(wav2vec2(sources[kind])) for kind in ("group", "layer")}
    assert {kind: (m.normalize, m.masked) for kind, m in heard.items()} == {
        "group": (False, False),
        "layer": (True, True),
    }
    with pytest.raises(UsageError, match=r"normalize is false, and .* was pretrained on each utterance normalized"):
        made(wav2vec2(sources["layer"], normalize=False))
    for kind in ("group", "layer"):
        shutil.copytree(sources[kind], tmp_path / kind)
    says(tmp_path / "group", do_normalize=True, return_attention_mask=False)
    says(tmp_path / "layer", do_normalize=False, return_attention_mask=True)
    assert made(wav2vec2(tmp_path / "group")).normalize and not made(wav2vec2(tmp_path / "layer")).normalize
    assert not made(wav2vec2(tmp_path / "group", normalize=False)).normalize
    with pytest.raises(UsageError, match="was pretrained on the waveform as it is"):
        made(wav2vec2(tmp_path / "layer", normalize=True))
    says(tmp_path / "layer", sampling_rate=8_000)
    with pytest.raises(DataError, match="hears 8000 Hz"):
        made(wav2vec2(tmp_path / "layer"))


def test_a_group_norm_model_hears_the_same_normalized_or_not(sources: dict[str, Path]) -> None:
    """Its first convolution's norm, over time, takes scale and offset out: so the recipe may say either."""
    losses = []
    for normalize in (False, True):
        model = made(wav2vec2(sources["group"], normalize=normalize)).eval()
        losses.append(hear(model, [w + 0.05 for w in noise(16_000)], ["HELLO"])[0][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_masks_that_the_batch_brings(sources: dict[str, Path]) -> None:
    """They alone are laid over it; and where they mask nothing, their vector has a gradient all the same."""
    model = made(wav2vec2(sources["layer"], activation_dropout=0)).train()
    batch = model.collate(noise(16_000, 9_000), ["HELLO", "A"])
    frames, width = 200, model.model.config.hidden_size
    none = {masking.FRAMES: torch.zeros(2, frames, dtype=torch.bool), masking.CHANNELS: torch.zeros(2, width).bool()}
    unmasked = model({**batch, **none})[0]
    unmasked.sum().backward()
    assert model.body.masked_spec_embed.grad is not None
    with torch.no_grad():
        assert unmasked.tolist() == pytest.approx(model.eval()(batch)[0].tolist(), rel=1e-5)
        model.train()
        assert model({**batch, **none})[0].tolist() == pytest.approx(unmasked.tolist(), rel=1e-5)
        some = {**none, masking.FRAMES: torch.arange(frames).expand(2, -1) < 40}
        masked = model({**batch, **some})[0]
        assert masked.tolist() == model({**batch, **some})[0].tolist() != unmasked.tolist()
        model.body.masked_spec_embed.add_(1)
        assert model({**batch, **some})[0].tolist() != masked.tolist()


def test_no_code_of_a_checkpoint_runs(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources["group"], folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    named = dict.fromkeys(("AutoConfig", "AutoModelForCTC", "AutoModel"), "evil.Model")
    change(folder / "config.json", auto_map=named)
    made(wav2vec2(folder))
    assert not (tmp_path / "ran").exists()


def test_statistics_of_each_rank_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """A HuBERT with batch norm in its positional convolution: each rank would gather statistics of its own."""
    shutil.copytree(sources["group"], tmp_path / "source")
    change(tmp_path / "source" / "config.json", model_type="hubert", conv_pos_batch_norm=True)
    with pytest.raises(DataError, match="batch norm in its positional convolution"):
        made(wav2vec2(tmp_path / "source", kind="hubert"))


def test_a_head_is_kept_where_its_classes_are_the_same(tmp_path: Path) -> None:
    """Of as many classes of another vocabulary it would be another's."""
    from launcher.worker.vocabulary import LETTERS, Characters

    source = make_wav2vec2(tmp_path / "source", head=True)
    bias = torch.arange(32.0)
    first = made(wav2vec2(source))
    first.model.lm_head.bias.data.copy_(bias)
    first.export(tmp_path / "export")
    assert torch.equal(made(wav2vec2(tmp_path / "export")).model.lm_head.bias.data, bias)
    shuffled = Characters((*LETTERS[:5], *sorted(LETTERS[5:])), "keep")
    value = wav2vec2(tmp_path / "export", vocabulary={"kind": "characters"})
    other: Any = build(value, seed=1, vocabulary=shuffled)
    assert len(other.model.lm_head.bias) == 32 and not other.model.lm_head.bias.data.any()


@pytest.mark.parametrize("kind", ["group", "layer", "whisper", "wavlm", "whisper-ctc"])
def test_bf16_casts_its_inputs_and_keeps_the_loss_in_fp32(sources: dict[str, Path], kind: str) -> None:
    model = made(backbone(sources, kind)).eval()
    waveforms, texts = noise(16_000, 9_000), ["HELLO", "A B"]
    wanted, _ = hear(model, waveforms, texts)
    model = model.to(torch.bfloat16)
    losses, _ = model(model.collate(waveforms, texts), transcribe=True)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(wanted, rel=0.03)
    model.train()(model.collate(waveforms, texts))[0].sum().backward()


@pytest.mark.parametrize("kind", ["group", "layer", "whisper", "hubert", "wavlm", "whisper-ctc"])
def test_gradient_reaches_everything_that_is_trained(sources: dict[str, Path], kind: str) -> None:
    """Whatever is trained must get a gradient at every step: plain data parallel waits for it."""
    plain = {"mask_time_prob": 0.0, "mask_channel_prob": 0.0}
    for value in [backbone(sources, kind)] + [backbone(sources, kind).model_copy(update=plain)] * (
        not kind.startswith("whisper")
    ):
        model = made(value).train()
        model(model.collate(noise(16_000, 9_000), ["HELLO", "A B"]))[0].sum().backward()
        assert [name for name, p in model.trained() if p.grad is None] == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all("feature_extractor" in n or "masked_spec_embed" in n or "embed_positions" in n for n in frozen), frozen


@pytest.mark.parametrize("kind", ["group", "layer", "whisper"])
def test_what_is_built_is_to_be_trained(sources: dict[str, Path], kind: str) -> None:
    """Transformers hands over a pretrained model in the mode for use: dropout and masks began with the first
    evaluation, which leaves the mode for training behind."""
    assert all(module.training for module in build(backbone(sources, kind), seed=1).modules())


def test_a_seed_gives_the_same_fresh_head(sources: dict[str, Path]) -> None:
    weights = [made(wav2vec2(sources["group"]), seed=s).model.lm_head.weight for s in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_skeleton_has_the_same_parameters(sources: dict[str, Path]) -> None:
    for kind in sources:
        value = backbone(sources, kind)
        shapes = [
            {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
            for model in (made(value), skeleton(value))
        ]
        assert shapes[0] == shapes[1]


def test_a_published_checkpoint_is_taken_whole(tmp_path: Path) -> None:
    """Those of the hub are pretraining models with more heads, and have older names for the weight norm."""
    from safetensors.torch import load_file, save_file
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    make_wav2vec2(tmp_path)
    config = Wav2Vec2Config.from_pretrained(tmp_path, codevector_dim=16, proj_codevector_dim=16)
    published = Wav2Vec2ForPreTraining(config)
    published.save_pretrained(tmp_path)
    newer = "conv.parametrizations.weight.original"
    weights = load_file(tmp_path / "model.safetensors").items()
    older = {k.replace(f"{newer}0", "conv.weight_g").replace(f"{newer}1", "conv.weight_v"): v for k, v in weights}
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in older
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mine = made(wav2vec2(tmp_path)).model.wav2vec2.state_dict()
    theirs = published.wav2vec2.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


# What is refused -----------------------------------------------------------------------------------------------------


def no_directory(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5_000)


def other_kind(folder: Path) -> None:
    change(folder / "config.json", model_type="hubert")


def other_width(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=48)


def deeper(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=3)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_directory, "no such directory"),
        (no_config, "no config.json"),
        (broken_config, "config.json does not say model_type"),
        (no_weights, "expected model.safetensors"),
        (pickled_weights, "expected model.safetensors, found config.json, pytorch_model.bin"),
        (cut_weights, "cannot load wav2vec2"),
        (other_kind, "a hubert model, the recipe says kind: wav2vec2"),
        (other_width, "or has them in another shape: wav2vec2.encoder.layers.0.feed_forward"),
        (deeper, "lacks 16 weights of wav2vec2"),
    ],
)
def test_a_source_that_cannot_be_used(
    sources: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    """transformers itself would make up what is missing, and training would start from noise."""
    folder = tmp_path / "source"
    shutil.copytree(sources["group"], folder)
    damage(folder)
    with pytest.raises(DataError) as caught:
        made(wav2vec2(folder))
    assert words in caught.value.message and str(folder) in caught.value.message
    assert caught.value.exit_code == 5


def test_values_that_do_not_fit_the_source(sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="mask_channel_length 64 is more than the 32 channels"):
        made(wav2vec2(sources["group"], mask_channel_length=64))
    with pytest.raises(UsageError, match="max_new_tokens 200 does not fit the 64 positions"):
        made(whisper(sources["whisper"], max_new_tokens=200))


# Export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny-ctc", "group", "layer", "whisper"])
def test_an_export_hears_the_same(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    value = schema.TinyCtc(kind="tiny-ctc", hidden=8, layers=1) if kind == "tiny-ctc" else backbone(sources, kind)
    model = made(value, seed=3).eval()
    write_export(model, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".txt"}  # nothing pickled
    again = load_export(tmp_path)
    waveforms, texts = noise(16_000, 9_000), ["HELLO", "A B"]
    assert hear(again, waveforms, texts) == hear(model, waveforms, texts)


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_plain_transformers_hears_the_same_wav2vec2(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor

    model = made(wav2vec2(sources[kind], normalize=kind == "layer"), seed=3).eval()
    model.model.lm_head.bias.data[1:4] = -100  # a trained model never writes <s>, which they would print
    write_export(model, tmp_path)
    processor = Wav2Vec2Processor.from_pretrained(tmp_path)
    theirs = Wav2Vec2ForCTC.from_pretrained(tmp_path).eval()
    waveform = noise(16_000)[0]
    inputs = processor(waveform, sampling_rate=16_000, return_tensors="pt")
    assert ("attention_mask" in inputs) is (kind == "layer")
    with torch.no_grad():
        ids = theirs(**inputs).logits.argmax(-1)
    # Their decoder keeps the white space that ours strips from both ends.
    assert " ".join(processor.batch_decode(ids)[0].split()) == hear(model, [waveform], ["A"])[1][0] != ""


def test_plain_transformers_hears_the_same_whisper(sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

    model = made(whisper(sources["whisper"]), seed=3).eval()
    write_export(model, tmp_path)
    processor = WhisperProcessor.from_pretrained(tmp_path)
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    waveform = noise(16_000)[0]
    inputs = processor(waveform, sampling_rate=16_000, return_tensors="pt")
    ids = theirs.generate(inputs.input_features, max_new_tokens=24, force_unique_generate_call=True)
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert text == hear(model, [waveform], ["A"])[1][0] != ""
    ours, source = (GenerationConfig.from_pretrained(p).to_dict() for p in (tmp_path, sources["whisper"]))
    assert ours == source


def no_record(folder: Path) -> None:
    (folder / "speechctl.json").unlink()


def odd_record(folder: Path) -> None:
    (folder / "speechctl.json").write_text('{"kind": "tiny-ctc", "hidden": "wide"}')


def no_json(folder: Path) -> None:
    (folder / "speechctl.json").write_text("[]")


@pytest.mark.parametrize("damage", [no_record, odd_record, no_json, no_weights, cut_weights])
def test_a_directory_that_is_no_export(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_export(made(schema.TinyCtc(kind="tiny-ctc", hidden=8, layers=1)), tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        load_export(tmp_path)
    assert str(tmp_path) in caught.value.message and "speechctl export RUN" in caught.value.hint
    with pytest.raises(NotFoundError):
        load_export(tmp_path / "nowhere")


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker binds itself to its parent's life, which the process of the tests must not."""
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)


# Two ranks -----------------------------------------------------------------------------------------------------------

RUNS = {
    # name: (source, ZeRO stage, precision)
    "ctc-2": ("layer", 2, "fp32"),
    "ctc-3": ("layer", 3, "fp32"),
    "ctc-bf16": ("group", 2, "bf16"),
    "ctc-bf16-3": ("group", 3, "bf16"),
    "words-2": ("whisper", 2, "fp32"),
    "words-3": ("whisper", 3, "fp32"),
    "words-bf16": ("whisper", 2, "bf16"),
    "words-bf16-3": ("whisper", 3, "bf16"),
}


def heard(run: Run, step: int) -> list[str]:
    return [row["text"] for row in read_lines(run.hypotheses(step))]


@pytest.mark.ranks
@pytest.mark.usefixtures("unbound")
def test_backbones_under_zero_on_two_ranks(
    sources: dict[str, Path], tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both kinds train, evaluate together and seal at ZeRO 2 and 3, in fp32 and bf16, all in one process group.

    Evaluation at stage 3 gathers weights as it goes, and a rank that wrote its transcripts must wait for the others:
    it hangs where the ranks do not take the same steps. Five utterances in five batches leave one rank without its
    last. The same weights give the same transcripts at both stages.
    """
    (tmp_path / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(tiny_corpus, subset, tmp_path / "packs" / subset, 2**20, 1, lambda _: None)
    attempts = [
        prepared(tmp_path, name, backbone(sources, kind), stage, precision)
        for name, (kind, stage, precision) in RUNS.items()
    ]
    trained_together(Path(__file__).with_name("stages.py"), attempts, tmp_path)
    runs = {name: Run(tmp_path / name) for name in RUNS}
    losses = {name: [m["loss"] for m in read_lines(run.attempts()[0].metrics)] for name, run in runs.items()}
    for name, run in runs.items():
        assert len(losses[name]) == 5 and min(losses[name]) > 0, name
        assert run.sealed_steps() == [5], name
        assert [read_json(run.evaluation(step))["utterances"] for step in (0, 5)] == [5, 5], name
        assert all(heard(run, 0)), name
    for two, three in (("ctc-2", "ctc-3"), ("words-2", "words-3")):
        assert heard(runs[two], 0) == heard(runs[three], 0)
        assert read_json(runs[two].evaluation(0))["loss"] == pytest.approx(
            read_json(runs[three].evaluation(0))["loss"], rel=1e-5
        )
        assert losses[two] == pytest.approx(losses[three], rel=1e-4)
        assert heard(runs[two], 5) == heard(runs[three], 5)
    for name in ("ctc-bf16", "words-bf16"):
        assert losses[name] == pytest.approx(losses[f"{name}-3"], rel=0.03)
    # What was sealed is what was heard, frozen weights and all.
    for name in ("ctc-2", "ctc-3", "words-3"):
        target = tmp_path / "exports" / name
        worker.main(["export", str(runs[name].root), "--step", "5", "--target", str(target)])
        rows = read_lines(runs[name].hypotheses(5))
        files = [next(tiny_corpus.rglob(f"{row['utt_id']}.flac")) for row in rows]
        capsys.readouterr()
        code, out, err = transcribe(capsys, target, *files)
        assert code == 0, err
        assert [line.partition("\t")[2] for line in out.splitlines()] == [row["text"] for row in rows], name
