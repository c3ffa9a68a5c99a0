"""What learns, when and how fast, and steps that are left out: the same under every engine, exact after a resume."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import xxhash

from launcher import audit, recipe_file, report, rundir, sealing
from launcher import recipe as schema
from launcher.errors import TrainingError, UsageError
from launcher.rundir import Attempt, Run, read_json, read_lines
from launcher.worker import learning, verbs
from launcher.worker.learning import part_of
from launcher.worker.models import build
from launcher.worker.pace import Pace
from launcher.worker.pack import write_pack
from launcher.worker.weights import restored, weights_of
from tests.conftest import make_corpus
from tests.test_plan import recipe
from tests.worker import worlds
from tests.worker.harm import Harm
from tests.worker.runs import events

STAGES = ("off", "0", "1", "2", "3")

STEPS = 14
UNFROZEN, FROZEN_AGAIN = 6, 10
"""When the layers begin to learn, and when the head no longer does."""
BAD = (3, 4)
"""Steps at which rank 1 gets a NaN."""
UNSOUND = 7
"""Behind which of its steps rank 1 has a weight for a moment that is infinite."""
CLIP = 35.0
"""Some gradients of the story are longer, some are not: AdamW would not notice a factor that all have."""
CUT = 5
"""Where the run is cut in two: behind the NaN, while the layers are frozen."""

ALL = bool(os.environ.get("SPEECHCTL_TEST_STAGES"))
"""1, 2 and 4 ranks at every stage, where the suite has some of them."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with packs of twelve utterances."""
    root = tmp_path_factory.mktemp("learning")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    return root


TINY = schema.TinyCtc(kind="tiny-ctc", hidden=32, layers=2, dropout=0.0, spec_augment=False)


def prepared(root: Path, name: str, stage: str, precision: str = "fp32", **changes: Any) -> Run:
    """A run directory as `launch` leaves it: four micro-batches a step, over any number of ranks up to four."""
    fixed: dict[str, Any] = {
        "max_steps": STEPS,
        "batch": {"step_seconds": 8, "max_rank_seconds": 2},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every_steps": 100},
    }
    return worlds.prepare(root / name, root, TINY, stage, precision, **{**fixed, **changes})


class Twisted(Harm):
    """Does something to the `Training` of each rank before it begins."""

    def __init__(self, what: Callable[[Any], None]) -> None:
        super().__init__(step=-1)
        object.__setattr__(self, "what", what)

    def plan(self, training: Any) -> None:
        self.what(training)  # type: ignore[attr-defined]


def train(runs: Iterable[Run], stop_at: int = 0, twist: Callable[[Any], None] | None = None) -> None:
    """By two ranks."""
    attempts = [run.new_attempt() for run in runs]
    worlds.train(2, attempts, stop_at, None if twist is None else [Twisted(twist)] * len(attempts))


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for attempt in run.attempts() for row in read_lines(attempt.metrics)]


def numbers(run: Run) -> list[float]:
    """Losses and gradient norms of the steps that were not left out."""
    return [x for row in rows(run) if not row.get("left_out") for x in (row["loss"], row["grad_norm"])]


# Equality ------------------------------------------------------------------------------------------------------------

OTHER_WAYS: dict[str, dict[str, Any]] = {
    "2 offloaded": {"offload": {"optimizer": True}},
    "3 offloaded": {"offload": {"optimizer": True, "parameters": True}},
    "2 twice": {"activation_checkpointing": True},
    "3 twice": {"activation_checkpointing": True},
    "1 raw": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5000}}},
}
"""What changes where things lie and how often they are computed, and nothing else."""

WORLDS: dict[int, tuple[str, ...]] = {1: ("off",), 2: (*STAGES, *OTHER_WAYS), 4: ("3",)}
if ALL:
    WORLDS = {1: (*STAGES, *OTHER_WAYS), 2: (*STAGES, *OTHER_WAYS), 4: (*STAGES, *OTHER_WAYS)}


