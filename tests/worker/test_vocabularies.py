"""Vocabularies that are learned from transcripts: any alphabet, any case, the same each time, sealed."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import recipe as schema
from launcher import recipe_file, sealing
from launcher.errors import DataError, UsageError
from launcher.rundir import Run
from launcher.worker import vocabularies
from launcher.worker.data import Utterances
from launcher.worker.pack import write_pack
from launcher.worker.vocabulary import Characters, Pieces, Vocabulary, load
from tests.conftest import RECIPE, SENTENCES

TEXTS = ["Grüße aus  Köln", "ÇA VA? Мир, ёж", "aa bb aa"]
PIECES = schema.SentencePiece(kind="sentencepiece", size=29, case="lower")


def characters(case: Any = "keep") -> Vocabulary:
    return vocabularies.learn(schema.Characters(kind="characters", case=case), TEXTS)


def test_characters_of_any_alphabet() -> None:
    kept, lower, upper = characters(), characters("lower"), characters("upper")
    assert kept.tokens[:5] == ("<pad>", "<s>", "</s>", "<unk>", "|")
    assert list(kept.tokens[5:]) == sorted(kept.tokens[5:]) and {"ü", "Ç", "М", "ё", "?"} <= set(kept.tokens)
    for text in TEXTS:
        assert kept.decode(spaced(kept.encode(text))) == " ".join(text.split())
        assert lower.decode(spaced(lower.encode(text))) == " ".join(text.lower().split())
    assert "Г" not in upper.tokens and "SS" not in upper.tokens
    assert upper.decode(spaced(upper.encode("grüße"))) == "GRÜSSE"  # Unicode's own upper case of ß
    assert kept.encode("zz") == [3, 3] and kept.min_frames("zz") == -1


def spaced(ids: list[int]) -> list[int]:
    """As a model would write them: blanks between, so that doubled classes stay two."""
    return [x for i in ids for x in (i, 0)]


def test_frames_that_ctc_needs() -> None:
    assert characters().min_frames("aa bb") == 7  # five classes, and a blank within aa and bb
    pieces = vocabularies.learn(PIECES, TEXTS * 3)
    for text in TEXTS:
        ids = pieces.encode(text)
        assert pieces.min_frames(text) == len(ids) + sum(a == b for a, b in pairwise(ids))
        assert pieces.decode(spaced(ids)) == " ".join(text.lower().split())


def test_the_same_each_time_and_after_a_save(tmp_path: Path) -> None:
    for asked in (PIECES, schema.Characters(kind="characters")):
        one, two = (vocabularies.learn(asked, TEXTS * 3) for _ in range(2))
        assert (one.tokens, one.digest) == (two.tokens, two.digest)
        one.save(tmp_path)
        again = load(tmp_path)
        assert type(again) is type(one) and (again.tokens, again.digest) == (one.tokens, one.digest)
    other = vocabularies.learn(PIECES.model_copy(update={"case": "keep", "size": 28}), TEXTS * 3)
    assert isinstance(other, Pieces) and other.digest != one.digest


def test_what_cannot_be_learned() -> None:
    with pytest.raises(UsageError, match="cannot make 500 pieces out of 3 transcripts: Vocabulary size too high"):
        vocabularies.learn(PIECES.model_copy(update={"size": 500}), TEXTS)
    with pytest.raises(UsageError, match="Vocabulary size is smaller than required_chars") as caught:
        vocabularies.learn(PIECES.model_copy(update={"size": 9}), TEXTS)
    assert "--character_coverage" not in caught.value.message
    with pytest.raises(DataError, match="stands between words"):
        Characters.learn(["a|b"], "keep")


@pytest.fixture
def recipe(tiny_corpus: Path, tmp_path: Path) -> schema.Recipe:
    """Of a pack that is there, with a vocabulary of pieces."""
    (tmp_path / "packs").mkdir()
    write_pack(tiny_corpus, "train-clean-100", tmp_path / "packs" / "train-clean-100", 2**20, 1, lambda _: None)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    sets = [f"data.packs={tmp_path}/packs", "data.train=[train-clean-100]"]
    sets += ["backbone.vocabulary.kind=sentencepiece", "backbone.vocabulary.size=28"]
    return recipe_file.load(tmp_path / "recipe.yaml", sets)


def test_it_is_learned_once_by_whoever_comes_first(recipe: schema.Recipe) -> None:
    """As by ranks that start at the same time; and counts the frames of every training utterance."""
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: vocabularies.of_recipe(recipe), range(3)))
    assert len({v.digest for v in made}) == 1
    (folder,) = recipe.data.packs.glob("vocabulary-*")
    assert sealing.verify(folder)["vocabulary"] == made[0].digest
    utterances = Utterances.of(recipe, ["train-clean-100"])
    frames = vocabularies.ctc_frames(recipe, utterances.lengths["ctc_frames"])
    assert frames.tolist() == [made[0].min_frames(utterances.row(i)["text"]) for i in range(len(utterances))]
    assert (frames > 0).all() and not np.array_equal(frames, utterances.lengths["ctc_frames"])
    (folder / "sentencepiece.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"sentencepiece\.model"):
        vocabularies.of_recipe(recipe)


def test_a_run_keeps_its_own(recipe: schema.Recipe, tmp_path: Path) -> None:
    """It is evaluated and exported where its packs are gone."""
    run = Run(tmp_path / "run")
    run.root.mkdir()
    run.resolved.write_text(recipe_file.dump(recipe))
    made = vocabularies.of_run(run)
    vocabularies.keep(made, run)
    vocabularies.keep(made, run)
    shutil.rmtree(recipe.data.packs)
    assert vocabularies.of_run(run).digest == made.digest
    assert set(SENTENCES) and sorted(p.name for p in run.vocabulary.iterdir()) == [
        "MANIFEST.json",
        "sentencepiece.model",
        "vocabulary.json",
    ]
