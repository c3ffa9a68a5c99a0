"""Backbones for tests: the real architectures with a few thousand random weights, in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from launcher import recipe as schema
from launcher.worker import shims


def make_wav2vec2(
    folder: Path, norm: str = "group", head: bool = False, family: str = "Wav2Vec2", layers: int = 2
) -> Path:
    """wav2vec 2.0 of width 32, or `Hubert`, or `WavLM`: `norm` is `group` as in base models, or `layer` as in large.

    It has 200 frames a second, so that a third of a second has room for any sentence.
    """
    shims.apply()
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
    )
    torch.manual_seed(5)
    getattr(transformers, f"{family}{'ForCTC' if head else 'Model'}")(config).save_pretrained(folder)
    return folder


def wav2vec2(source: Path, **values: object) -> schema.Wav2Vec2:
    return schema.Wav2Vec2.model_validate(
        {"kind": "wav2vec2", "source": str(source), "mask_channel_length": 4, **values}
    )


def whisper_ctc(source: Path, **values: object) -> schema.WhisperCtc:
    return schema.WhisperCtc.model_validate({"kind": "whisper-ctc", "source": str(source), **values})


def make_whisper(folder: Path, layers: int = 1, seconds: int = 30) -> Path:
    """Whisper of width 16 with a tokenizer of single bytes. Its encoder has 50 positions a second, the real one's 1,500
    unless it is to hear less."""
    shims.apply()
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    end, start, _, _, quiet = range(len(alphabet), len(alphabet) + len(specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>",
        special_tokens=[(specials[1], start), (specials[4], quiet), (specials[0], end)],
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), specials[0])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizerFast", **named}))
    config = WhisperConfig(
        vocab_size=quiet + 1 + 8,  # the last are timestamps
        d_model=16,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50 * seconds,
        max_target_positions=64,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
        init_std=0.6,  # so that what it writes, and how much, depends on what it hears
    )
    torch.manual_seed(11)
    model = WhisperForConditionalGeneration(config)
    model.get_input_embeddings().weight.data[end] = 2 * torch.randn(16)  # it ends early here and late there
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        no_timestamps_token_id=quiet,
        is_multilingual=False,
        max_length=64,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=seconds).save_pretrained(folder)
    return folder


def whisper(source: Path, **values: object) -> schema.Whisper:
    return schema.Whisper.model_validate({"kind": "whisper", "source": str(source), "max_new_tokens": 24, **values})
