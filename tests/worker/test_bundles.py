"""torchaudio's bundles: the same model under transformers' names, and nothing unpickled that the recipe does not name.

Their weights are on a server; what stands in for them here is made by torchaudio's own constructors.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher import bundle_cache
from launcher.errors import DataError, UsageError
from launcher.worker import bundles, shims
from launcher.worker.models import build, skeleton
from tests.worker.backbones import wav2vec2

shims.apply()

from torchaudio import models, pipelines  # noqa: E402  (after the shims)

PARAMETERS: dict[str, Any] = {
    "extractor_conv_layer_config": [(16, 10, 10), (16, 8, 8)],
    "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1,
    "encoder_layer_drop": 0.1,
}


def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, layer: bool) -> tuple[Any, Path]:
    """A bundle of this name, with a head of fairseq's 32 classes in its file; and that file where torch looks."""
    norm = {"extractor_mode": "layer_norm" if layer else "group_norm", "extractor_conv_bias": layer}
    parameters = {**PARAMETERS, **norm, "encoder_layer_norm_first": layer, "aux_num_out": 32}
    make = models.wav2vec2_model
    if name.startswith("WAVLM"):
        parameters |= {"encoder_num_buckets": 20, "encoder_max_distance": 40}
        make = models.wavlm_model
    torch.manual_seed(3)
    theirs = make(**parameters).eval()
    kind = "WavLM" if name.startswith("WAVLM") else "Wav2Vec2"
    labels = pipelines.WAV2VEC2_ASR_BASE_960H._labels
    made = pipelines.Wav2Vec2ASRBundle("tiny.pth", parameters, 16_000, layer, kind, _labels=labels)
    monkeypatch.setattr(pipelines, name, made, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "torch" / "hub" / "checkpoints" / "tiny.pth"
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    return theirs, file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's own
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("name", ["WAV2VEC2_TINY", "HUBERT_TINY", "WAVLM_TINY"])
def test_a_bundle_is_the_same_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, layer: bool) -> None:
    theirs, file = published(monkeypatch, tmp_path, name, layer)
    source, revision = bundle_cache.PREFIX + name, sha256(file)
    folder = bundles.fetch(source, revision)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    assert bundles.fetch(source, revision) == folder
    kind = bundles.kind_of(name)
    value = wav2vec2(Path("x"), kind=kind).model_copy(update={"source": source, "revision": revision})
    ours: Any = build(value, seed=1).eval()
    assert (ours.normalize, ours.masked, ours.backbone.source) == (layer, layer, source)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, skeleton(value))]
    assert sizes[0] == sizes[1]
    random = np.random.default_rng(2)
    waveform = (0.1 * random.standard_normal(9_000)).astype(np.float32)
    with torch.no_grad():
        tensors = ours.collate([waveform], ["A"])
        logits, frames = ours.logits(tensors)
        wanted, _ = theirs(tensors["inputs"])
    assert logits.shape == wanted.shape == (1, int(frames[0]), 32)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["WAV2VEC2_BASE", "HUBERT_LARGE", "WAVLM_LARGE", "VOXPOPULI_ASR_BASE_10K_DE"])
def test_published_bundles_have_our_weights(name: str) -> None:
    """By name and shape, without any weights. The German one has a head of 32 classes that are not ours."""
    import transformers

    described, kind = bundles.bundle(bundle_cache.PREFIX + name), bundles.kind_of(name)
    make = models.wavlm_model if kind == "wavlm" else models.wav2vec2_model
    family = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}[kind]
    with torch.device("meta"):
        theirs = bundles.renamed(make(**described._params).state_dict(), kind, head=False)
        ours = getattr(transformers, f"{family}ForCTC")(bundles.config(described._params, kind)).state_dict()
    shapes = {n: t.shape for n, t in ours.items() if not n.startswith("lm_head") and "masked_spec_embed" not in n}
    assert {n: t.shape for n, t in theirs.items()} == shapes


def test_nothing_is_opened_that_the_recipe_does_not_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, file = published(monkeypatch, tmp_path, "HUBERT_TINY", False)
    source, opened = "torchaudio:HUBERT_TINY", []
    monkeypatch.setattr(torch, "load", lambda *_, **__: opened.append(1))
    with pytest.raises(UsageError, match=f"set backbone.revision to {sha256(file)}"):
        bundles.fetch(source, None)
    with pytest.raises(DataError, match=r"and backbone.revision says 0000.*it was not opened"):
        bundles.fetch(source, "0" * 64)
    assert not opened and not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="is not at") as caught:
        build(wav2vec2(Path("x"), kind="hubert").model_copy(update={"source": source}), seed=1)
    assert "speechctl prepare RECIPE --fix" in caught.value.hint


def test_a_pickle_that_runs_something_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the recipe names its hash."""
    _, file = published(monkeypatch, tmp_path, "HUBERT_TINY", False)

    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"aux.bias": Runs()}, file)
    with pytest.raises(DataError, match="is no file of weights"):
        bundles.fetch("torchaudio:HUBERT_TINY", sha256(file))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()


def test_names_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="torchaudio has no bundle HUBERT") as caught:
        bundles.bundle("torchaudio:HUBERT")
    assert "HUBERT_BASE" in caught.value.hint
    with pytest.raises(UsageError, match="a wavlm model, the recipe says kind: hubert"):
        bundles.bundle("torchaudio:WAVLM_BASE", "hubert")
