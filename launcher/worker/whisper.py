"""Whisper: with its decoder as a sequence-to-sequence model, and its encoder with a CTC head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher import recipe as schema
from launcher.errors import UsageError
from launcher.worker import ctc_processor, masking, shims
from launcher.worker.backbone import CtcModel, IntArray, SpeechModel, layer_parts, pretrained, quiet_transformers
from launcher.worker.data import Tensors, Waveform
from launcher.worker.layer_drop import LayerDrop
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.vocabulary import Vocabulary, load

MAX_SAMPLES = 30 * SAMPLE_RATE_HZ
HEAD = "ctc_head.safetensors"
"""`weight` and `bias` of the head over Whisper's encoder, beside the encoder that transformers loads."""

HOP = 160
"""Samples from one column of a spectrum to the next: 10 ms."""

_SAMPLES_A_FRAME = 2 * HOP  # a convolution of stride 2


def _source(backbone: schema.Whisper | schema.WhisperCtc) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": backbone.source, "revision": backbone.revision}


def _config(backbone: schema.Whisper | schema.WhisperCtc) -> Any:
    from transformers import WhisperConfig

    config = WhisperConfig.from_pretrained(**_source(backbone))
    dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), backbone.dropout)
    # `layer_drop.py` drops layers, and what is masked is of the spectrum's own two masks.
    config.update({**dropout, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False})
    return config


