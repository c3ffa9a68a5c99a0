"""Two ranks train a small wav2vec 2.0 undisturbed, and are compared with those that came to harm."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from launcher import audit, sealed
from launcher.errors import DataError
from launcher.rundir import Run
from launcher.worker.pack import write_pack
from tests.conftest import make_corpus
from tests.worker import worlds
from tests.worker.backbones import make_wav2vec2, wav2vec2
from tests.worker.harm import Harm
from tests.worker.runs import events, numbers, state_digest, trained_on

EVERY = 2
"""Steps between two saves. Three checkpoints are kept."""


class Undisturbed:
    """Of each ZeRO stage that somebody asks for, one run from step 0 to its end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        corpus = make_corpus(root / "LibriSpeech")
        (root / "packs").mkdir()
        for subset in ("train-clean-100", "dev-clean"):
            write_pack(corpus, subset, root / "packs" / subset, 2**20, 1, lambda _: None)
        # A part of it is frozen, and it has buffers.
        self.backbone = wav2vec2(make_wav2vec2(root / "wav2vec2"), freeze_feature_encoder=True)
        self._runs: dict[tuple[str, int], Run] = {}

    def prepare(self, where: Path, stage: str, steps: int) -> Run:
        """A run that is to become the same."""
        more = {"max_steps": steps, "checkpoint": {"every_steps": EVERY, "keep_last": 3}}
        return worlds.prepare(where, self.root, self.backbone, stage, "fp32", **more)

    def run(self, stage: str, steps: int) -> Run:
        key = (stage, steps)
        if key not in self._runs:
            made = self.prepare(self.root / f"zero-{stage}-{steps}", stage, steps)
            worlds.train(2, [made.new_attempt()], harms=[Harm(steps - EVERY, log=str(made.root / "calls"))])
            self._runs[key] = made
        return self._runs[key]

    def calls(self, stage: str, steps: int, rank: int) -> Counter[str]:
        """How often a rank makes each system call in a save that removes an older one, by name."""
        log = self.run(stage, steps).root / f"calls-{rank}"
        return Counter(re.findall(r"(?m)^(?:\d+ +)?(\w+)\(", log.read_text()))


def whole(run: Run) -> list[int]:
    """What a resume accepts. Fails where anything else is published."""
    steps = run.sealed_steps()
    for step in steps:
        try:
            sealed.verify(run, step)
        except DataError as error:
            raise AssertionError(f"torn, and published: {error.message}") from error
    return steps


def said(run: Run) -> list[int]:
    """Steps that the newest attempt called sealed."""
    return [e["step"] for e in events(run.attempts()[-1], "sealed")]


def assert_same(run: Run, undisturbed: Run) -> None:
    """In every attempt every loss and gradient norm, as hex floats; the last state; and what it was trained on."""
    expected = numbers(undisturbed)
    assert all(len(pairs) == 1 for pairs in expected.values())
    assert numbers(run) == expected
    assert trained_on(run) == trained_on(undisturbed)
    last = max(expected)
    assert state_digest(run.checkpoint(last)) == state_digest(undisturbed.checkpoint(last))
    assert audit.audit(run).discrepancies == []
