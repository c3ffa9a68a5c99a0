"""The letters, there and back."""

from __future__ import annotations

import pytest

from launcher.errors import DataError
from launcher.worker.vocabulary import LETTERS, decode, encode, min_ctc_frames


def test_order_is_the_published_models() -> None:
    assert len(LETTERS) == 32
    assert LETTERS[:8] == ("<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A")
    assert LETTERS[27] == "'" and LETTERS[31] == "Z"
    assert len(set(LETTERS)) == 32


def test_encode_writes_a_bar_between_words() -> None:
    assert encode("A TEE") == [7, 4, 6, 5, 5]
    assert encode("  A\t TEE\n") == encode("A TEE")
    assert encode("") == []


@pytest.mark.parametrize("text", ["BOB'S 2 CARS", "lower", "A|B", "CAFÉ", "<PAD>"])
def test_encode_names_what_it_does_not_know(text: str) -> None:
    culprit = next(c for c in text if c not in " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    with pytest.raises(DataError) as caught:
        encode(text)
    assert repr(culprit) in caught.value.message and repr(text) in caught.value.message


def test_decode_collapses_repeats_then_drops_blanks() -> None:
    e, t, bar = 5, 6, 4
    assert decode([0, t, t, 0, e, e, 0, e, bar, bar, 0, bar, t, 0]) == "TEE T"
    assert decode([bar, t, bar]) == "T"
    assert decode([1, 2, 3, 0]) == ""


def test_decode_undoes_encode_where_blanks_part_equal_letters() -> None:
    text = "DON'T QUIZ THE BOOKKEEPER"
    frames = [i for letter in encode(text) for i in (letter, 0)]
    assert decode(frames) == text


def test_min_ctc_frames_counts_a_blank_between_equal_letters() -> None:
    assert min_ctc_frames("TEA") == 3
    assert min_ctc_frames("TEE T") == 6
    assert min_ctc_frames("") == 0
