"""The processor beside an exported CTC model: what transformers makes of sound, and text of its classes, without us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.worker.vocabulary import BAR, BLANK, SPECIALS, Pieces, Vocabulary

_NAMED = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))


def save(vocabulary: Vocabulary, extractor: Any, folder: Path) -> None:
    """Write feature extractor, tokenizer and vocabulary; `AutoProcessor` finds them.

    transformers 4 refuses Whisper's extractor beside a CTC tokenizer: there `AutoFeatureExtractor` finds the one, and
    `AutoTokenizer` the other.
    """
    from transformers import Wav2Vec2Processor

    tokenizer = _of_pieces(vocabulary) if isinstance(vocabulary, Pieces) else _of_characters(vocabulary, folder)
    try:
        processor = Wav2Vec2Processor(extractor, tokenizer)
    except TypeError:
        extractor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
    if vocabulary.kind != "letters":
        vocabulary.save(folder)


def _of_characters(vocabulary: Vocabulary, folder: Path) -> Any:
    from transformers import Wav2Vec2CTCTokenizer

    path = folder / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(vocabulary.tokens)}, ensure_ascii=False))
    named = {**_NAMED, "word_delimiter_token": BAR}
    return Wav2Vec2CTCTokenizer(str(path), clean_up_tokenization_spaces=False, **named)


def _of_pieces(vocabulary: Pieces) -> Any:
    """CTC's collapse and SentencePiece's spaces are both decoders of the tokenizers library, one after the other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    scored = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    collapse = decoders.CTC(pad_token=SPECIALS[BLANK], cleanup=False)
    tokenizer.decoder = decoders.Sequence([collapse, decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_NAMED)
