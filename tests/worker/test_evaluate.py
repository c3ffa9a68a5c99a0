"""When an evaluation is due, what it computes, and WER counted by hand."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch

from launcher import recipe as schema
from launcher.errors import MemoryExhausted
from launcher.rundir import Run, read_json, read_lines
from launcher.worker.cadence import Moment, is_due
from launcher.worker.engine import Engine
from launcher.worker.evaluate import Evaluator
from launcher.worker.evaluating import Evaluations
from launcher.worker.pack import write_pack
from launcher.worker.ranks import Ranks
from launcher.worker.tiny_ctc import TinyCtcModel
from launcher.worker.vocabulary import Letters

T = TypeVar("T")

# When ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cadence", "step", "epochs", "minutes", "due"),
    [
        ({"every_steps": 10}, 9, 0.9, 0, False),
        ({"every_steps": 10}, 10, 1.0, 0, True),
        ({"every_steps": 10}, 11, 1.1, 0, False),
        ({"every_steps": 10, "after_steps": 20}, 10, 1.0, 0, False),
        ({"every_steps": 10, "after_steps": 20}, 20, 2.0, 0, True),
        ({"every_epochs": 1}, 9, 0.9, 0, False),
        ({"every_epochs": 1}, 10, 1.0, 0, True),
        ({"every_epochs": 0.5}, 5, 0.5, 0, True),
        ({"every_epochs": 0.5}, 6, 0.6, 0, False),
        ({"every_epochs": 0.05}, 7, 0.7, 0, True),
        ({"every_epochs": 2}, 10, 1.0, 0, False),
        ({"every_epochs": 2}, 20, 2.0, 0, True),
        ({"every_minutes": 5}, 3, 0.3, 4.9, False),
        ({"every_minutes": 5}, 3, 0.3, 5.0, True),
        ({"every_minutes": 5, "after_steps": 4}, 3, 0.3, 60, False),
        ({"every_steps": 7, "every_minutes": 5}, 14, 1.4, 0, True),
        ({}, 50, 5.0, 600, False),
        ({"every_steps": 100}, 100, 10.0, 600, True),  # the last step: as at_end says
        ({"every_steps": 100, "at_end": False}, 100, 10.0, 600, False),
        ({"after_steps": 1000}, 100, 10.0, 0, True),
    ],
)
def test_is_due(cadence: dict[str, Any], step: int, epochs: float, minutes: float, due: bool) -> None:
    """Ten steps an epoch, a hundred steps in all."""
    wanted = schema.Evaluate.model_validate({"subsets": ["dev-clean"], **cadence})
    assert is_due(wanted, Moment(step, epochs, epochs - 0.1, minutes), max_steps=100) is due


def test_epochs_counted_in_thirds_come_once_each() -> None:
    """Three steps an epoch: 3 x (1/3) must not fall short of 1, nor count twice."""
    wanted = schema.Evaluate(subsets=["dev-clean"], every_epochs=1)
    due = [is_due(wanted, Moment(n, n / 3, (n - 1) / 3, 0), max_steps=1000) for n in range(1, 31)]
    assert due == [n % 3 == 0 for n in range(1, 31)]


# Who -----------------------------------------------------------------------------------------------------------------


class OneOf(Ranks):
    """A rank of a world that is not there: it hears only itself."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cpu")

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(v) for v in values]

    def gather(self, value: T) -> list[T]:
        return [value]


def recipe_of(tiny_corpus: Path, packs: Path, **cadence: Any) -> schema.Recipe:
    return schema.Recipe.model_validate(
        {
            "name": "x",
            "data": {"corpus": tiny_corpus, "packs": packs, "train": ["train-clean-100"]},
            "backbone": {"kind": "tiny-ctc", "hidden": 8, "layers": 1},
            "max_steps": 1,
            "batch": {"step_seconds": 8, "max_rank_seconds": 8},
            "optimizer": {"learning_rate": 1e-3},
            "evaluate": {"subsets": ["dev-clean", "train-clean-100"], **cadence},
            "checkpoint": {"every_steps": 1},
        }
    )


