"""Where a CTC head's vocabulary comes from: the letters that need no learning, or what the training transcripts hold.

A vocabulary is learned once, in one process, and sealed beside the packs under a name that says from which packs and
how; the run keeps a copy, so that it can be evaluated and exported where its packs are gone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher import recipe as schema
from launcher import recipe_file, sealing, staging
from launcher.errors import UsageError
from launcher.rundir import Run
from launcher.worker.data import Utterances
from launcher.worker.vocabulary import SPECIALS, Characters, Letters, Pieces, Vocabulary, load

_FRAMES = "ctc_frames.npy"
_NAMES = ("pad", "bos", "eos", "unk")
_SPECIAL: dict[str, Any] = {
    **{f"{name}_id": i for i, name in enumerate(_NAMES)},
    **{f"{name}_piece": piece for name, piece in zip(_NAMES, SPECIALS, strict=True)},
}


def of_recipe(recipe: schema.Recipe) -> Vocabulary:
    """The vocabulary of the recipe's head; learned and sealed beside the packs where it is not yet.

    Raises:
        UsageError: there are not as many pieces in the transcripts as asked for.
        DataError: a pack is missing, or what is there was changed.
    """
    asked = getattr(recipe.backbone, "vocabulary", None)
    return Letters() if asked is None or asked.kind == "letters" else load(_sealed(recipe))


def of_run(run: Run) -> Vocabulary:
    """The vocabulary of a run: its own copy, or else that of its recipe."""
    if run.vocabulary.is_dir():
        sealing.verify(run.vocabulary)
        return load(run.vocabulary)
    return of_recipe(recipe_file.load(run.resolved))


def keep(vocabulary: Vocabulary, run: Run) -> None:
    """Give the run its copy. By one process; letters are not kept."""
    if isinstance(vocabulary, Letters) or run.vocabulary.is_dir():
        return
    with staging.staged(run.vocabulary) as folder:
        vocabulary.save(folder)
        sealing.seal(folder, run.vocabulary, {"format": "speechctl.vocabulary/1", "vocabulary": vocabulary.digest})


def ctc_frames(recipe: schema.Recipe, of_packs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Frames that CTC needs at least for each training utterance, -1 where it has no spelling, in the order of packs.

    Args:
        of_packs: what the packs say, which is of LibriSpeech's letters.
    """
    asked = getattr(recipe.backbone, "vocabulary", None)
    if asked is None or asked.kind == "letters":
        return of_packs
    counted: npt.NDArray[Any] = np.load(_sealed(recipe) / _FRAMES, allow_pickle=False)
    return counted


def _sealed(recipe: schema.Recipe) -> Path:
    """The sealed directory of the recipe's vocabulary, verified; made where it is not there."""
    asked: Any = recipe.backbone.vocabulary  # type: ignore[union-attr]
    utterances = Utterances.of(recipe, recipe.data.train)
    source = {"asked": asked.model_dump(), "packs": utterances.digest}
    target = recipe.data.packs / f"vocabulary-{asked.kind}-{sealing.digest_json(source)[:12]}"
    while not target.is_dir():
        try:
            with staging.staged(target) as folder:
                if target.is_dir():
                    break
                texts = [str(utterances.row(i)["text"]) for i in range(len(utterances))]
                made = learn(asked, texts)
                made.save(folder)
                np.save(folder / _FRAMES, np.array([made.min_frames(text) for text in texts], dtype=np.int32))
                facts = {"format": "speechctl.vocabulary/1", "source": source, "vocabulary": made.digest}
                sealing.seal(folder, target, facts)
        except staging.Busy:
            time.sleep(0.2)  # a rank beside this one was first
    sealing.verify(target)
    return target


def learn(asked: schema.Characters | schema.SentencePiece, texts: Sequence[str]) -> Vocabulary:
    """The same vocabulary from the same transcripts in the same order, whatever the machine."""
    if isinstance(asked, schema.Characters):
        return Characters.learn(texts, asked.case)
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, asked.case),
            model_writer=model,
            vocab_size=asked.size,
            model_type="unigram",
            character_coverage=1.0,  # every character of the transcripts can be written
            normalization_rule_name="identity",
            max_sentence_length=2**20,  # in bytes; a longer transcript would be left out in silence
            num_threads=1,  # the sums of several are not always the same
            minloglevel=2,
            **_SPECIAL,
        )
    except RuntimeError as error:
        said = str(error).rpartition("] ")[2].partition(". Increase")[0] or str(error)
        raise UsageError(
            f"SentencePiece cannot make {asked.size} pieces out of {len(texts)} transcripts: {said}",
            hint="set backbone.vocabulary.size to what they can fill",
        ) from error
    return Pieces(model.getvalue(), asked.case)


def _sentences(texts: Iterable[str], case: str) -> Iterator[str]:
    plain = Characters((), case)
    return (line for text in texts if (line := plain._in_case(text)))