@pytest.mark.ranks
def test_any_number_of_ranks_at_any_stage_trains_the_same(packed: Path) -> None:
    """The same four micro-batches a step by 1, 2 and 4 ranks, without ZeRO and at stages 0 to 3, offloaded or not,
    activations kept or computed twice: 20 losses and gradient norms agree to 1e-4 in fp32.

    The norm too: AdamW and clipping would hide a wrong factor from the losses.
    """
    made: dict[tuple[int, str], Run] = {}
    for world_size, ways in WORLDS.items():
        for way in ways:
            changes = OTHER_WAYS.get(way, {})
            made[world_size, way] = prepared(packed, f"by-{world_size}-{way}", way.split()[0], max_steps=20, **changes)
        worlds.train(world_size, [run.new_attempt() for (n, _), run in made.items() if n == world_size])
    expected = numbers(made[1, "off"])
    assert len(expected) == 40 and min(expected[-8::2]) < expected[0]
    for key, run in made.items():
        assert numbers(run) == pytest.approx(expected, rel=1e-4), key


# A slow rank ---------------------------------------------------------------------------------------------------------


SLEEP_S = 0.5
"""200 ms are found on an idle machine; where other tests run beside this one, the steps of its peer take as long, and
sometimes longer: then it sleeps for longer, too."""


def rank_1_sleeps(training: Any) -> None:
    whole = training.engine.backward

    took_s = 0.0

    def backward(tensors: dict[str, torch.Tensor], factor: float, last: bool) -> torch.Tensor:
        nonlocal took_s
        if training.ranks.rank == 1 and last:
            time.sleep(max(SLEEP_S, 3 * took_s))
        began = time.monotonic()
        result: torch.Tensor = whole(tensors, factor, last)
        took_s = time.monotonic() - began
        return result

    training.engine.backward = backward
    training.pace = Pace(window=6)


@pytest.mark.ranks
def test_a_rank_that_sleeps_is_named(packed: Path) -> None:
    """In every step, while its peer waits for it: by DDP, and inside DeepSpeed's own calls."""
    runs = [prepared(packed, f"slow-{stage}", stage, max_steps=9) for stage in (STAGES if ALL else ("off", "3"))]
    train(runs, twist=rank_1_sleeps)
    for run in runs:
        event = events(run.attempts()[0], "straggler")[0]
        assert (event["rank"], event["host"]) == (1, socket.gethostname())
        assert event["own_s"] > max(SLEEP_S, event["others_s"])
        assert report.read_straggler(run.attempts()[0]) == event


# One long story at every stage ---------------------------------------------------------------------------------------

STORY: dict[str, Any] = {
    "freeze": [
        {"parts": ["feature_encoder"]},
        {"parts": ["layer.*"], "until_steps": UNFROZEN},
        {"parts": ["*"], "but": ["feature_encoder", "layer.*"], "after_steps": FROZEN_AGAIN, "until_steps": 12},
    ],
    "schedule": {"kind": "cosine", "warmup": 2, "init_scale": 0.1},
    "checkpoint": {"every_steps": 4, "keep_every_steps": 4},
}


def nan_on_rank_1(training: Any) -> None:
    """The first utterance of a micro-batch is not a number, in two steps in a row; and behind another step a weight of
    its share is infinite while all try to save. Rank 0 writes down what its share of every part of the model is after
    each step."""
    whole = training.engine.backward
    one_step = training.one_step

    def backward(tensors: dict[str, torch.Tensor], factor: float, last: bool) -> torch.Tensor:
        if training.ranks.rank == 1 and not last and training.progress.step + 1 in BAD:
            tensors["inputs"][0] = math.nan
        result: torch.Tensor = whole(tensors, factor, last)
        return result

    def recorded(*arguments: Any) -> bool:
        stop: bool = one_step(*arguments)
        if training.progress.step == UNSOUND:
            refused_to_save(training)
        if training.ranks.rank == 0:
            shares: dict[str, Any] = {}
            for part, weights in zip(part_of(training.engine.model).values(), training.engine.kept(), strict=True):
                shares.setdefault(part, xxhash.xxh3_64()).update(weights.numpy().tobytes())
            hashes = {part: share.hexdigest() for part, share in shares.items()}
            rundir.append_line(training.run.root / "shares", {"step": training.progress.step, "of": hashes})
        return stop

    training.engine.backward = backward
    training.one_step = recorded


