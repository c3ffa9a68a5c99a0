"""WER at rank 0's cadence: rank 0 decides when, scores and publishes; all ranks compute.

Batches are cut from lengths alone, the same at every world size. WER is the sum of errors over the sum of words.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer

from launcher import recipe as schema
from launcher import rundir
from launcher.errors import DataError
from launcher.marks import mark
from launcher.worker import shims
from launcher.worker.backbone import CtcModel, SpeechModel
from launcher.worker.data import Tensors, Utterances, ahead
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.ranks import Ranks
from launcher.worker.sampler import evaluation_batches

# When ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What the cadence is decided on, after a step."""

    step: int
    epochs: float
    """Epochs done, with a fraction."""
    epochs_before: float
    """The same, one step earlier."""
    minutes_since_last: float
    """By rank 0's clock, since the last evaluation ended or training began."""


def is_due(cadence: schema.Evaluate, now: Moment, max_steps: int) -> bool:
    """Whether rank 0 wants an evaluation now. Pure; tested as a table."""
    if now.step == max_steps:
        return cadence.at_end
    if now.step < cadence.after_steps:
        return False
    if cadence.every_steps and now.step % cadence.every_steps == 0:
        return True
    if cadence.every_epochs and math.floor(now.epochs / cadence.every_epochs + 1e-9) > math.floor(
        now.epochs_before / cadence.every_epochs + 1e-9
    ):
        return True
    return cadence.every_minutes is not None and now.minutes_since_last >= cadence.every_minutes


# What ----------------------------------------------------------------------------------------------------------------


def normalizer(name: str) -> Callable[[str], str]:
    """Text to words, the same on both sides. Numbers under different normalizers cannot be compared."""
    if name == "librispeech":
        return lambda text: " ".join(re.sub(r"[^A-Z' ]+", " ", text.upper()).split())
    shims.apply()
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # Without the spelling table: checkpoints do not always carry it, and LibriSpeech's spelling is its own.
    english: Callable[[str], str] = EnglishTextNormalizer({})
    return english


def score(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Errors of (reference, hypothesis) pairs, already normalized, as sums over all of them."""
    references, hypotheses, inserted = [], [], 0
    utterances = 0
    for reference, hypothesis in pairs:
        utterances += 1
        if reference:
            references.append(reference)
            hypotheses.append(hypothesis)
        else:  # jiwer takes no empty reference; whatever was heard there is inserted
            inserted += len(hypothesis.split())
    counts = {"substitutions": 0, "insertions": inserted, "deletions": 0, "words": 0}
    if references:
        output = jiwer.process_words(references, hypotheses)
        counts["substitutions"] = output.substitutions
        counts["insertions"] += output.insertions
        counts["deletions"] = output.deletions
        counts["words"] = output.hits + output.substitutions + output.deletions
    errors = counts["substitutions"] + counts["insertions"] + counts["deletions"]
    wer = errors / counts["words"] if counts["words"] else math.nan
    return {"wer": wer, "errors": errors, **counts, "utterances": utterances}


# Who -----------------------------------------------------------------------------------------------------------------


def check_letters(model: SpeechModel, utterances: Utterances) -> None:
    """Refuse, before hours of training, references that the model has no letters for.

    Raises:
        DataError: names how many there are, and the first.
    """
    odd = (utterances.lengths["ctc_frames"] < 0).nonzero()[0]
    if isinstance(model, CtcModel) and model.vocabulary.kind == "letters" and len(odd):
        row = utterances.row(int(odd[0]))
        raise DataError(
            f"{len(odd)} of {len(utterances)} references to evaluate on have other characters than A to Z and the"
            f" apostrophe; the first: {row['utt_id']} {row['text']!r}",
            hint="rewrite these transcripts and pack again, or evaluate on other subsets",
        )


class Evaluator:
    """The evaluation subsets of a run, ready to be computed by all ranks together."""

    def __init__(self, recipe: schema.Recipe, model: SpeechModel, ranks: Ranks) -> None:
        self.cadence = recipe.evaluate
        self.model = model
        self.ranks = ranks
        self.utterances = Utterances.of(recipe, recipe.evaluate.subsets)
        check_letters(model, self.utterances)
        self.normalize = normalizer(recipe.evaluate.normalizer)
        padded = model.padded_samples(self.utterances.lengths["n_samples"].astype("int64"))
        self.batches = evaluation_batches(padded / SAMPLE_RATE_HZ, self.cadence.batch_seconds)

    def compute(self, infer: Callable[[Tensors], Any], stop: Callable[[], bool]) -> list[tuple[int, float, str]] | None:
        """Loss and transcript of every utterance, as (index, loss, text), on every rank.

        Every rank forwards the same number of batches: one that has none left repeats one and drops the result.

        Returns:
            None when a rank's `stop` asked to break off.
        """
        mine = self.batches[self.ranks.rank :: self.ranks.world_size]
        rounds = math.ceil(len(self.batches) / self.ranks.world_size)
        work = mine + [self.batches[-1]] * (rounds - len(mine))
        results: list[tuple[int, float, str]] = []
        for number, tensors in enumerate(ahead(self._load, work)):
            mark("agree")
            if self.ranks.sum([float(stop())])[0]:
                return None
            mark("batch")
            losses, texts = infer(tensors)
            if number < len(mine):
                rows = zip(work[number].tolist(), losses.tolist(), texts, strict=True)
                results += [(int(i), float(loss), text) for i, loss, text in rows]
        mark("gather")
        return sorted(row for share in self.ranks.gather(results) for row in share)

    def _load(self, indices: Any) -> Tensors:
        examples = [self.utterances.example(int(i)) for i in indices]
        return self.model.collate([e.waveform for e in examples], [e.text for e in examples])

    def publish(
        self, target: Path, step: int, rows: list[tuple[int, float, str]], attempt: int, blocked_s: float
    ) -> dict[str, Any]:
        """Rank 0: check that each utterance came exactly once, score, and write the result whole.

        Writes `target` and, first, `….hypotheses.jsonl` beside it. Returns what is in `target`.
        """
        if [row[0] for row in rows] != list(range(len(self.utterances))):
            raise RuntimeError(f"evaluation returned {len(rows)} results for {len(self.utterances)} utterances")
        limit = self.model.max_samples or math.inf
        pairs: dict[str, list[tuple[str, str]]] = {s: [] for s in self.cadence.subsets}
        lines = []
        for index, loss, text in rows:
            subset = self.utterances.subset_of(index)
            row = self.utterances.row(index)
            pair = self.normalize(row["text"]), self.normalize(text)
            pairs[subset].append(pair)
            lines.append(
                {"utt_id": row["utt_id"], "subset": subset, "loss": loss, "text": text, "ref": pair[0], "hyp": pair[1]}
            )
        result = {
            "step": step,
            "attempt": attempt,
            "mode": self.cadence.mode,
            "normalizer": self.cadence.normalizer,
            "loss": sum(row[1] for row in rows) / len(rows),
            **score(p for subset in pairs.values() for p in subset),
            "subsets": {subset: score(p) for subset, p in pairs.items()},
            # Utterances of which the model heard only the beginning; all their words count.
            "truncated": int((self.utterances.lengths["n_samples"] > limit).sum()),
            "blocked_s": round(blocked_s, 3),
            "time": time.time(),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_jsonl(target.with_suffix(".hypotheses.jsonl"), lines)
        rundir.write_json(target, result)
        return result
