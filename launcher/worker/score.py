"""What is counted where references meet hypotheses: word and character errors, for every group a reviewer asks for.

jiwer aligns; every figure is a sum over utterances and never a mean of means. Where several alignments have as few
errors, jiwer's choice decides how these divide into substitutions, deletions and insertions; NIST's sclite weighs them
4, 3 and 3, and may divide them in another way and count more of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jiwer
import numpy as np

from launcher.worker import shims

RESAMPLES = 1000
"""Of the bootstrap. Bisani and Ney (2004), "Bootstrap estimates for confidence intervals in ASR performance
evaluation", take as many and more."""

LEVEL = 0.95

WORST = 10
"""Utterances that are shown word by word."""

DURATIONS_S = (0, 2, 5, 10, 15, 20)
"""Where the bins of duration begin."""


# Text ----------------------------------------------------------------------------------------------------------------


@cache
def normalizer(name: str) -> Callable[[str], str]:
    """Text to words, the same on both sides. Numbers under different normalizers cannot be compared."""
    if name == "librispeech":
        return lambda text: " ".join(re.sub(r"[^A-Z' ]+", " ", text.upper()).split())
    shims.apply()
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # Without the spelling table: checkpoints do not always carry it, and LibriSpeech's spelling is its own.
    english: Callable[[str], str] = EnglishTextNormalizer({})
    return english


# One utterance -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Of one utterance, both sides normalized."""

    words: int
    """In the reference."""
    correct: int
    substitutions: int
    deletions: int
    insertions: int
    characters: int
    """In the reference; the blank between two words is one."""
    character_errors: int
    aligned: list[tuple[str, str, str]]
    """Word by word: `=`, `S`, `D` or `I`, the reference's and the hypothesis's; empty where that side has none."""

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def count(pairs: Sequence[tuple[str, str]]) -> list[Errors]:
    """The errors of each (reference, hypothesis), already normalized."""
    if not pairs:
        return []
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    found = []
    for (reference, hypothesis), chunks, letters in zip(pairs, words.alignments, characters.alignments, strict=True):
        aligned = _aligned(reference.split(), hypothesis.split(), chunks)
        kinds = [kind for kind, _, _ in aligned]
        found.append(
            Errors(
                words=len(reference.split()),
                correct=kinds.count("="),
                substitutions=kinds.count("S"),
                deletions=kinds.count("D"),
                insertions=kinds.count("I"),
                characters=len(reference),
                character_errors=sum(_length(c) for c in letters if c.type != "equal"),
                aligned=aligned,
            )
        )
    return found


def _length(chunk: Any) -> int:
    return int(max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx))


def _aligned(reference: list[str], hypothesis: list[str], chunks: Iterable[Any]) -> list[tuple[str, str, str]]:
    rows = []
    for chunk in chunks:
        said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        heard = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        kind = {"equal": "=", "substitute": "S", "delete": "D", "insert": "I"}[chunk.type]
        rows += [
            (kind, said[k] if k < len(said) else "", heard[k] if k < len(heard) else "") for k in range(_length(chunk))
        ]
    return rows


# Many utterances -----------------------------------------------------------------------------------------------------


def total(some: Iterable[Errors]) -> dict[str, Any]:
    """The sums over utterances, and the rates that follow from them; a rate of nothing is no number."""
    rows = list(some)
    sums = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("errors", "substitutions", "insertions", "deletions", "words", "correct")
    }
    characters, wrong = sum(r.characters for r in rows), sum(r.character_errors for r in rows)
    return {
        "wer": sums["errors"] / sums["words"] if sums["words"] else math.nan,
        **sums,
        "utterances": len(rows),
        "wrong_utterances": sum(row.errors > 0 for row in rows),
        "cer": wrong / characters if characters else math.nan,
        "characters": characters,
        "character_errors": wrong,
    }


def score(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Errors of (reference, hypothesis) pairs, already normalized, as sums over all of them."""
    return total(count(list(pairs)))


def interval(speakers: Sequence[int], some: Sequence[Errors]) -> dict[str, Any] | None:
    """Where the WER lies with other speakers of the same kind: percentiles of the WER over speakers drawn with
    replacement. None where fewer than two speakers have a word. Draws from dice of its own, the same every time."""
    names, which = np.unique(np.asarray(speakers), return_inverse=True)
    errors = np.bincount(which, [row.errors for row in some], len(names))
    words = np.bincount(which, [row.words for row in some], len(names))
    if (words > 0).sum() < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    said = words[drawn].sum(1)
    wers = errors[drawn].sum(1)[said > 0] / said[said > 0]
    low, high = np.quantile(wers, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high), "level": LEVEL, "resamples": RESAMPLES, "speakers": len(names)}


@dataclass(frozen=True)
class Scored:
    """One utterance with what is known of it."""

    utt_id: str
    subset: str
    speaker: int
    sex: str | None
    """As the corpus's SPEAKERS.TXT has it; None where the pack does not say."""
    seconds: float
    errors: Errors


def tables(some: Sequence[Scored]) -> dict[str, Any]:
    """All that an evaluation says about errors: in all, in each group, and of the worst utterances."""
    sexes = {row.sex for row in some} - {None}
    return {
        **_of(some),
        "subsets": _by(some, lambda row: row.subset, _of),
        "speakers": _by(some, lambda row: str(row.speaker)),
        **({"sexes": _by([r for r in some if r.sex], lambda row: str(row.sex), _of)} if sexes else {}),
        "durations": _by(sorted(some, key=lambda row: row.seconds), lambda row: duration(row.seconds)),
        "worst": [
            {
                "utt_id": row.utt_id,
                "subset": row.subset,
                "speaker": row.speaker,
                "seconds": round(row.seconds, 3),
                "errors": row.errors.errors,
                "words": row.errors.words,
                "aligned": [list(words) for words in row.errors.aligned],
            }
            for row in sorted(some, key=lambda row: (-row.errors.errors, row.errors.words, row.utt_id))[:WORST]
            if row.errors.errors
        ],
    }


def _of(some: Sequence[Scored]) -> dict[str, Any]:
    errors = [row.errors for row in some]
    return {**total(errors), "interval": interval([row.speaker for row in some], errors)}


def _by(
    some: Sequence[Scored],
    key: Callable[[Scored], str],
    of: Callable[[Sequence[Scored]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    groups: dict[str, list[Scored]] = {}
    for row in some:
        groups.setdefault(key(row), []).append(row)
    return {name: of(rows) if of else total(r.errors for r in rows) for name, rows in groups.items()}


def duration(seconds: float) -> str:
    """The bin of an utterance: `2-5 s` holds those of 2 s and more, below 5 s."""
    k = max(k for k, first in enumerate(DURATIONS_S) if seconds >= first)
    return f"{DURATIONS_S[k]}-{DURATIONS_S[k + 1]} s" if k + 1 < len(DURATIONS_S) else f"{DURATIONS_S[k]} s and more"