def refused_to_save(training: Any) -> None:
    """Try to save with an infinite weight on rank 1, and write down what all ranks said to it."""
    weight = next(w for w in reversed(training.engine.kept()) if w.numel()).view(-1)[-1:]
    before = weight.clone()
    if training.ranks.rank == 1:
        weight.fill_(math.inf)
    try:
        training.save()
    except TrainingError as error:
        (training.run.root / f"refused-{training.ranks.rank}").write_text(f"{error.message}\n{error.hint}")
    weight.copy_(before)


@pytest.fixture(scope="module")
def stories(packed: Path) -> dict[str, tuple[Run, Run]]:
    """The story by two ranks at each stage: in one go, and cut in two."""
    optimizer = {
        "learning_rate": 1e-2,
        "layer_decay": 0.7,
        "weight_decay": 0.1,
        "nonfinite_patience": 2,
        "grad_clip": CLIP,
    }
    made = {
        stage: (
            prepared(packed, f"whole-{stage}", stage, **STORY, optimizer=optimizer),
            prepared(packed, f"cut-{stage}", stage, **STORY, optimizer=optimizer),
        )
        for stage in STAGES
    }
    train((whole for whole, _ in made.values()), twist=nan_on_rank_1)
    train((cut for _, cut in made.values()), CUT, nan_on_rank_1)
    train((cut for _, cut in made.values()), twist=nan_on_rank_1)
    return made


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_at_every_stage_and_exact_across_a_resume(stories: dict[str, tuple[Run, Run]], stage: str) -> None:
    """Losses and norms to 1e-4 of those without ZeRO, and bit for bit those of the run that was not cut."""
    whole, cut = stories[stage]
    assert len(numbers(whole)) == 2 * (STEPS - len(BAD))
    assert numbers(whole) == pytest.approx(numbers(stories["off"][0]), rel=1e-4)
    assert [x.hex() for x in numbers(cut)] == [x.hex() for x in numbers(whole)]
    assert [row["learning_rate"] for row in rows(cut)] == [row["learning_rate"] for row in rows(whole)]


@pytest.mark.ranks
def test_a_plain_loop_trains_the_same(packed: Path, stories: dict[str, tuple[Run, Run]]) -> None:
    """The story in twenty lines of torch and by the recipe's own words: what all engines might get wrong together. Each
    utterance counts as much as any other, whatever micro-batch it is in."""
    run, _ = stories["off"]
    recipe = recipe_file.load(run.resolved)
    model = build(recipe.backbone, seed=recipe.seed)
    share = {"feature_encoder": 0.0, "layer.0": 0.7**2, "layer.1": 0.7, "head": 1.0}
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0, "share": share[of], "part": of}
        for p, of in zip(model.parameters(), part_of(model).values(), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8)
    ledgers: list[dict[int, list[str]]] = [
        {row["step"]: row["ids"] for row in read_lines(run.attempts()[0].ledger(rank))} for rank in (0, 1)
    ]
    for row in rows(run):
        done = row["step"] - 1
        frozen = {"feature_encoder"}
        frozen |= {"layer.0", "layer.1"} if done < UNFROZEN else set()
        frozen |= {"head"} if FROZEN_AGAIN <= done < 12 else set()
        rate = 1e-2 * (0.1 + 0.9 * done / 2 if done < 2 else 0.5 * (1 + math.cos(math.pi * (done - 2) / (STEPS - 2))))
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
            group["params"][0].requires_grad_(group["part"] not in frozen)
        if row.get("left_out"):
            continue
        heard = [utterance(packed, utt_id) for ledger in ledgers for utt_id in ledger[row["step"]]]
        loss = torch.stack([model(model.collate([sound], [text]))[0].sum() for sound, text in heard]).mean()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4), row["step"]
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), row["step"]


