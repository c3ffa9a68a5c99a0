"""LibriSpeech's letters as CTC classes, in the order that fairseq's fine-tuned models have on Hugging Face.

A checkpoint trained here therefore decodes with their tokenizer. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, pairwise

from launcher.errors import DataError

LETTERS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""Class i is `LETTERS[i]`. 0 is CTC's blank; 1 to 3 are never produced by `encode`; `|` stands between words."""

BLANK = 0
_FIRST_LETTER = 4
_CLASS = {letter: i for i, letter in enumerate(LETTERS) if i >= _FIRST_LETTER}


def encode(text: str) -> list[int]:
    """Classes of an upper-case transcript; any run of white space is one `|`, none at the ends.

    Raises:
        DataError: a character is neither A to Z, nor an apostrophe, nor white space.
    """
    words = text.split()
    for character in "".join(words):
        if character == "|" or character not in _CLASS:
            raise DataError(
                f"{character!r} (U+{ord(character):04X}) in the transcript {text!r} is not in the vocabulary",
                hint="transcripts have the letters A to Z, apostrophes and spaces; drop or rewrite this one",
            )
    return [_CLASS[letter] for letter in "|".join(words)]


def decode(ids: Iterable[int]) -> str:
    """Text of the best class of each frame: repeats collapse, then blanks and other specials fall out."""
    letters = "".join(LETTERS[i] for i, _ in groupby(ids) if i >= _FIRST_LETTER)
    return " ".join(letters.replace("|", " ").split())


def min_ctc_frames(text: str) -> int:
    """The fewest frames in which CTC can write `text`: one per letter, and a blank between equal neighbours.

    Raises:
        DataError: as `encode`.
    """
    ids = encode(text)
    return len(ids) + sum(a == b for a, b in pairwise(ids))
