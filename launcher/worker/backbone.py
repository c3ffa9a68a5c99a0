"""Pretrained models and their heads, behind one face: tensors in, loss and text out.

A `SpeechModel` owns no parameter itself, only submodules, so that ZeRO-3's hooks see every one. Weights are loaded
whole on each rank before the engine shards them: building speech models under `zero.Init` breaks the weight norm of
wav2vec2's positional convolution and Whisper's sinusoids.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher import recipe as schema
from launcher.errors import DataError, UsageError
from launcher.worker import masking, shims, vocabulary
from launcher.worker.data import Tensors, Waveform, pad
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.tiny_ctc import TinyCtc

IntArray = npt.NDArray[np.int64]


class SpeechModel(nn.Module, ABC):
    """What the engine trains and the evaluation asks."""

    backbone: schema.Backbone

    max_samples: int | None = None
    """Longest utterance that is heard whole; what lies behind is cut off. None: any."""

    @abstractmethod
    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        """Inputs and labels of one micro-batch, on the CPU. Called in a thread; touches no parameter."""

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        """A collated micro-batch with what training is to hide of it.

        Args:
            dice: one for each utterance, the same whenever and wherever an epoch reads it. Called in a thread; nothing
                else may decide what is hidden, and touches no parameter.
        """
        return tensors

    @abstractmethod
    def forward(self, tensors: Tensors, transcribe: bool = False, in_step: bool = False) -> tuple[Tensor, list[str]]:
        """Loss of each utterance, shape (batch,), and where `transcribe` is set the greedy transcripts.

        Evaluation goes through here too, because ZeRO-3 hangs its hooks on `forward`. `in_step`: every rank runs
        the same number of decoding steps, which ZeRO-3 needs.
        """

    @abstractmethod
    def padded_samples(self, n_samples: IntArray) -> IntArray:
        """Samples that an utterance takes in a batch when it is the longest there."""

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which utterances this model can be trained on at all."""
        return np.ones(len(lengths), dtype=bool)

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, vocabulary and preprocessor into `folder`."""

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


class CtcModel(SpeechModel):
    """Letters by CTC: loss of an utterance is its negative log likelihood, computed in fp32."""

    @abstractmethod
    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(batch, frames, letters) and each row's true number of frames."""

    @abstractmethod
    def frames(self, n_samples: IntArray) -> IntArray:
        """The same number of frames, from lengths alone."""

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        inputs, lengths = pad(waveforms)
        labels = [torch.tensor(vocabulary.encode(text), dtype=torch.int64) for text in texts]
        return {
            "inputs": inputs,
            "lengths": lengths,
            "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True),
            "label_lengths": torch.tensor([len(x) for x in labels], dtype=torch.int64),
        }

    def forward(self, tensors: Tensors, transcribe: bool = False, in_step: bool = False) -> tuple[Tensor, list[str]]:
        logits, frames = self.logits(tensors)
        # Infeasible utterances are kept out of training; in evaluation zero_infinity keeps one from hiding the rest.
        losses = F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            tensors["labels"],
            frames,
            tensors["label_lengths"],
            blank=0,
            reduction="none",
            zero_infinity=True,
        )
        if not transcribe:
            return losses, []
        best = logits.argmax(-1).cpu()
        return losses, [vocabulary.decode(row[:n].tolist()) for row, n in zip(best, frames.tolist(), strict=True)]

    def padded_samples(self, n_samples: IntArray) -> IntArray:
        return n_samples

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        needed = lengths["ctc_frames"].astype(np.int64)
        return (needed > 0) & (self.frames(lengths["n_samples"].astype(np.int64)) >= needed)


class TinyCtcModel(CtcModel):
    def __init__(self, backbone: schema.TinyCtc) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = TinyCtc(
            vocabulary_size=len(vocabulary.LETTERS),
            hidden=backbone.hidden,
            layers=backbone.layers,
            dropout=backbone.dropout,
        )

    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        spans = (tensors[masking.TIME_SPAN], tensors[masking.BAND_SPAN]) if masking.TIME_SPAN in tensors else None
        return cast(tuple[Tensor, Tensor], self.model(tensors["inputs"], tensors["lengths"], spans))

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        assert isinstance(self.backbone, schema.TinyCtc)
        if not self.backbone.spec_augment:
            return tensors
        frames = TinyCtc.mel_frames(tensors["lengths"].numpy()).tolist()
        return {**tensors, **masking.spec_spans(dice, frames, TinyCtc.BANDS, widest_time=25, widest_band=15)}

    def frames(self, n_samples: IntArray) -> IntArray:
        return TinyCtc.frames(n_samples)

    def export(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous().clone() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.backbone.model_dump(), indent=1) + "\n")

    def load_export(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(folder / "model.safetensors"))