def utterance(packed: Path, utt_id: str) -> tuple[np.typing.NDArray[np.float32], str]:
    """Sound and text, from the corpus itself."""
    file = next((packed / "LibriSpeech").rglob(f"{utt_id}.flac"))
    lines = next(file.parent.glob("*.trans.txt")).read_text().splitlines()
    text = next(line for line in lines if line.startswith(f"{utt_id} ")).partition(" ")[2]
    return soundfile.read(file, dtype="float32")[0], text


def changed(run: Run, before: int, after: int) -> set[str]:
    """Parts of the model whose weights are not bit for bit those of the other step."""
    of = {row["step"]: row["of"] for row in read_lines(run.root / "shares")}
    return {part for part in of[before] if of[before][part] != of[after][part]}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_does_not_change(stories: dict[str, tuple[Run, Run]], stage: str) -> None:
    whole, _ = stories[stage]
    assert changed(whole, 1, 2) == {"head"}
    assert changed(whole, UNFROZEN - 1, UNFROZEN) == {"head"}
    assert changed(whole, UNFROZEN, UNFROZEN + 1) == {"layer.0", "layer.1", "head"}
    assert changed(whole, FROZEN_AGAIN, 12) == {"layer.0", "layer.1"}
    assert changed(whole, 12, 13) == {"layer.0", "layer.1", "head"}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_is_left_out_by_all(stories: dict[str, tuple[Run, Run]], stage: str) -> None:
    """Nothing of the model changes, the step says so with the utterance, and a checkpoint sealed meanwhile is sound."""
    whole, cut = stories[stage]
    for run in (whole, cut):
        left_out = [row for row in rows(run) if row.get("left_out")]
        assert [(row["step"], row["loss"], row["grad_norm"]) for row in left_out] == [(s, None, None) for s in BAD]
        told = [e for attempt in run.attempts() for e in events(attempt, "left_out")]
        assert [(e["step"], e["in_row"]) for e in told] == [(3, 1), (4, 2)]
        for event in told:
            assert list(event["utterances"]) == ["1"] and len(event["utterances"]["1"]) == 1
            ledger = {r["step"]: r["ids"] for a in run.attempts() for r in read_lines(a.ledger(1))}
            assert event["utterances"]["1"][0] in ledger[event["step"]]
            assert event["utterances"]["1"][0] in event["message"]
        progress = [sealing.manifest_of(run.checkpoint(step))["progress"] for step in (4, 8)]
        assert [(p["left_out"], p["left_out_in_row"]) for p in progress] == [(2, 2), (2, 0)]
    assert changed(whole, 2, 4) == set()
    assert all(bool(w.isfinite().all()) for w in weights_of(whole, 4).values())
    assert changed(whole, 4, 5) == {"head"}
    assert read_json(whole.attempts()[0].exit) == {"code": 0, "step": STEPS, "sealed_step": STEPS}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_not_finite_are_not_saved(stories: dict[str, tuple[Run, Run]], stage: str) -> None:
    """By no rank, where one of them has one, and every rank says so."""
    for run in stories[stage]:
        assert UNSOUND not in [
            e["step"] for a in run.attempts() for kind in ("saving", "sealed") for e in events(a, kind)
        ]
        for rank in (0, 1):
            said, hint = (run.root / f"refused-{rank}").read_text().splitlines()
            assert said == f"step {UNSOUND}: the weights are not finite, and are not saved"
            assert "the newest checkpoint is sound" in hint


# Adapters ------------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"lora": {"rank": 4, "targets": ["qkv", "out"], "train": ["layer.1"]}, "max_steps": 6}


