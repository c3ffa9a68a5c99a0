"""wav2vec 2.0, HuBERT and WavLM with a CTC head: one architecture of convolutions and transformer, in transformers'
three copies of it.
"""

from __future__ import annotations

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
from launcher.worker import ctc_processor, masking, shims
from launcher.worker.backbone import CtcModel, IntArray, layer_parts, pretrained
from launcher.worker.data import Tensors, Waveform
from launcher.worker.layer_drop import LayerDrop
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.vocabulary import Vocabulary, load

FAMILIES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}
"""What transformers puts before `Config` and `ForCTC`."""


class Wav2Vec2Model(CtcModel):
    def __init__(self, backbone: schema.Wav2Vec2, vocabulary: Vocabulary, weights: bool = True, seed: int = 0) -> None:
        super().__init__(vocabulary)
        self.backbone = backbone
        shims.apply()
        import transformers

        family = FAMILIES[backbone.kind]
        config = getattr(transformers, f"{family}Config").from_pretrained(backbone.source, revision=backbone.revision)
        _check(backbone, config)
        config.update(
            {
                "vocab_size": len(vocabulary),
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "layerdrop": 0.0,  # `layer_drop.py` does it
                "attention_dropout": backbone.dropout,
                "hidden_dropout": backbone.dropout,
                "feat_proj_dropout": backbone.dropout,
                "final_dropout": backbone.dropout,
                "activation_dropout": backbone.activation_dropout,
                "mask_time_prob": backbone.mask_time_prob,
                "mask_time_length": backbone.mask_time_length,
                "mask_feature_prob": backbone.mask_channel_prob,
                "mask_feature_length": backbone.mask_channel_length,
                "mask_feature_min_masks": 0,  # WavLM's configuration lacks it, and its masks ask for it (read: 5.23)
                "apply_spec_augment": backbone.mask_time_prob > 0 or backbone.mask_channel_prob > 0,
            }
        )
        self.normalize, self.masked = _listening(backbone, config)
        kind = getattr(transformers, f"{family}ForCTC")
        if weights:
            # A head over other classes is made anew, and the vector that stands for masked frames may be absent.
            fresh = ("lm_head.", f"{backbone.kind}.masked_spec_embed")
            self.model = pretrained(kind, backbone, config, fresh=fresh)
            # A head of as many classes may be of another vocabulary; a directory that says nothing has the letters.
            if load(Path(backbone.source)).digest != vocabulary.digest:
                nn.init.normal_(self.model.lm_head.weight, std=config.initializer_range)
                nn.init.zeros_(self.model.lm_head.bias)
        else:
            self.model = kind(config)
        self.base_name = self.model.base_model_prefix
        if backbone.kind == "wavlm":  # its attention hands these weights to torch (read: 5.23, `WavLMAttention`)
            self.unadaptable = frozenset(("q_proj", "k_proj", "v_proj", "out_proj"))
        if backbone.freeze_feature_encoder:
            self.model.freeze_feature_encoder()
        if backbone.mask_time_prob == 0 and hasattr(self.body, "masked_spec_embed"):
            # Nothing uses it then, and data parallel refuses to wait for a gradient that never comes.
            self.body.masked_spec_embed.requires_grad_(False)
        self.layer_drop = LayerDrop(self.body.encoder.layers, backbone.layerdrop, seed)
        self.receptive_field = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel

    @property
    def body(self) -> Any:
        """The model below the head. Not an attribute: its weights would be in every checkpoint twice."""
        return getattr(self.model, self.base_name)

    def collate(self, waveforms: Sequence[Waveform], texts: Sequence[str]) -> Tensors:
        if self.normalize:
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
        with masking.masked_by(self.body, tensors):
            hidden = self.body(inputs, attention_mask=mask).last_hidden_state
        return self.model.lm_head(self.model.dropout(hidden)), cast(Tensor, frames)

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

    def parts(self) -> dict[str, list[str]]:
        body, config = f"model.{self.base_name}.", self.model.config
        # Before the layers in group-norm models, behind them in those with a stable layer norm.
        norm = [body + "encoder.layer_norm."]
        between = ["feature_projection.", "masked_spec_embed", "encoder.pos_conv_embed."]
        behind = config.do_stable_layer_norm
        return {
            "feature_encoder": [body + "feature_extractor."],
            "encoder": [body + name for name in between] + ([] if behind else norm),
            **layer_parts("layer", body + "encoder.layers.", config.num_hidden_layers, after=norm if behind else []),
            **({"adapter": [body + "adapter."]} if getattr(config, "add_adapter", False) else {}),
            "head": ["model.lm_head."],
        }

    def feasible(self, lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        assert isinstance(self.backbone, schema.Wav2Vec2)
        # One shorter than a span would be masked nearly whole.
        span = self.backbone.mask_time_length if self.backbone.mask_time_prob > 0 else 0
        long_enough = self.frames(lengths["n_samples"].astype(np.int64)) >= span
        return super().feasible(lengths) & long_enough

    def export(self, folder: Path) -> None:
        from transformers import Wav2Vec2FeatureExtractor

        self.model.save_pretrained(folder)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=self.normalize, return_attention_mask=self.masked)
        ctc_processor.save(self.vocabulary, extractor, folder)


def _check(backbone: schema.Wav2Vec2, config: Any) -> None:
    """Refuse what cannot be trained as the recipe has it."""
    if backbone.mask_channel_prob > 0 and backbone.mask_channel_length > config.hidden_size:
        raise UsageError(
            f"backbone.mask_channel_length {backbone.mask_channel_length} is more than the {config.hidden_size}"
            f" channels of {backbone.source}",
            hint="lower backbone.mask_channel_length, or set backbone.mask_channel_prob to 0",
        )
    if getattr(config, "conv_pos_batch_norm", False):
        raise DataError(
            f"{backbone.source} has a batch norm in its positional convolution, whose statistics each rank would gather"
            " for itself",
            hint="take a HuBERT with weight norm there, such as facebook/hubert-base-ls960",
        )


def _listening(backbone: schema.Wav2Vec2, config: Any) -> tuple[bool, bool]:
    """Whether each waveform is normalized, and whether the model is told what is padding: as its preprocessor says, or
    else as the architecture was pretrained. Group-norm models (base) never saw a mask, layer-norm ones always did.

    Raises:
        DataError: it hears another rate than ours.
        UsageError: the recipe contradicts it, and it would make a difference.
    """
    from transformers import Wav2Vec2FeatureExtractor

    try:
        said, _ = Wav2Vec2FeatureExtractor.get_feature_extractor_dict(backbone.source, revision=backbone.revision)
    except OSError:
        said = {}  # many a pretrained model has none
    if (rate := said.get("sampling_rate", SAMPLE_RATE_HZ)) != SAMPLE_RATE_HZ:
        raise DataError(f"{backbone.source} hears {rate} Hz, and packs have {SAMPLE_RATE_HZ}", hint="take another one")
    layer = config.feat_extract_norm == "layer"
    normalize, masked = bool(said.get("do_normalize", layer)), bool(said.get("return_attention_mask", layer))
    if backbone.normalize is not None and backbone.normalize != normalize:
        if layer:
            how = "each utterance normalized" if normalize else "the waveform as it is"
            raise UsageError(
                f"backbone.normalize is {str(backbone.normalize).lower()}, and {backbone.source} was pretrained on"
                f" {how}",
                hint="leave backbone.normalize out: it follows the checkpoint",
            )
        normalize = backbone.normalize
    return normalize, masked
