"""Pretrained architectures with all that a recipe can ask of them at once: adapters, activations computed twice, layers
dropped, frames masked, dropout. What is to change nothing changes nothing, and a kill neither.

The architectures are real and small, their weights random; two ranks under ZeRO 2 and 3.
"""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from launcher import audit, recipe_file, rundir
from launcher import recipe as schema
from launcher.errors import UsageError
from launcher.rundir import Run, read_lines
from launcher.worker import __main__ as worker
from launcher.worker import learning
from launcher.worker.models import build
from launcher.worker.pack import write_pack
from launcher.worker.weights import restored
from tests.conftest import make_corpus, seed
from tests.test_plan import recipe
from tests.worker import worlds
from tests.worker.backbones import make_wav2vec2, make_whisper, wav2vec2, whisper, whisper_ctc
from tests.worker.harm import Harm
from tests.worker.plain import by_us
from tests.worker.runs import events, numbers, state_digest, trained_on

STEPS, EVERY = 6, 2
ACCUMULATION = 2

LORA: dict[str, Any] = {"lora": {"rank": 2, "alpha": 16, "dropout": 0.1}}
WAYS: dict[str, dict[str, Any]] = {"whole": {}, "lora": LORA}
"""What of the model learns."""

Case = tuple[str, str, str]
"""Backbone, what of it learns, and ZeRO stage."""

ALL = int(os.environ.get("SPEECHCTL_TEST_KILLS", "3")) > 3
"""Kill a run of each, where the suite kills some."""

CASES: list[Case] = [
    (kind, way, stage)
    for stage in ("2", "3")  # stage 3 changes torch's linear layer for good, and with it the last bits of what follows
    for kind in ("wav2vec2", "whisper")
    for way in WAYS
    if ALL or way == "lora" or stage == "3"
] + [("whisper-ctc", "lora", "3")]
CUT = [
    case
    for case in CASES
    if ALL or case in (("wav2vec2", "lora", "2"), ("wav2vec2", "whole", "3"), ("whisper", "lora", "3"))
]


@dataclass(frozen=True)
class Watched(Harm):
    """Counts how often the first layer is computed in training; and a rank may kill itself between two micro-batches
    of a step."""

    dies_at: int = 0
    """The step."""

    def plan(self, training: Any) -> None:
        model, rank = training.engine.model, training.ranks.rank
        layer = next(
            m for m in model.inner.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList)
        ).layers[0]
        calls: list[int] = []
        # Not of the layer itself: its hooks are outside of what is computed again.
        next(layer.children()).register_forward_pre_hook(lambda module, _: calls.append(1) if module.training else None)
        whole, go = training.engine.backward, training.go

        def backward(tensors: dict[str, torch.Tensor], factor: float, last: bool) -> torch.Tensor:
            if last and (rank, training.progress.step + 1) == (self.rank, self.dies_at):
                os.kill(os.getpid(), signal.SIGKILL)
            result: torch.Tensor = whole(tensors, factor, last)
            return result

        def counted() -> Any:
            code = go()
            rundir.write_json(training.run.root / f"calls-{rank}", len(calls))
            return code

        training.engine.backward, training.go = backward, counted


def backbones(root: Path) -> dict[str, schema.Backbone]:
    """All that is drawn at random is on: layers, masks, and dropout everywhere."""
    return {
        "wav2vec2": wav2vec2(make_wav2vec2(root / "wav2vec2", layers=3), layerdrop=0.4, dropout=0.1),
        "whisper-ctc": whisper_ctc(root / "whisper", layerdrop=0.4, dropout=0.1, spec_augment=True),
        "whisper": whisper(
            make_whisper(root / "whisper", layers=2, seconds=2), layerdrop=0.4, dropout=0.1, spec_augment=True
        ),
    }


@dataclass(frozen=True)
class Trained:
    root: Path
    kept: dict[Case, Run]
    """Undisturbed, with activations kept."""
    twice: dict[Case, Run]
    """With activations computed again on the way back; those in `CUT` killed on the way, and resumed."""