class Wav2Vec2Model(CtcModel):
    def __init__(self, backbone: schema.Wav2Vec2, weights: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        shims.apply()
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        config = Wav2Vec2Config.from_pretrained(backbone.source, revision=backbone.revision)
        config.update(
            {
                "vocab_size": len(vocabulary.LETTERS),
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "layerdrop": backbone.layerdrop,
                "attention_dropout": backbone.dropout,
                "hidden_dropout": backbone.dropout,
                "feat_proj_dropout": backbone.dropout,
                "final_dropout": backbone.dropout,
                "activation_dropout": backbone.activation_dropout,
                "mask_time_prob": backbone.mask_time_prob,
                "mask_time_length": backbone.mask_time_length,
                "mask_feature_prob": backbone.mask_channel_prob,
                "mask_feature_length": backbone.mask_channel_length,
                "apply_spec_augment": backbone.mask_time_prob > 0 or backbone.mask_channel_prob > 0,
            }
        )
        if backbone.mask_channel_prob > 0 and backbone.mask_channel_length > config.hidden_size:
            raise UsageError(
                f"backbone.mask_channel_length {backbone.mask_channel_length} is more than the {config.hidden_size}"
                f" channels of {backbone.source}",
                hint="lower backbone.mask_channel_length, or set backbone.mask_channel_prob to 0",
            )
        if weights:
            # A head over other letters is made anew, and the vector that stands for masked frames may be absent.
            self.model = _pretrained(Wav2Vec2ForCTC, backbone, config, fresh=("lm_head.", "wav2vec2.masked_spec_embed"))
        else:
            self.model = Wav2Vec2ForCTC(config)
        if backbone.freeze_feature_encoder:
            self.model.freeze_feature_encoder()
        if backbone.mask_time_prob == 0 and hasattr(self.model.wav2vec2, "masked_spec_embed"):
            # Nothing uses it then, and data parallel refuses to wait for a gradient that never comes.
            self.model.wav2vec2.masked_spec_embed.requires_grad_(False)
        # Group-norm models were pretrained without a mask; layer-norm ones need it to ignore padding.
        self.masked = config.feat_extract_norm == "layer"
        self.receptive_field = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        assert isinstance(self.backbone, schema.Wav2Vec2)
        if self.backbone.normalize:
            waveforms = [(w - w.mean()) / np.sqrt(w.var() + 1e-7) for w in waveforms]
        return super().collate(waveforms, texts)

    def logits(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        inputs, lengths = tensors["inputs"], tensors["lengths"]
        if (short := self.receptive_field - inputs.shape[1]) > 0:
            inputs = F.pad(inputs, (0, short))  # the convolutions refuse less than one frame
        mask = None
        if self.masked:
            heard = lengths.clamp(min=self.receptive_field)
            mask = (torch.arange(inputs.shape[1], device=inputs.device) < heard[:, None]).long()
        inputs = inputs.to(next(self.model.parameters()).dtype)
        frames = self.model._get_feat_extract_output_lengths(lengths).clamp(min=0)
        with masking.masked_by(self.model.wav2vec2, tensors):
            return self.model(inputs, attention_mask=mask).logits, cast(Tensor, frames)

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        """Spans of frames and of channels, by the recipe's shares: `masking.FRAMES` and `masking.CHANNELS`."""
        assert isinstance(self.backbone, schema.Wav2Vec2)
        width = self.frames(np.array([max(tensors["inputs"].shape[1], self.receptive_field)]))[0]
        masks = masking.wav2vec2_masks(
            dice,
            self.frames(tensors["lengths"].numpy()).tolist(),
            int(width),
            self.model.config.hidden_size,
            time=(self.backbone.mask_time_prob, self.backbone.mask_time_length),
            channel=(self.backbone.mask_channel_prob, self.backbone.mask_channel_length),
        )
        return {**tensors, **masks}

    def frames(self, n_samples: IntArray) -> IntArray:
        lengths = self.model._get_feat_extract_output_lengths(torch.from_numpy(n_samples)).clamp(min=0)
        return cast(IntArray, np.asarray(lengths))

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        assert isinstance(self.backbone, schema.Wav2Vec2)
        # One shorter than a span would be masked nearly whole.
        span = self.backbone.mask_time_length if self.backbone.mask_time_prob > 0 else 0
        long_enough = self.frames(lengths["n_samples"].astype(np.int64)) >= span
        return super().feasible(lengths) & long_enough

    def export(self, folder: Path) -> None:
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

        assert isinstance(self.backbone, schema.Wav2Vec2)
        self.model.save_pretrained(folder)
        (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(vocabulary.LETTERS)}))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(folder / "vocab.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        )
        extractor = Wav2Vec2FeatureExtractor(do_normalize=self.backbone.normalize, return_attention_mask=self.masked)
        Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


class WhisperModel(SpeechModel):
    """Words by a decoder: loss of an utterance is the mean over its tokens."""

    max_samples = 30 * SAMPLE_RATE_HZ

    def __init__(self, backbone: schema.Whisper, weights: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        shims.apply()
        from transformers import (
            WhisperConfig,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
            WhisperTokenizerFast,
        )

        source: dict[str, Any] = {"pretrained_model_name_or_path": backbone.source, "revision": backbone.revision}
        config = WhisperConfig.from_pretrained(**source)
        dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), backbone.dropout)
        config.update({**dropout, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False})
        if backbone.max_new_tokens > config.max_target_positions - 8:
            raise UsageError(
                f"backbone.max_new_tokens {backbone.max_new_tokens} does not fit the {config.max_target_positions}"
                f" positions of {backbone.source}, a few of which its prompt takes",
                hint=f"set backbone.max_new_tokens to {config.max_target_positions - 8} or less",
            )
        if weights:
            self.model = _pretrained(WhisperForConditionalGeneration, backbone, config)
        else:
            self.model = WhisperForConditionalGeneration(config)
        # Sinusoids; transformers 5 forgets on loading that they are fixed.
        self.model.get_encoder().embed_positions.requires_grad_(False)
        self.extractor = WhisperFeatureExtractor.from_pretrained(**source)
        multilingual = bool(getattr(self.model.generation_config, "is_multilingual", False))
        self.language = {"language": "english", "task": "transcribe"} if multilingual else {}
        self.tokenizer = WhisperTokenizerFast.from_pretrained(**source, **self.language)

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        features = self.extractor(list(waveforms), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
        # LibriSpeech is upper case, Whisper is not; a leading space is how Whisper begins a text.
        rows = self.tokenizer([f" {text.lower()}" for text in texts]).input_ids
        # The model puts the start token in front by itself, and has no positions beyond its last.
        start, limit = self.model.config.decoder_start_token_id, self.model.config.max_target_positions
        labels = [torch.tensor(row[1:] if row[0] == start else row)[:limit] for row in rows]
        return {"inputs": features, "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}

    def augment(self, tensors: Tensors, dice: Sequence[np.random.Generator]) -> Tensors:
        """SpecAugment, laid over the features themselves: they are made here, not in the model."""
        assert isinstance(self.backbone, schema.Whisper)
        if not self.backbone.spec_augment:
            return tensors
        features = tensors["inputs"]
        spans = masking.spec_spans(
            dice, [features.shape[2]] * len(features), features.shape[1], widest_time=100, widest_band=27
        )
        return {**tensors, "inputs": masking.hidden_by(features, spans[masking.TIME_SPAN], spans[masking.BAND_SPAN])}

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

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


# Loading -------------------------------------------------------------------------------------------------------------


def _pretrained(kind: Any, backbone: schema.Wav2Vec2 | schema.Whisper, config: Any, fresh: tuple[str, ...] = ()) -> Any:
    """The model with the weights of `backbone.source`, fp32; every one of them, but for those that start with `fresh`.

    Raises:
        DataError: a weight is missing or of another shape; transformers would make it up.
    """
    model, loaded = kind.from_pretrained(
        backbone.source,
        revision=backbone.revision or "main",
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers 4.57 gives the names of mismatched weights, 5 puts their shapes beside them.
    mismatched = (row if isinstance(row, str) else row[0] for row in loaded["mismatched_keys"])
    made_up = {*loaded["missing_keys"], *mismatched}
    if wrong := sorted(name for name in made_up if not name.startswith(fresh or ("\0",))):
        raise DataError(
            f"{backbone.source} lacks {len(wrong)} weights of {backbone.kind}, or has them in another shape:"
            f" {', '.join(wrong[:3])}",
            hint=f"set backbone.source to a {backbone.kind} model whose weights and config.json belong together",
        )
    return model


@contextlib.contextmanager
def quiet_transformers() -> Any:
    """transformers reports fresh heads and slow tokenizers as warnings; here they are what was asked for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
