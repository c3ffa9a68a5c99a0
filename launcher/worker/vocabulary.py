"""What a CTC head writes: letters, characters or pieces of words as classes, there and back. Needs no torch.

Class 0 is CTC's blank, 1 to 3 are never written, and what follows is text; `LETTERS` has LibriSpeech's alphabet so, in
the order that fairseq's fine-tuned models have on Hugging Face: a checkpoint trained here decodes with their
tokenizer. Where vocabularies are learned and kept is in `vocabularies.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from launcher import rundir, sealing
from launcher.errors import DataError

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS: tuple[str, ...] = (*SPECIALS, "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""Class i is `LETTERS[i]`. 0 is CTC's blank; 1 to 3 are never produced by `encode`; `|` stands between words."""

BLANK = 0
UNKNOWN = 3
BAR = "|"
_FIRST_LETTER = len(SPECIALS)
_CLASS = {letter: i for i, letter in enumerate(LETTERS) if i >= _FIRST_LETTER}
_FILE, _PIECES = "vocabulary.json", "sentencepiece.model"


class Vocabulary(ABC):
    """Text to classes and back."""

    kind: str
    tokens: tuple[str, ...]
    """Class i is `tokens[i]`."""

    case: str = "keep"

    def __len__(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Classes of a transcript; any run of white space is one space, none at the ends."""

    @abstractmethod
    def text_of(self, ids: Sequence[int]) -> str:
        """Text of classes from 4 on."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the best class of each frame: repeats collapse, then blanks and other specials fall out."""
        return " ".join(self.text_of([i for i, _ in groupby(ids) if i >= _FIRST_LETTER]).split())

    def min_frames(self, text: str) -> int:
        """The fewest frames in which CTC can write `text`: one for each class, and a blank between equal neighbours.
        -1 where it cannot be written at all."""
        try:
            ids = self.encode(text)
        except DataError:
            return -1
        return -1 if UNKNOWN in ids else len(ids) + sum(a == b for a, b in pairwise(ids))

    @property
    def digest(self) -> str:
        return sealing.digest_json({"kind": self.kind, "case": self.case, "tokens": self.tokens})

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        value = {"kind": self.kind, "case": self.case, "tokens": self.tokens}
        rundir.write_json(folder / _FILE, value)

    def _in_case(self, text: str) -> str:
        text = " ".join(text.split())
        return text.upper() if self.case == "upper" else text.lower() if self.case == "lower" else text


class Letters(Vocabulary):
    kind = "letters"
    tokens = LETTERS

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def text_of(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in ids).replace(BAR, " ")


class Characters(Vocabulary):
    """Of any alphabet. Characters that the training transcripts lack are `<unk>`."""

    kind = "characters"

    def __init__(self, tokens: Sequence[str], case: str) -> None:
        self.tokens, self.case = tuple(tokens), case
        self._class = {token: i for i, token in enumerate(self.tokens) if i >= _FIRST_LETTER}

    @classmethod
    def learn(cls, texts: Iterable[str], case: str) -> Characters:
        """
        Raises:
            DataError: a transcript has the character that stands between words.
        """
        empty, found = cls((*SPECIALS, BAR), case), set()
        for text in texts:
            found |= set(empty._in_case(text))
            if BAR in found:
                raise DataError(
                    f"the transcript {text!r} has a {BAR!r}, which stands between words in a vocabulary of characters",
                    hint="rewrite the transcript and pack again, or take a vocabulary of kind sentencepiece",
                )
        return cls((*SPECIALS, BAR, *sorted(found - {" "})), case)

    def encode(self, text: str) -> list[int]:
        return [self._class.get(character, UNKNOWN) for character in self._in_case(text).replace(" ", BAR)]

    def text_of(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[i] for i in ids).replace(BAR, " ")


class Pieces(Vocabulary):
    """Of words, by SentencePiece; its classes are ours. What it cannot write is `<unk>`."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, case: str) -> None:
        import sentencepiece

        self.model, self.case = model, case
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.tokens = tuple(self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size()))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(self._in_case(text))
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    @cached_property
    def scores(self) -> list[float]:
        return [self._processor.get_score(i) for i in range(len(self))]

    @property
    def digest(self) -> str:
        import xxhash

        return sealing.digest_json([super().digest, xxhash.xxh3_128_hexdigest(self.model)])

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / _PIECES).write_bytes(self.model)


def load(folder: Path) -> Vocabulary:
    """What `save` wrote; letters where it wrote nothing.

    Raises:
        DataError: the files are damaged.
    """
    value: Any = rundir.read_json(folder / _FILE)
    if value is None:
        return Letters()
    try:
        if value["kind"] == Pieces.kind:
            return Pieces((folder / _PIECES).read_bytes(), value["case"])
        if value["kind"] == Characters.kind:
            return Characters(value["tokens"], value["case"])
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{folder / _FILE} cannot be used: {error}", hint="restore it from a copy") from error
    return Letters()


# LibriSpeech's letters -----------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    """Classes of an upper-case transcript; any run of white space is one `|`, none at the ends.

    Raises:
        DataError: a character is neither A to Z, nor an apostrophe, nor white space.
    """
    words = text.split()
    for character in "".join(words):
        if character == BAR or character not in _CLASS:
            raise DataError(
                f"{character!r} (U+{ord(character):04X}) in the transcript {text!r} is not in the vocabulary",
                hint="the letters are A to Z, apostrophes and spaces; rewrite the transcript, or set"
                " backbone.vocabulary to one that is made from transcripts",
            )
    return [_CLASS[letter] for letter in BAR.join(words)]


def decode(ids: Iterable[int]) -> str:
    """Text of the best class of each frame: repeats collapse, then blanks and other specials fall out."""
    return Letters().decode(ids)


def min_ctc_frames(text: str) -> int:
    """The fewest frames in which CTC can write `text`: one per letter, and a blank between equal neighbours.

    Raises:
        DataError: as `encode`.
    """
    ids = encode(text)
    return len(ids) + sum(a == b for a, b in pairwise(ids))