@pytest.mark.ranks
def test_adapters_learn_and_are_merged_into_an_ordinary_model(packed: Path) -> None:
    """Under ZeRO 2 and 3: what is adapted stays as it was, and the weights that a checkpoint is exported with give the
    very losses of the model with adapters in it."""
    runs = {stage: prepared(packed, f"lora-{stage}", stage, **LORA) for stage in ("off", "2", "3")}
    worlds.train(2, [run.new_attempt() for run in runs.values()])
    expected = numbers(runs["off"])
    for run in runs.values():
        recipe = recipe_file.load(run.resolved)
        assert numbers(run) == pytest.approx(expected, rel=1e-4)
        plain = build(recipe.backbone, seed=recipe.seed)
        before = {name: weight.clone() for name, weight in plain.state_dict().items()}
        merged = restored(run, 6, recipe.backbone, recipe.seed)
        assert list(merged.state_dict()) == list(before)
        of = part_of(merged)
        moved = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
        whole_parts = {name for name in before if of[name] in ("head", "layer.1")}
        adapted = {f"model.blocks.0.{module}.weight" for module in ("qkv", "out")}
        assert adapted <= moved <= adapted | whole_parts
        apart = learning.prepare(build(recipe.backbone, seed=recipe.seed), recipe)
        apart.load_state_dict(weights_of(run, 6))
        noise = [np.random.default_rng(7).standard_normal(n).astype(np.float32) for n in (16_000, 9_000)]
        batch = merged.collate(noise, ["HELLO", "A B"])
        torch.testing.assert_close(merged.eval()(batch)[0], apart.eval()(batch)[0], rtol=1e-5, atol=0)


def test_what_an_adapter_says_counts_alpha_by_rank_times() -> None:
    """LoRA, section 4.1; and nothing before it has learned. A wrong factor in training would be merged as it was."""
    asked = recipe(backbone=TINY.model_dump(), lora={"rank": 4, "alpha": 6, "targets": ["out"], "train": ["layer.1"]})
    model = learning.prepare(build(asked.backbone, seed=1), asked)
    assert {n.split(".lora")[0] for n, p in model.trained() if "lora" in n} == {f"model.blocks.{i}.out" for i in (0, 1)}
    before = build(asked.backbone, seed=1).state_dict()["model.blocks.0.out.weight"]
    state = model.state_dict()
    a, b = (state[f"model.blocks.0.out.lora_{x}.default.weight"] for x in "AB")
    assert a.shape == (4, 32) and b.shape == (32, 4) and not b.any()
    b.normal_()
    learning.merge(model)
    after = model.state_dict()["model.blocks.0.out.weight"]
    torch.testing.assert_close(after, before + 6 / 4 * b @ a)


# Another number of ranks ---------------------------------------------------------------------------------------------

CHANGED = 2
"""Where two ranks become one: the layers have not learned yet, and the optimizer has nothing of them."""