def evaluator(tiny_corpus: Path, packs: Path, ranks: Ranks, **cadence: Any) -> Evaluator:
    recipe = recipe_of(tiny_corpus, packs, **cadence)
    for subset in recipe.evaluate.subsets:
        if not recipe.pack(subset).exists():
            packs.mkdir(exist_ok=True)
            write_pack(tiny_corpus, subset, recipe.pack(subset), 2**20, 1, lambda _: None)
    assert isinstance(recipe.backbone, schema.TinyCtc)
    torch.manual_seed(1)
    return Evaluator(recipe, TinyCtcModel(recipe.backbone, Letters()).eval(), ranks)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_rank_forwards_as_many_batches_and_each_utterance_comes_once(
    tiny_corpus: Path, tmp_path: Path, world_size: int
) -> None:
    """17 utterances in 7 batches. The result is the same at every world size."""
    calls, rows = [], []
    for rank in range(world_size):
        one = evaluator(tiny_corpus, tmp_path / "packs", OneOf(rank, world_size), batch_seconds=3)
        assert len(one.batches) == 7
        count = 0

        def infer(tensors: Any, one: Evaluator = one) -> Any:
            nonlocal count
            count += 1
            with torch.no_grad():
                return one.model(tensors, transcribe=True)

        mine = one.compute(infer, lambda: False)
        assert mine is not None
        calls.append(count)
        rows += mine
    assert calls == [math.ceil(len(one.batches) / world_size)] * world_size
    assert [row[0] for row in sorted(rows)] == list(range(17))
    alone = evaluator(tiny_corpus, tmp_path / "packs", Ranks(), batch_seconds=3)
    with torch.no_grad():
        assert sorted(rows) == alone.compute(lambda t: alone.model(t, transcribe=True), lambda: False)


@pytest.mark.parametrize("mode", ["collective", "rank0"])
def test_an_evaluation_that_draws_is_not_noticed(tiny_corpus: Path, tmp_path: Path, mode: str) -> None:
    """Whatever a model does in evaluation, the next dropout of training is what it would have been."""
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks(), mode=mode)

    class Drawing:
        def alone(self) -> Any:
            return one.model

        def averaged(self) -> Any:
            return nullcontext()

        def infer(self, tensors: Any, alone: Any = None) -> Any:
            torch.rand(3), np.random.rand(3), random.random()
            with torch.no_grad():
                return one.model(tensors, transcribe=True)

    run = Run(tmp_path / "run")
    run.root.mkdir()
    beside = Evaluations(
        run.new_attempt(), recipe_of(tiny_corpus, tmp_path / "packs", mode=mode), cast(Engine, Drawing()), Ranks(), one
    )
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    wanted = float(torch.rand(())), float(np.random.rand()), random.random()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    outcome = beside.now(3, lambda: False)
    assert outcome is not None and outcome.result is not None
    result = outcome.result
    assert result["mode"] == mode and read_json(run.evaluation(3)) == result
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == wanted


def test_a_stop_breaks_off(tiny_corpus: Path, tmp_path: Path) -> None:
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks(), batch_seconds=3)
    answers = iter([False, True])
    with torch.no_grad():
        assert one.compute(lambda t: one.model(t, transcribe=True), lambda: next(answers)) is None


