"""The evaluation subsets of a run, computed by all ranks together or by one process alone, scored and published.

Batches are cut from lengths alone, the same in every mode and at every world size. WER is the sum of errors over the
sum of words. When a run evaluates is in `cadence.py`, what is counted in `score.py`, who computes in `evaluating.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launcher import recipe as schema
from launcher import rundir
from launcher.errors import DataError
from launcher.marks import mark
from launcher.worker.adamw import EMA
from launcher.worker.backbone import CtcModel, SpeechModel
from launcher.worker.data import Tensors, Utterances, ahead
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.out_of_memory import memory_errors, of_evaluation
from launcher.worker.ranks import Ranks
from launcher.worker.sampler import evaluation_batches
from launcher.worker.score import Scored, count, normalizer, tables

Row = tuple[int, float, str]
"""Of one utterance: its number, its loss, what was heard."""


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


def criterion(cadence: schema.Evaluate, result: dict[str, Any]) -> float:
    """The WER by which checkpoints are compared."""
    of = result if cadence.best_on is None else result["subsets"].get(cadence.best_on, {})
    return float(of.get("wer", math.nan))


class Evaluator:
    """The evaluation subsets of a run, ready to be computed."""

    def __init__(self, recipe: schema.Recipe, model: SpeechModel, ranks: Ranks) -> None:
        self.recipe = recipe
        self.cadence = recipe.evaluate
        self.weights = "trained" if recipe.optimizer.ema is None else EMA
        """Which weights evaluations of training score."""
        self.model = model
        self.ranks = ranks
        self.utterances = Utterances.of(recipe, recipe.evaluate.subsets)
        check_letters(model, self.utterances)
        self.normalize = normalizer(recipe.evaluate.normalizer)
        padded = model.padded_samples(self.utterances.lengths["n_samples"].astype("int64"))
        self.seconds = padded / SAMPLE_RATE_HZ
        """What each takes in a batch when it is the longest there, shape (utterances,)."""
        self.batches = evaluation_batches(self.seconds, self.cadence.batch_seconds)
        slots = sum(int(padded[batch].max()) * len(batch) for batch in self.batches)
        self.padding = 1 - float(self.utterances.lengths["n_samples"].sum()) / slots
        """Share of what was computed that is no sound. Where a model hears less than all of it, below zero."""

    def compute(self, infer: Callable[[Tensors], Any], stop: Callable[[], bool]) -> list[Row] | None:
        """Every utterance, sorted, on every rank; all ranks compute.

        Every rank forwards the same number of batches: one that has none left repeats one and drops the result.

        Returns:
            None when a rank's `stop` asked to break off.
        """
        mine = self.batches[self.ranks.rank :: self.ranks.world_size]
        rounds = math.ceil(len(self.batches) / self.ranks.world_size)
        work = mine + [self.batches[-1]] * (rounds - len(mine))

        def asked() -> bool:
            mark("agree")
            stopped = bool(self.ranks.sum([float(stop())])[0])
            mark("batch")
            return stopped

        results = self._forward(work, len(mine), infer, asked)
        if results is None:
            return None
        mark("gather")
        return sorted(row for share in self.ranks.gather(results) for row in share)

    def alone(self, infer: Callable[[Tensors], Any], stop: Callable[[], bool]) -> list[Row] | None:
        """The same by this process, without the others; `stop` is asked before each batch, and makes the marks."""
        results = self._forward(self.batches, len(self.batches), infer, stop)
        return None if results is None else sorted(results)

    def _forward(
        self, work: Sequence[Any], kept: int, infer: Callable[[Tensors], Any], stop: Callable[[], bool]
    ) -> list[Row] | None:
        results: list[Row] = []
        for number, tensors in enumerate(ahead(self.load, work)):
            if stop():
                return None
            with memory_errors(partial(self._in_words, work[number]), self.recipe, of_evaluation):
                losses, texts = infer(tensors)
            if number < kept:
                rows = zip(work[number].tolist(), losses.tolist(), texts, strict=True)
                results += [(int(i), float(loss), text) for i, loss, text in rows]
        return results

    def _in_words(self, indices: Any) -> str:
        longest = float(self.utterances.lengths["n_samples"][indices].max()) / SAMPLE_RATE_HZ
        return f"an evaluation, on {len(indices)} utterances of up to {longest:.1f} s"

    def load(self, indices: Any) -> Tensors:
        """A batch; in several threads at once."""
        examples = [self.utterances.example(int(i)) for i in indices]
        return self.model.collate([e.waveform for e in examples], [e.text for e in examples])

    def publish(
        self, target: Path, step: int, rows: Sequence[Row], attempt: int, blocked_s: float, **facts: Any
    ) -> dict[str, Any]:
        """Check that each utterance came exactly once, score, and write the result whole. One process does it.

        Writes `target` and, first, `….hypotheses.jsonl` beside it. Returns what is in `target`.

        Args:
            blocked_s: for how long training stood still for it.
            facts: what else the result says of itself.

        Raises:
            StorageError: the disk does not take it.
        """
        if [row[0] for row in rows] != list(range(len(self.utterances))):
            raise RuntimeError(f"evaluation returned {len(rows)} results for {len(self.utterances)} utterances")
        limit = self.model.max_samples or math.inf
        sexes = {p.path.name: (rundir.read_json(p.path / "stats.json") or {}) for p in self.utterances.packs}
        samples = [self.utterances.row(index) for index, _, _ in rows]
        pairs = [(self.normalize(s["text"]), self.normalize(r[2])) for s, r in zip(samples, rows, strict=True)]
        scored, lines = [], []
        for (index, loss, text), sample, pair, errors in zip(rows, samples, pairs, count(pairs), strict=True):
            subset, speaker = self.utterances.subset_of(index), int(sample["speaker"])
            sex = sexes[subset].get("speaker_sex", {}).get(str(speaker))
            seconds = float(sample["n_samples"]) / SAMPLE_RATE_HZ
            scored.append(Scored(sample["utt_id"], subset, speaker, sex, seconds, errors))
            line = {"utt_id": sample["utt_id"], "subset": subset, "loss": loss, "text": text}
            lines.append({**line, "ref": pair[0], "hyp": pair[1]})
        told = tables(scored)
        result = {
            "step": step,
            "attempt": attempt,
            "mode": self.cadence.mode,
            "normalizer": self.cadence.normalizer,
            "decoder": "greedy",
            "weights": self.weights,
            "loss": sum(row[1] for row in rows) / len(rows),
            **told,
            "criterion": {"subset": self.cadence.best_on, "wer": criterion(self.cadence, told)},
            # Utterances of which the model heard only the beginning; all their words count.
            "truncated": int((self.utterances.lengths["n_samples"] > limit).sum()),
            "padding": round(self.padding, 6),
            "packs": self.utterances.digest,
            "blocked_s": round(blocked_s, 3),
            "time": time.time(),
            **facts,
        }
        with rundir.storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_jsonl(target.with_suffix(".hypotheses.jsonl"), lines)
        rundir.write_json(target, result)
        return result
