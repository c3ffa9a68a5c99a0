"""CTC beam search with a word n-gram: torchaudio's decoder on flashlight-text, which brings KenLM (the extra `beam`).

Every word is one of the language model's; training always decodes greedily, without it.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher import sealing
from launcher.errors import DataError, NotFoundError, PreflightError, UsageError
from launcher.worker import shims
from launcher.worker.backbone import CtcModel, SpeechModel
from launcher.worker.vocabulary import BAR, BLANK, Pieces, Vocabulary

MARKS = ("<s>", "</s>", "<unk>", "<UNK>")
"""Unigrams of an ARPA file that are no words."""


@dataclass(frozen=True)
class Options:
    lm: Path
    """ARPA, plain or gzipped, of words in upper case, as LibriSpeech's own (OpenSLR 11) are."""
    beam: int = 50
    """Hypotheses that are kept at each frame."""
    lm_weight: float = 2.0
    """Of the language model's logarithm to the base 10."""
    word_score: float = 0.0
    """Added for each word; above zero it favours more of them."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "lm": str(self.lm), "lm_digest": sealing.digest_file(self.lm)["xxh3_128"]}

    def __str__(self) -> str:
        return f"beam {self.beam}, {self.lm.name}, lm weight {self.lm_weight:g}, word score {self.word_score:g}"


def words_of(lm: Path, vocabulary: Vocabulary) -> list[str]:
    """The words of an ARPA file that a CTC head can spell, in its order.

    Raises:
        NotFoundError: there is no such file.
        DataError: it is no ARPA file, or has no such word.
    """
    if not lm.is_file():
        raise NotFoundError(f"{lm}: no such file", hint="--lm takes an n-gram as ARPA, such as OpenSLR 11's 4-gram")
    try:
        with gzip.open(lm, "rt", encoding="utf-8") if lm.suffix == ".gz" else lm.open(encoding="utf-8") as file:
            words = [word for word in _unigrams(file) if word not in MARKS and _spelled(word, vocabulary)]
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{lm} is no ARPA file: {error}", hint="give the text of an n-gram, as .arpa or .arpa.gz"
        ) from error
    if not words:
        raise DataError(
            f"{lm} has no unigram that the model can spell",
            hint="give an n-gram over words as the transcripts have them; LibriSpeech's are in upper case",
        )
    return words


def _spelled(word: str, vocabulary: Vocabulary) -> bool:
    return vocabulary.min_frames(word) > 0


def _unigrams(lines: Iterator[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if inside and line.startswith("\\"):
            return
        if inside and (cells := line.split()):
            if len(cells) < 2:
                raise ValueError(f"among its unigrams is a line of one word, '{cells[0][:40]}'")
            yield cells[1]
        inside = inside or line.strip() == "\\1-grams:"
    if not inside:
        raise ValueError("it has no line \\1-grams:")


class BeamSearch:
    """Turns a CTC model's logits into text.

    Raises:
        UsageError: the model is no CTC model.
        PreflightError: flashlight-text is not installed.
        NotFoundError, DataError: as `words_of`; or the n-gram is not whole, or only of single words.
    """

    def __init__(self, model: SpeechModel, options: Options) -> None:
        if not isinstance(model, CtcModel):
            raise UsageError(
                "beam search with an n-gram is for CTC models", hint="leave --lm out: this one has a decoder"
            )
        if isinstance(model.vocabulary, Pieces):
            raise UsageError(
                "beam search with an n-gram spells words letter by letter, and this model writes pieces of words",
                hint="leave --lm out",
            )
        self.model = model
        vocabulary = model.vocabulary
        words = words_of(options.lm, vocabulary)
        shims.apply()
        try:
            from torchaudio.models.decoder import ctc_decoder
        except (ImportError, RuntimeError) as error:
            raise PreflightError(
                f"beam search needs flashlight-text: {error}", hint="install it with `pip install 'speechctl[beam]'`"
            ) from error
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as lexicon:
            lexicon.writelines(
                f"{word} {' '.join(vocabulary.tokens[i] for i in vocabulary.encode(word))} {BAR}\n" for word in words
            )
            lexicon.flush()
            try:
                self.decoder = ctc_decoder(
                    lexicon=lexicon.name,
                    tokens=list(vocabulary.tokens),
                    lm=str(options.lm),
                    beam_size=options.beam,
                    lm_weight=options.lm_weight,
                    word_score=options.word_score,
                    blank_token=vocabulary.tokens[BLANK],
                    sil_token=BAR,
                    unk_word="<unk>",
                )
            except RuntimeError as error:  # KenLM's; its last line says what is wrong, the others where in its source
                raise DataError(
                    f"{options.lm} cannot be used as an n-gram: {str(error).strip().splitlines()[-1]}",
                    hint="give a whole ARPA file of at least bigrams, such as OpenSLR 11's 4-gram",
                ) from error

    def __call__(self, tensors: dict[str, Tensor]) -> list[str]:
        """The text of each utterance of a batch on the model's device."""
        logits, frames = self.model.logits(tensors)
        return self.decode(logits, frames)

    def decode(self, logits: Tensor, frames: Tensor) -> list[str]:
        """
        Args:
            logits: (batch, frames, letters).
            frames: (batch,), how many of them are sound.
        """
        emissions = logits.float().log_softmax(-1).cpu().contiguous()
        found = self.decoder(emissions, frames.to(torch.int32).cpu())
        return [" ".join(best[0].words) if best else "" for best in found]