def test_published_by_subset_and_in_all(tiny_corpus: Path, tmp_path: Path) -> None:
    """One wrong word in dev-clean; `truncated` counts what the model heard only the beginning of. Whose sex the corpus
    does not know is in no group of that."""
    speakers = (
        ";ID  |SEX| SUBSET     |MINUTES| NAME\n84   | F | dev-clean  | 8.02  | Ann\n174  | M | dev-clean | 9 | Ben\n"
    )
    (tiny_corpus / "SPEAKERS.TXT").write_text(speakers)
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks())
    one.model.max_samples = int(sorted(one.utterances.lengths["n_samples"])[-3])
    rows = [(i, 0.5, one.utterances.row(i)["text"]) for i in range(17)]
    words = rows[2][2].split()
    rows[2] = (2, 1.5, " ".join(["WRONG", *words[1:]]))
    result = one.publish(tmp_path / "step-00000003.json", 3, rows, attempt=1, blocked_s=1.0)
    assert read_json(tmp_path / "step-00000003.json") == result
    total = sum(len(row[2].split()) for row in rows)
    assert (result["errors"], result["substitutions"], result["words"]) == (1, 1, total)
    assert result["wer"] == 1 / total
    assert result["loss"] == pytest.approx((16 * 0.5 + 1.5) / 17)
    assert {s: (r["errors"], r["utterances"]) for s, r in result["subsets"].items()} == {
        "dev-clean": (1, 5),
        "train-clean-100": (0, 12),
    }
    assert result["truncated"] == 2
    assert {sex: row["utterances"] for sex, row in result["sexes"].items()} == {"F": 3, "M": 2}
    assert {speaker: row["utterances"] for speaker, row in result["speakers"].items()} == {
        **{"84": 3, "174": 2},
        **{"19": 7, "26": 3, "103": 2},
    }
    lengths = one.utterances.lengths["n_samples"]
    slots = sum(int(lengths[batch].max()) * len(batch) for batch in one.batches)
    assert result["padding"] == pytest.approx(1 - lengths.sum() / slots, abs=1e-6) and 0 < result["padding"] < 1
    assert [row["errors"] for row in result["worst"]] == [1] and "S" in [k for k, *_ in result["worst"][0]["aligned"]]
    lines = read_lines(tmp_path / "step-00000003.hypotheses.jsonl")
    assert [line["subset"] for line in lines] == ["dev-clean"] * 5 + ["train-clean-100"] * 12
    assert lines[2]["hyp"].startswith("WRONG") and lines[2]["utt_id"] == one.utterances.row(2)["utt_id"]


def test_by_the_subset_that_decides(tiny_corpus: Path, tmp_path: Path) -> None:
    """A wrong word in dev-clean changes nothing where the other subset decides which checkpoint is the best."""
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks(), best_on="train-clean-100")
    rows = [(i, 0.5, one.utterances.row(i)["text"] if i else "WRONG") for i in range(17)]
    result = one.publish(tmp_path / "step-00000003.json", 3, rows, attempt=1, blocked_s=1.0)
    assert result["criterion"] == {"subset": "train-clean-100", "wer": 0.0} and result["wer"] > 0


@pytest.mark.parametrize("how", ["missing", "twice", "unknown"])
def test_what_did_not_come_exactly_once_is_not_published(tiny_corpus: Path, tmp_path: Path, how: str) -> None:
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks())
    rows = [(i, 0.5, "A") for i in range(17)]
    rows = {"missing": rows[:-1], "twice": sorted([*rows, rows[4]]), "unknown": [*rows[:-1], (17, 0.5, "A")]}[how]
    with pytest.raises(RuntimeError, match="results for 17 utterances"):
        one.publish(tmp_path / "out" / "step-00000003.json", 3, rows, attempt=1, blocked_s=1.0)
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_names_the_batch_and_the_setting(tiny_corpus: Path, tmp_path: Path) -> None:
    """It said to lower batch.max_rank_seconds, which does nothing for an evaluation, and not which batch it was; on a
    CPU it was taken for an error of the training code."""
    one = evaluator(tiny_corpus, tmp_path / "packs", Ranks(), batch_seconds=3)

    def infer(_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:123] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(MemoryExhausted) as raised:
        one.compute(infer, lambda: False)
    assert re.search(r"out of memory in an evaluation, on \d+ utterances of up to \d+\.\d s: ", raised.value.message)
    assert "evaluate.batch_seconds, 3 now" in raised.value.hint and "max_rank" not in raised.value.hint
