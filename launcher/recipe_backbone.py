"""The section `backbone` of the recipe: which model is trained, from which weights, and what its head writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.recipe_values import Fraction, Section

Case = Literal["keep", "upper", "lower"]


class Letters(Section):
    kind: Literal["letters"] = "letters"
    """LibriSpeech's alphabet, A to Z and the apostrophe, in the order of fairseq's fine-tuned models."""


class Characters(Section):
    kind: Literal["characters"]
    """The characters of the training transcripts, each once, in the order of Unicode."""

    case: Case = "keep"
    """What transcripts are turned into first. WER by the normalizer `librispeech` does not tell upper from lower."""


class SentencePiece(Section):
    kind: Literal["sentencepiece"]
    """Pieces of words, learned from the training transcripts by SentencePiece (unigram)."""

    size: Annotated[int, Field(ge=8, le=64_000, examples=["300"])]
    """How many classes there are, the four special ones among them. CTC needs a frame for each piece, and wav2vec2
    has 50 a second: a few hundred are usual."""

    case: Case = "keep"
    """What transcripts are turned into first."""


Vocabulary = Annotated[Letters | Characters | SentencePiece, Field(discriminator="kind")]


class TinyCtc(Section):
    kind: Literal["tiny-ctc"]
    """Log-mel, convolution and transformer with a CTC head, from random weights. About a million parameters."""

    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 144
    """Width of the transformer."""

    layers: Annotated[int, Field(ge=1)] = 4
    """Depth of the transformer."""

    dropout: Fraction = 0.1
    """Everywhere in the transformer."""

    spec_augment: bool = True
    """Mask one span of time and one of frequency in each training utterance (torchaudio)."""

    vocabulary: Vocabulary = Letters()
    """What the head writes."""


class Wav2Vec2(Section):
    kind: Literal["wav2vec2", "hubert", "wavlm"]
    """wav2vec 2.0, HuBERT or WavLM with a CTC head."""

    source: Annotated[str, Field(min_length=1, examples=["facebook/wav2vec2-base"])]
    """A directory in Hugging Face layout, a hub id, or `torchaudio:` and the name of one of torchaudio's pretrained
    bundles, such as `torchaudio:HUBERT_BASE`."""

    revision: str | None = None
    """Commit of the hub id: without one a run cannot be repeated for certain. Of a bundle, the SHA-256 of its file:
    `prepare --fix` says it, and nothing is opened without it."""

    vocabulary: Vocabulary = Letters()
    """What the head writes. A checkpoint that was fine-tuned to `letters` keeps its head, any other gets a new one."""

    normalize: bool | None = None
    """Zero mean and unit variance for each utterance. Default: as the checkpoint was pretrained. The models with layer
    norm in their convolutions (large-lv60, xlsr) are refused with another value than theirs; those with group norm
    (base) take scale and offset out by themselves, and hear the same with either."""

    freeze_feature_encoder: bool = True
    """Keep the convolutional front end as it was pretrained (fairseq: `feature_grad_mult: 0`)."""

    dropout: Fraction = 0.0
    """Attention, hidden and final dropout. fairseq fine-tunes with 0 here and `activation_dropout` 0.1."""

    activation_dropout: Fraction = 0.1
    """Inside the feed-forward layers."""

    layerdrop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of a layer to be passed over in a micro-batch (fairseq: 0.05 to 0.1). Drawn from the seed and the step:
    the same layers on every rank, and after a resume. A layer that is passed over is computed all the same, so that
    the ranks and the stages of ZeRO agree: it saves no time."""

    mask_time_prob: Fraction = 0.65
    """Share of frames covered by masked spans, counted before overlap (fairseq: `mask_prob`)."""

    mask_time_length: Annotated[int, Field(ge=1)] = 10
    """Frames in one masked span of time."""

    mask_channel_prob: Fraction = 0.5
    """Share of channels covered by masked spans, counted before overlap."""

    mask_channel_length: Annotated[int, Field(ge=1)] = 64
    """Channels in one masked span of channels."""


class WhisperCtc(Section):
    kind: Literal["whisper-ctc"]
    """Whisper's encoder with a CTC head: 50 frames a second of the 30 s that every input is padded to."""

    source: Annotated[str, Field(min_length=1, examples=["openai/whisper-tiny.en"])]
    """A directory in Hugging Face layout, or a hub id. All of Whisper; the decoder is left out."""

    revision: str | None = None
    """Commit of the hub id. Without one a run cannot be repeated for certain."""

    vocabulary: Vocabulary = Letters()
    """What the head writes."""

    dropout: Fraction = 0.0
    """Everywhere in the encoder."""

    layerdrop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of a layer to be passed over in a micro-batch; as for wav2vec2."""

    spec_augment: bool = False
    """Mask one span of time and one of frequency in each training utterance (torchaudio)."""


class Whisper(Section):
    kind: Literal["whisper"]
    """Whisper as a sequence-to-sequence model; every input is padded to 30 s, as it was pretrained."""

    source: Annotated[str, Field(min_length=1, examples=["openai/whisper-tiny.en"])]
    """A directory in Hugging Face layout, or a hub id."""

    revision: str | None = None
    """Commit of the hub id. Without one a run cannot be repeated for certain."""

    case: Literal["keep", "lower"] = "lower"
    """What transcripts are turned into before the tokenizer sees them: LibriSpeech's are upper case, which Whisper
    never wrote."""

    dropout: Fraction = 0.0
    """Everywhere in encoder and decoder."""

    layerdrop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of a layer of the encoder to be passed over in a micro-batch; as for wav2vec2."""

    spec_augment: bool = False
    """Mask one span of time and one of frequency in each training utterance (torchaudio)."""

    max_new_tokens: Annotated[int, Field(ge=1, le=440)] = 200
    """Longest transcript that greedy decoding may write."""


Backbone = Annotated[TinyCtc | Wav2Vec2 | Whisper | WhisperCtc, Field(discriminator="kind")]
