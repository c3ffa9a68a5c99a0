"""Errors counted: by hand, by jiwer itself, by an alignment of our own, and in every group that is reported."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import jiwer
import pytest

from launcher.worker.score import Errors, Scored, count, duration, interval, normalizer, score, tables, total
from tests.conftest import seed

BY_HAND = [
    # reference, hypothesis, substitutions, deletions, insertions: on paper, each in the one way that is shortest
    ("THE CAT SAT ON THE MAT", "THE CAT SAT ON THE MAT", 0, 0, 0),
    ("THE CAT SAT ON THE MAT", "THE BAT SAT ON THE MAT", 1, 0, 0),  # CAT became BAT
    ("THE CAT SAT ON THE MAT", "THE CAT SAT ON MAT", 0, 1, 0),  # the second THE is missing
    ("THE CAT SAT ON THE MAT", "THE CAT SAT DOWN ON THE MAT", 0, 0, 1),  # DOWN was not said
    ("ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT", "ONE AND TWO THREE FOUR FIFE SIX EIGHT", 1, 1, 1),
    ("HELLO WORLD", "", 0, 2, 0),
    ("IT'S NEVER TOO LATE", "ITS NEVER TO LATE", 2, 0, 0),  # an apostrophe makes another word
    ("SPEECH IS SILVER", "WELL SPEECH IS SILVER YES", 0, 0, 2),
    ("A B C", "X Y Z", 3, 0, 0),
    ("SHE SELLS SEA SHELLS BY THE SEA SHORE", "HE SELLS SEA SHELLS SEA SHORE NOW", 1, 2, 1),
]


def levenshtein(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The fewest errors, as the textbook has it."""
    row = list(range(len(hypothesis) + 1))
    for i, said in enumerate(reference, start=1):
        above, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, start=1):
            above, row[j] = row[j], min(above + (said != heard), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@pytest.mark.parametrize(("reference", "hypothesis", "substitutions", "deletions", "insertions"), BY_HAND)
def test_ten_by_hand(reference: str, hypothesis: str, substitutions: int, deletions: int, insertions: int) -> None:
    (found,) = count([(reference, hypothesis)])
    assert (found.substitutions, found.deletions, found.insertions) == (substitutions, deletions, insertions)
    words, heard = reference.split(), hypothesis.split()
    assert found.words == len(words) == found.correct + substitutions + deletions
    assert found.errors == levenshtein(words, heard) == substitutions + deletions + insertions
    assert found.character_errors == levenshtein(reference, hypothesis)
    kinds = [kind for kind, _, _ in found.aligned]
    assert [w for _, w, _ in found.aligned if w] == words and [h for _, _, h in found.aligned if h] == heard
    for kind, said, was_heard in found.aligned:
        assert {"=": said == was_heard, "D": not was_heard, "I": not said, "S": bool(said and was_heard)}[kind]
        assert kind == "=" or said != was_heard
    assert {k: kinds.count(k) for k in "SDI"} == {"S": substitutions, "D": deletions, "I": insertions}


def test_the_ten_together() -> None:
    """Sums, worked out on paper: 8 + 6 + 5 errors in 52 words; the mean of the ten rates would be another number."""
    result = score([(r, h) for r, h, *_ in BY_HAND])
    assert {k: result[k] for k in ("substitutions", "deletions", "insertions")} == {
        "substitutions": 8,
        "deletions": 6,
        "insertions": 5,
    }
    assert (result["words"], result["correct"], result["utterances"], result["wrong_utterances"]) == (52, 38, 10, 9)
    assert result["wer"] == 19 / 52


def test_as_jiwer_and_the_textbook_have_it() -> None:
    """Three hundred random pairs, utterance by utterance and all together."""
    dice = random.Random(seed(11))
    pairs = [tuple(" ".join(dice.choices("ABCDE", k=dice.randrange(9))) for _ in range(2)) for _ in range(300)]
    mine = count([(r, h) for r, h in pairs])
    for (reference, hypothesis), found in zip(pairs, mine, strict=True):
        theirs = jiwer.process_words(reference, hypothesis)
        assert (found.substitutions, found.deletions, found.insertions, found.correct) == (
            theirs.substitutions,
            theirs.deletions,
            theirs.insertions,
            theirs.hits,
        )
        assert found.errors == levenshtein(reference.split(), hypothesis.split())
        assert found.character_errors == levenshtein(reference, hypothesis)
    whole = jiwer.process_words([r for r, _ in pairs], [h for _, h in pairs])
    result = total(mine)
    assert result["wer"] == whole.wer
    assert result["cer"] == jiwer.process_characters([r for r, _ in pairs], [h for _, h in pairs]).cer


def test_wer_is_over_all_words_and_no_mean_of_means() -> None:
    pairs = [("A", "B"), ("A B C D E F G H I", "A B C D E F G H I")]
    assert score(pairs)["wer"] == 0.1  # the mean of means is 0.5


def test_wer_can_exceed_one() -> None:
    assert score([("A", "B C D")])["wer"] == 3.0


def test_wer_of_no_words_is_no_number() -> None:
    result = score([("", ""), ("", "A")])
    assert math.isnan(result["wer"]) and math.isnan(result["cer"])
    assert (result["insertions"], result["words"], result["utterances"]) == (1, 0, 2)
    assert math.isnan(score([])["wer"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("librispeech", "Hello,  world's END.", "HELLO WORLD'S END"),
        ("librispeech", "no-one 42", "NO ONE"),
        ("librispeech", "", ""),
        ("whisper-english", "Mr. Brown won't pay twenty two dollars!", "mister brown will not pay $22"),
        ("whisper-english", "MISTER BROWN WON'T PAY TWENTY TWO DOLLARS", "mister brown will not pay $22"),
        ("whisper-english", "Uh, the colour", "the colour"),
    ],
)
def test_normalizers(name: str, text: str, words: str) -> None:
    assert normalizer(name)(text) == words


# Many utterances -----------------------------------------------------------------------------------------------------


def wrong(errors: int, words: int) -> Errors:
    return Errors(words, words - errors, errors, 0, 0, 5 * words, errors, [("S", "A", "B")] * errors)


def said(speaker: int, subset: str, sex: str | None, seconds: float, errors: int, words: int) -> Scored:
    return Scored(f"{speaker}-1-{words:04d}", subset, speaker, sex, seconds, wrong(errors, words))


SOME = [
    said(84, "dev-clean", "F", 1.5, 0, 4),
    said(84, "dev-clean", "F", 2.0, 1, 6),
    said(174, "dev-clean", "M", 12.0, 3, 30),
    said(700, "dev-other", None, 36.0, 20, 40),
]


def test_every_group_has_its_sums() -> None:
    result = tables(SOME)
    assert result["wer"] == 24 / 80
    wers = {
        by: {k: row["wer"] for k, row in result[by].items()} for by in ("subsets", "speakers", "sexes", "durations")
    }
    assert wers == {
        "subsets": {"dev-clean": 4 / 40, "dev-other": 20 / 40},
        "speakers": {"84": 1 / 10, "174": 3 / 30, "700": 20 / 40},
        "sexes": {"F": 1 / 10, "M": 3 / 30},
        "durations": {"0-2 s": 0.0, "2-5 s": 1 / 6, "10-15 s": 3 / 30, "20 s and more": 20 / 40},
    }
    for by in ("subsets", "speakers", "durations"):
        assert sum(row["errors"] for row in result[by].values()) == result["errors"] == 24
        assert sum(row["utterances"] for row in result[by].values()) == 4
    assert [row["errors"] for row in result["worst"]] == [20, 3, 1]
    assert "sexes" not in tables(SOME[-1:])


@pytest.mark.parametrize(("seconds", "name"), [(0.0, "0-2 s"), (1.999, "0-2 s"), (2.0, "2-5 s"), (35, "20 s and more")])
def test_bins_of_duration(seconds: float, name: str) -> None:
    assert duration(seconds) == name


def test_the_interval_is_over_speakers() -> None:
    """Drawn by speaker, a single bad one makes it wide, however many utterances there are; and it is the same every
    time, whatever else draws."""
    speakers = [k for k in range(40) for _ in range(10)]
    even = [wrong(1, 10)] * 400
    assert interval(speakers, even) == {"low": 0.1, "high": 0.1, "level": 0.95, "resamples": 1000, "speakers": 40}
    odd = [wrong(5 if s == 0 else 1, 10) for s in speakers]
    found = interval(speakers, odd)
    assert found is not None
    assert (
        0.1 <= found["low"] < 0.11 < found["high"] <= 0.14
    )  # one speaker in 40: drawn twice in 95 of 100 draws at most
    random.random()
    assert interval(speakers, odd) == found
    assert interval([7, 7], even[:2]) is None
    silent = interval([*speakers, 99], [*odd, wrong(0, 0)])  # a normalizer empties what is nothing but "hmm"
    assert silent is not None and silent["low"] == pytest.approx(found["low"], abs=0.005)
