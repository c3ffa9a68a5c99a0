"""A checkpoint of N ranks in a run of M: every weight and moment where it was, frozen too, and training goes on."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import DataError
from launcher.rundir import Run, read_lines
from launcher.worker.pack import write_pack
from launcher.worker.shards import KINDS, Piece, Shards, check_coverage, check_names
from tests.worker import worlds
from tests.worker.backbones import make_wav2vec2, wav2vec2
from tests.worker.runs import events, trained_on

STOP, END = 5, 9
"""Steps: where the first number of ranks stops, in the middle of an epoch, and where the other one ends."""

ALL = bool(os.environ.get("SPEECHCTL_TEST_RESHARD"))
"""Every pair of 1, 2, 4 ranks at every stage and precision, where the suite has four of them."""

Case = tuple[int, int, str, str]
"""Ranks before and after, ZeRO stage, precision."""

if ALL:
    CASES: list[Case] = [
        (n, m, stage, precision)
        for n, m in itertools.product((1, 2, 4), (1, 2, 4))
        for stage, precision in itertools.product(("1", "2", "3"), ("fp32", "bf16"))
    ]
    CASES += [(2, 1, "0", "fp32"), (2, 4, "0", "bf16"), (2, 1, "off", "fp32"), (1, 2, "off", "bf16")]
else:
    CASES = [(2, 1, "3", "bf16"), (2, 3, "1", "bf16"), (2, 1, "2", "fp32"), (2, 3, "3", "fp32")]


def prepared(root: Path, name: str, source: Path, stage: str, precision: str) -> Run:
    """A run directory as `launch` leaves it."""
    # Plain data parallel does not bear that a mask may select nothing, and leave the vector for it without a gradient.
    masks = {"mask_time_prob": 0.0} if stage == "off" else {}
    backbone = wav2vec2(source, freeze_feature_encoder=True, **masks)
    return worlds.prepare(root / name, root, backbone, stage, precision, max_steps=END, checkpoint={"every_steps": 100})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case, Run]:
    """Every case, trained to `STOP` by the one number of ranks and from there to `END` by the other.

    In between the backbone's own files change, so that whatever is not restored is not what it was.
    """
    from tests.conftest import make_corpus

    root = tmp_path_factory.mktemp("worlds")
    corpus = make_corpus(root / "LibriSpeech")
    (root / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
    source = make_wav2vec2(root / "wav2vec2")
    for n in sorted({case[0] for case in CASES}):
        kinds = sorted({case[2:] for case in CASES if case[0] == n})
        firsts = {kind: prepared(root, f"by-{n}-{'-'.join(kind)}", source, *kind) for kind in kinds}
        worlds.train(n, [run.new_attempt() for run in firsts.values()], STOP)
        for case in (c for c in CASES if c[0] == n):
            shutil.copytree(firsts[case[2:]].root, root / "-".join(map(str, case)))
    weights = load_file(source / "model.safetensors")
    save_file({k: v * 1.5 + 0.1 for k, v in weights.items()}, source / "model.safetensors", {"format": "pt"})
    runs = {case: Run(root / "-".join(map(str, case))) for case in CASES}
    for run in runs.values():
        text = run.resolved.read_text()
        before = next(line for line in text.splitlines() if line.startswith("run_dir:"))
        run.resolved.write_text(text.replace(before, f"run_dir: {run.root}"))
    for m in sorted({case[1] for case in CASES}):
        worlds.train(m, [run.new_attempt() for case, run in runs.items() if case[1] == m])
    return runs


@pytest.mark.ranks
@pytest.mark.timeout(7200 if ALL else 600)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_all_is_where_it_was_and_training_goes_on(finished: dict[Case, Run], case: Case) -> None:
    """Weights, both moments, counts, frozen weights and buffers, bit for bit; then finite losses near those of before,
    and every utterance of every epoch once. That the probe's losses agree is checked as the ranks load."""
    n, m, stage, _ = case
    run = finished[case]
    first, second = run.attempts()
    assert events(second, "started")[0]["step"] == STOP
    assert events(second, "started")[0]["world_size"] == m
    if stage in ("1", "2", "3"):
        old = Shards(run.checkpoint(STOP) / "deepspeed", int(stage), n)
        new = Shards(run.root / "again" / "deepspeed", int(stage), m)
        assert old.sizes() == new.sizes()
        assert {shards.step(group) for shards in (old, new) for group in (0, 1)} == {STOP}
        for name, size in old.sizes().items():
            for kind in KINDS:
                assert torch.equal(old.read(kind, name, 0, size), new.read(kind, name, 0, size)), (kind, name)
        assert old.frozen() == new.frozen()
        if stage == "3":
            assert old.frozen()
        for name in old.frozen():
            assert torch.equal(old.read_frozen(name), new.read_frozen(name)), name
        for name, tensor in old.module.items() if stage != "3" else old.buffers.items():
            assert torch.equal(tensor, new.module[name]), name
        assert new.loss_scaler.carried == "from the first ranks"
        assert old.counters()["global_steps"] == new.counters()["global_steps"] == STOP
    rows = {row["step"]: row for a in (first, second) for row in read_lines(a.metrics)}
    assert sorted(rows) == list(range(1, END + 1))
    seen: dict[int, Counter[str]] = {}
    total = dict.fromkeys(range(9), 0.0)
    for step, ids in trained_on(run).items():
        epoch = rows[step]["epoch"]
        seen.setdefault(epoch, Counter()).update(ids)
        total[epoch] += rows[step]["loss"] * len(ids) / 12
    *whole, last = (seen[e] for e in sorted(seen))
    assert len(whole) >= 3 and all(set(c.values()) == {1} and len(c) == 12 for c in whole)
    assert set(last.values()) == {1}
    # Of every utterance once, before, across and behind the change: they are near to each other, and fall.
    for before, after in itertools.pairwise(total[epoch] for epoch in range(len(whole))):
        assert 0.95 * before < after < 1.01 * before


# Counting ------------------------------------------------------------------------------------------------------------

PIECES = [Piece("w", 0, 4, 0, 0, 0), Piece("w", 4, 2, 1, 0, 0), Piece("b", 0, 3, 1, 0, 2)]


def test_every_element_is_counted() -> None:
    check_coverage("it", reversed(PIECES), {"w": 6, "b": 3})


@pytest.mark.parametrize(
    ("pieces", "sizes", "message"),
    [
        (PIECES[:2], {"w": 6, "b": 3}, "0 of 3 elements of b"),
        (PIECES[1:], {"w": 6, "b": 3}, "element 0 of w is nowhere"),
        (PIECES, {"w": 7, "b": 3}, "6 of 7 elements of w"),
        (PIECES, {"w": 6}, "b is no trained parameter"),
        ([*PIECES, PIECES[1]], {"w": 6, "b": 3}, "element 4 of w is twice"),
    ],
)
def test_what_is_missing_or_twice_is_named(pieces: list[Piece], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_coverage("it", pieces, sizes)


def test_names_are_compared_both_ways() -> None:
    check_names("it", ["a"], ["a"])
    with pytest.raises(DataError, match="b is missing"):
        check_names("it", ["a"], ["a", "b"])
    with pytest.raises(DataError, match="b is not of this model"):
        check_names("it", ["a", "b"], ["a"])