@pytest.mark.ranks
def test_another_number_of_ranks_goes_on(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From where some of what learns is frozen, and with adapters in bf16; as it would without ZeRO. `reshard` says
    beforehand that it can be done."""
    optimizer = {"learning_rate": 1e-2, "layer_decay": 0.7}
    frozen = {
        stage: prepared(packed, f"frozen-{stage}", stage, **STORY, optimizer=optimizer)
        for stage in (STAGES if ALL else ("off", "2", "3"))
    }
    adapted = {stage: prepared(packed, f"adapted-{stage}", stage, "bf16", **LORA) for stage in ("2", "3")}
    runs = [*frozen.values(), *adapted.values()]
    train(runs, CHANGED)
    for run in runs:
        assert verbs.reshard(argparse.Namespace(run=run.root, step=CHANGED, ranks=1)) == 0
        assert json.loads(capsys.readouterr().out)["saved_by"] == 2
    worlds.train(1, [run.new_attempt() for run in runs])
    for run in runs:
        assert [e["step"] for a in run.attempts() for e in events(a, "started")] == [0, CHANGED]
        assert audit.audit(run).to_json()["exact"]
    expected = numbers(frozen["off"])
    assert len(expected) == 2 * STEPS
    for stage, run in frozen.items():
        assert numbers(run) == pytest.approx(expected, rel=1e-4), stage


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"freeze": [{"parts": ["layer.9"]}]}, "freeze.parts: the model has no part 'layer.9'"),
        ({"freeze": [{"parts": ["*"], "but": ["hat"]}]}, "freeze.but: the model has no part 'hat'"),
        ({"freeze": [{"parts": ["*"]}]}, "nothing of the model learns"),
        ({"lora": {"targets": ["q_proj"]}}, "lora.targets: q_proj"),
        ({"lora": {"targets": ["out"], "train": ["nose"]}}, "lora.train: the model has no part 'nose'"),
    ],
)
def test_parts_that_a_model_has_not_are_refused(changes: dict[str, Any], said: str) -> None:
    asked = recipe(backbone={"kind": "tiny-ctc", "hidden": 8, "layers": 1}, **changes)
    with pytest.raises(UsageError) as refused:
        learning.prepare(build(asked.backbone, seed=1), asked)
    assert said in refused.value.message
    names = ("layer.0", "qkv", "freeze")
    assert any(name in refused.value.hint for name in names), refused.value.hint


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"wall_clock_breakdwn": True}, "deepspeed.wall_clock_breakdwn: DeepSpeed knows no such key"),
    "section": ({"zero_optimisation": {}}, "deepspeed.zero_optimisation: DeepSpeed knows no such key"),
    "key of a section": ({"zero_optimization": {"overlap_com": True}}, "overlap_com"),
    "removed": ({"compression_training": {}}, "compression library has been removed"),
}


@pytest.mark.ranks
def test_what_deepspeed_does_not_know_is_refused(packed: Path) -> None:
    """A misspelt key outside of a section had meant nothing, in silence. What is known is let, on or off."""
    known: dict[str, Any] = {"wall_clock_breakdown": False, "comms_logger": {"enabled": False}, "steps_per_print": 7}
    known |= {"flops_profiler": {"enabled": False}, "prescale_gradients": False, "disable_python_gc": False}
    cases = {**{name: raw for name, (raw, _) in UNKNOWN.items()}, "known": known}
    runs = [prepared(packed, f"keys of {name}", "1", deepspeed=raw) for name, raw in cases.items()]
    worlds.start(1, refused, [str(run.new_attempt().root) for run in runs])
    for run, said in zip(runs, [*(said for _, said in UNKNOWN.values()), None], strict=True):
        found = read_json(run.root / "refused")
        assert found is None if said is None else found and said in found["message"], found
    assert "wall_clock_breakdown" in read_json(runs[0].root / "refused")["hint"]


def refused(attempts: list[str]) -> None:
    """One rank, as far as its engine, again and again."""
    from launcher.worker.train import Training

    for attempt in map(Attempt, map(Path, attempts)):
        try:
            Training(attempt, [False], fresh=False)
        except UsageError as error:
            rundir.write_json(attempt.run.root / "refused", {"message": error.message, "hint": error.hint})


def test_what_decides_the_weights_is_in_the_identity() -> None:
    """And nothing else: a part that is frozen for some steps, or another rate, may change at a resume."""
    plain = learning.identity(recipe(), "letters")
    before = sealing.digest_json([recipe().backbone.model_dump(), "letters"])
    assert plain == before, "checkpoints of before would be refused"
    for other in ({"lora": {"rank": 4}}, {"freeze": [{"parts": ["head"]}]}, {"optimizer": LAYER_DECAY}):
        assert learning.identity(recipe(**other), "letters") != plain
    for same in ({"schedule": {"kind": "cosine"}}, {"activation_checkpointing": True}, {"precision": "fp32"}):
        assert learning.identity(recipe(**same), "letters") == plain


LAYER_DECAY = {"learning_rate": 1.0, "layer_decay": 0.5, "weight_decay": 0.1}


def test_rates_fall_from_the_head_to_the_input() -> None:
    asked = recipe(backbone={"kind": "tiny-ctc", "hidden": 8, "layers": 2}, optimizer=LAYER_DECAY)
    model = learning.prepare(build(asked.backbone, seed=1), asked)
    of, scale = part_of(model), {"feature_encoder": 0.125, "layer.0": 0.25, "layer.1": 0.5, "head": 1.0}
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in learning.groups(model, asked):
        for p in group.parameters:
            assert group.scale == scale[of[names[id(p)]]]
            assert group.weight_decay == (0.1 if p.ndim >= 2 else 0.0)
            seen.add(names[id(p)])
    assert seen == set(names.values())