def _spectra(extractor: Any, waveforms: Sequence[Waveform]) -> Tensor:
    """(batch, mels, 3000) of 30 s each."""
    features: Tensor = extractor(list(waveforms), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
    return features


def _hidden(backbone: schema.Whisper | schema.WhisperCtc, tensors: Tensors, dice: masking.Dice) -> Tensors:
    """SpecAugment, laid over the spectra themselves: they are made here, not in the model."""
    if not backbone.spec_augment:
        return tensors
    spectra = tensors["inputs"]
    frames = (-(-tensors["lengths"] // HOP)).clamp(1, spectra.shape[2]).tolist()
    spans = masking.spec_spans(dice, frames, spectra.shape[1], widest_time=100, widest_band=27)
    return {**tensors, "inputs": masking.hidden_by(spectra, spans[masking.TIME_SPAN], spans[masking.BAND_SPAN])}


def _encoder_parts(prefix: str, layers: int) -> dict[str, list[str]]:
    return {
        "feature_encoder": [prefix + "conv1.", prefix + "conv2."],
        "encoder": [prefix + "embed_positions."],
        **layer_parts("layer", prefix + "layers.", layers, after=[prefix + "layer_norm."]),
    }


class WhisperModel(SpeechModel):
    """Words by a decoder: loss of an utterance is the mean over its tokens."""

    max_samples = MAX_SAMPLES

    def __init__(self, backbone: schema.Whisper, weights: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        shims.apply()
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

        config = _config(backbone)
        if backbone.max_new_tokens > config.max_target_positions - 8:
            raise UsageError(
                f"backbone.max_new_tokens {backbone.max_new_tokens} does not fit the {config.max_target_positions}"
                f" positions of {backbone.source}, a few of which its prompt takes",
                hint=f"set backbone.max_new_tokens to {config.max_target_positions - 8} or less",
            )
        kind = WhisperForConditionalGeneration
        self.model = pretrained(kind, backbone, config) if weights else kind(config)
        # Sinusoids; transformers 5 forgets on loading that they are fixed.
        self.model.get_encoder().embed_positions.requires_grad_(False)
        self.layer_drop = LayerDrop(self.model.get_encoder().layers, backbone.layerdrop, seed)
        self.extractor = WhisperFeatureExtractor.from_pretrained(**_source(backbone))
        multilingual = bool(getattr(self.model.generation_config, "is_multilingual", False))
        self.language = {"language": "english", "task": "transcribe"} if multilingual else {}
        self.tokenizer = WhisperTokenizerFast.from_pretrained(**_source(backbone), **self.language)

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        assert isinstance(self.backbone, schema.Whisper)
        if self.backbone.case == "lower":
            texts = [text.lower() for text in texts]
        rows = self.tokenizer([f" {text}" for text in texts]).input_ids  # a leading space is how Whisper begins a text
        # The model puts the start token in front by itself, and has no positions beyond its last.
        start, limit = self.model.config.decoder_start_token_id, self.model.config.max_target_positions
        labels = [torch.tensor(row[1:] if row[0] == start else row)[:limit] for row in rows]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64)
        return {"inputs": _spectra(self.extractor, waveforms), "lengths": lengths, "labels": padded}

    def augment(self, tensors: Tensors, dice: masking.Dice) -> Tensors:
        assert isinstance(self.backbone, schema.Whisper)
        return _hidden(self.backbone, tensors, dice)

    def forward(self, tensors: Tensors, transcribe: bool = False, in_step: bool = False) -> tuple[Tensor, list[str]]:
        assert isinstance(self.backbone, schema.Whisper)
        inputs, labels = tensors["inputs"], tensors["labels"]
        inputs = inputs.to(self.model.get_input_embeddings().weight.dtype)
        # The encoder takes nearly all of the time, so loss and transcript share it.
        heard = self.model.get_encoder()(inputs)
        logits = self.model(encoder_outputs=heard, labels=labels).logits.float()
        tokens = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        losses = tokens.sum(1) / (labels != -100).sum(1)
        if not transcribe:
            return losses, []
        with quiet_transformers():
            written = self.model.generate(
                inputs,
                encoder_outputs=heard,
                max_new_tokens=self.backbone.max_new_tokens,
                do_sample=False,
                num_beams=1,
                synced_gpus=in_step,
                # A stray timestamp would make this rank decode the 30 s once more, and the others wait for ever.
                force_unique_generate_call=True,
                **self.language,
            )
        return losses, [t.strip() for t in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def padded_samples(self, n_samples: IntArray) -> IntArray:
        return np.full_like(n_samples, self.max_samples)

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        # A longer one would be cut at 30 s while its text is not.
        return lengths["n_samples"] <= self.max_samples

    def parts(self) -> dict[str, list[str]]:
        decoder, config = "model.model.decoder.", self.model.config
        return {
            **_encoder_parts("model.model.encoder.", config.encoder_layers),
            "decoder": [decoder + "embed_tokens.", decoder + "embed_positions."],
            **layer_parts("decoder_layer", decoder + "layers.", config.decoder_layers, after=[decoder + "layer_norm."]),
            # The same weights as the embeddings in every published model, which `named_parameters` then gives once.
            "head": ["model.proj_out."],
        }

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


class WhisperCtcModel(CtcModel):
    """Classes of a vocabulary from Whisper's encoder, which hears 30 s as it did in its pretraining; CTC sees the
    frames of the utterance alone."""

    max_samples = MAX_SAMPLES

    def __init__(
        self, backbone: schema.WhisperCtc, vocabulary: Vocabulary, weights: bool = True, seed: int = 0
    ) -> None:
        super().__init__(vocabulary)
        self.backbone = backbone
        shims.apply()
        from transformers import WhisperFeatureExtractor, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        config, exported = _config(backbone), Path(backbone.source) / HEAD
        self.head = nn.Linear(config.d_model, len(vocabulary))
        nn.init.normal_(self.head.weight, std=config.init_std)
        nn.init.zeros_(self.head.bias)
        if not weights:
            self.encoder = WhisperEncoder(config)
        elif exported.is_file():
            from safetensors.torch import load_file

            self.encoder = pretrained(WhisperEncoder, backbone, config)
            if load(Path(backbone.source)).digest == vocabulary.digest:
                self.head.load_state_dict(load_file(exported))
        else:
            self.encoder = pretrained(WhisperModel, backbone, config).get_encoder()
        self.encoder.embed_positions.requires_grad_(False)
        self.layer_drop = LayerDrop(self.encoder.layers, backbone.layerdrop, seed)
        self.extractor = WhisperFeatureExtractor.from_pretrained(**_source(backbone))

    @property
    def inner(self) -> Any:
        return self.encoder

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64)
        return {"inputs": _spectra(self.extractor, waveforms), "lengths": lengths, **self.labels(texts)}

    def augment(self, tensors: Tensors, dice: masking.Dice) -> Tensors:
        assert isinstance(self.backbone, schema.WhisperCtc)
        return _hidden(self.backbone, tensors, dice)

    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        assert isinstance(self.backbone, schema.WhisperCtc)
        inputs = tensors["inputs"]
        # Not the head's type: to ask for its weight is to have ZeRO 3 gather it.
        heard = self.encoder(inputs.to(self.encoder.dtype)).last_hidden_state
        return self.head(heard), _frames(tensors["lengths"])

    def frames(self, n_samples: IntArray) -> IntArray:
        return _frames(torch.from_numpy(n_samples)).numpy()

    def padded_samples(self, n_samples: IntArray) -> IntArray:
        return np.full_like(n_samples, self.max_samples)

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return super().feasible(lengths) & (lengths["n_samples"] <= self.max_samples)

    def parts(self) -> dict[str, list[str]]:
        return {**_encoder_parts("encoder.", self.encoder.config.encoder_layers), "head": ["head."]}

    def export(self, folder: Path) -> None:
        """transformers has no class of an encoder of Whisper with a CTC head. What it loads is the encoder
        (`WhisperEncoder`) and the processor; the head is a linear layer in a file of its own."""
        from safetensors.torch import save_file

        self.encoder.save_pretrained(folder)
        save_file({name: t.contiguous().clone() for name, t in self.head.state_dict().items()}, folder / HEAD)
        ctc_processor.save(self.vocabulary, self.extractor, folder)


def _frames(n_samples: Tensor) -> Tensor:
    return (-(-n_samples // _SAMPLES_A_FRAME)).clamp(max=MAX_SAMPLES // _SAMPLES_A_FRAME)