def prepared(root: Path, backbone: schema.Backbone, case: Case, twice: bool) -> Run:
    kind, way, stage = case
    seconds = 2 if kind == "wav2vec2" else 60
    more: dict[str, Any] = {
        **WAYS[way],
        "max_steps": STEPS,
        "activation_checkpointing": twice,
        "batch": {"step_seconds": 2 * ACCUMULATION * seconds, "max_rank_seconds": seconds},
        "checkpoint": {"every_steps": EVERY, "keep_last": 9},
        "evaluate": {"subsets": ["dev-clean"], "batch_seconds": 0.3, "at_end": False},  # one by one
        "optimizer": {"learning_rate": 1e-2},
    }
    where = root / f"{kind}-{way}-{stage}-{'twice' if twice else 'kept'}"
    return worlds.prepare(where, root, backbone, stage, "fp32", **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("pretrained")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    made = backbones(root)
    kept, twice = ({case: prepared(root, made[case[0]], case, again) for case in CASES} for again in (False, True))
    worlds.train(2, [run.new_attempt() for run in kept.values()], harms=[Watched(-1)] * len(CASES))
    dice = random.Random(seed(3))
    for case in CUT:  # the checkpoint at step 2 is sealed when step 5 begins; that at step 4 perhaps
        dies = Watched(-1, rank=dice.randrange(2), dies_at=dice.randint(5, STEPS))
        assert worlds.train_until_killed(2, twice[case].new_attempt(), dies, 0)
    worlds.train(2, [run.new_attempt() for run in twice.values()], harms=[Watched(-1)] * len(CASES))
    return Trained(root, kept, twice)


def ids(case: Case) -> str:
    return "-".join(case)


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_neither_activations_computed_twice_nor_a_kill_change_anything(trained: Trained, case: Case) -> None:
    """Losses, gradient norms and the last state bit for bit: what is computed again draws what was drawn before, of
    dropout and of layers; and a run that was killed draws on where its checkpoint was."""
    kept, twice = trained.kept[case], trained.twice[case]
    expected = numbers(kept)
    assert len(expected) == STEPS and all(len(pairs) == 1 for pairs in expected.values())
    assert numbers(twice) == expected
    assert state_digest(twice.checkpoint(STEPS) / "deepspeed") == state_digest(kept.checkpoint(STEPS) / "deepspeed")
    assert trained_on(twice) == trained_on(kept)
    assert audit.audit(twice).discrepancies == []
    begun = [e["step"] for a in twice.attempts() for e in events(a, "started")]
    assert begun == ([0, begun[-1]] if case in CUT else [0]) and (case not in CUT or begun[-1] in (2, 4))
    of_last = (STEPS - begun[-1]) * ACCUMULATION
    for rank in (0, 1):
        assert rundir.read_json(kept.root / f"calls-{rank}") == STEPS * ACCUMULATION
        assert rundir.read_json(twice.root / f"calls-{rank}") == 2 * of_last


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_adapters_learn_the_same_at_both_stages(trained: Trained, kind: str) -> None:
    """With every rank's own dice for dropout, and the same for layers."""
    rows = [read_lines(trained.kept[kind, "lora", stage].attempts()[0].metrics) for stage in ("2", "3")]
    second, third = ([(row["loss"], row["grad_norm"]) for row in of_stage] for of_stage in rows)
    assert np.array(second) == pytest.approx(np.array(third), rel=1e-4)
    assert all(norm > 0 for _, norm in second)


@pytest.mark.ranks
@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "lora"], ids=ids)
def test_an_average_with_adapters_is_that_of_the_models(
    trained: Trained, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate --average` and `export --average`: the mean of what would be exported of each checkpoint. The product
    of two means is not the mean of the products: adapters were averaged factor by factor."""
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    run = trained.twice[case]
    own = recipe_file.load(run.resolved)
    models = [restored(run, step, own.backbone, own.seed).state_dict() for step in (2, 4, 6)]
    mean = restored(run, [2, 4, 6], own.backbone, own.seed)
    moved = 0
    for name, weight in mean.state_dict().items():
        exact = sum(model[name].double() for model in models) / 3
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-7)
        moved += not torch.equal(weight, models[2][name])
    assert moved >= 2
    steps = [word for step in (2, 4, 6) for word in ("--step", str(step))]
    assert worker.main(["evaluate", str(run.root), *steps, "--target", str(tmp_path / "average.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in result["source"]["average_of"]] == [2, 4, 6]
    heard = {row["utt_id"]: row["text"] for row in read_lines(tmp_path / "average.hypotheses.jsonl")}
    assert heard
    for utt_id, text in heard.items():
        file = next((trained.root / "LibriSpeech").rglob(f"{utt_id}.flac"))
        assert by_us(mean.eval(), soundfile.read(file, dtype="float32")[0])[1] == text


def test_adapters_that_nobody_would_hear_are_refused(tmp_path: Path) -> None:
    """WavLM's attention hands its weights to torch, past what stands in their place: a run with the default targets
    trained its fresh head alone, and said nothing."""
    source = make_wav2vec2(tmp_path / "wavlm", family="WavLM")
    for targets, unheard in ((None, "q_proj, v_proj"), (["attention.out_proj", "output_dense"], "attention.out_proj")):
        lora = {} if targets is None else {"targets": targets}
        asked = recipe(backbone=wav2vec2(source, kind="wavlm").model_dump(), lora=lora)
        with pytest.raises(UsageError, match=f"lora.targets: {unheard}: wavlm reads") as refused:
            learning.prepare(build(asked.backbone, seed=1), asked)
        assert "intermediate_dense" in refused.value.hint
