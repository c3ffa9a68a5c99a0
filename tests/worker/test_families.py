"""Every family of backbones: trained at ZeRO 2 and 3 on two ranks with layers dropped and frames masked, all of it or
adapters alone, exported, and heard by plain transformers, token by token.

The architectures are real and small, their weights random. SPEECHCTL_TEST_FAMILIES=real takes Whisper tiny.en's own
weights and real speech instead, from SPEECHCTL_TEST_DATA (a directory with `backbones/whisper-tiny.en` and
`data/LibriSpeech`); that takes minutes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from launcher import recipe as schema
from launcher.rundir import read_lines
from launcher.worker import __main__ as worker
from launcher.worker.pack import write_pack
from launcher.worker.weights import restored
from tests.worker.backbones import make_wav2vec2, make_whisper, wav2vec2, whisper, whisper_ctc
from tests.worker.groups import prepared, trained_together
from tests.worker.plain import by_plain_transformers, by_us

REAL = os.environ.get("SPEECHCTL_TEST_FAMILIES") == "real"
UTTERANCES = 8
STAGES = {"hubert": (0, 1, 2, 3)}
"""Of ZeRO, where they are more than 2 and 3."""
LORA: dict[str, dict[str, Any]] = {
    "wavlm": {"rank": 2, "alpha": 16, "targets": ["intermediate_dense"]},
    "wav2vec2": {"rank": 2, "alpha": 16},
    "whisper": {"rank": 2, "alpha": 16, "targets": ["q_proj", "fc1"]},
    "whisper-ctc": {"rank": 2, "alpha": 16},
}
"""Families that are trained by adapters, too."""


def adapters(name: str) -> dict[str, Any] | None:
    """Of a run of that name."""
    return LORA[name.removeprefix("lora-").split("/")[0]] if name.startswith("lora-") else None


CHARACTERS = {"kind": "characters", "case": "lower"}
PIECES = {"kind": "sentencepiece", "size": 28}


def families(root: Path) -> dict[str, schema.Backbone]:
    """All of them, with every normalization of the front end, every vocabulary, and masks of every kind."""
    made: dict[str, schema.Backbone] = {
        "wav2vec2": wav2vec2(make_wav2vec2(root / "1", layers=4), layerdrop=0.4, vocabulary=CHARACTERS),
        "hubert": wav2vec2(make_wav2vec2(root / "2", "layer", family="Hubert", layers=4), kind="hubert", layerdrop=0.4),
        "wavlm": wav2vec2(
            make_wav2vec2(root / "3", family="WavLM", layers=4), kind="wavlm", layerdrop=0.4, vocabulary=PIECES
        ),
        "whisper": whisper(make_whisper(root / "4", layers=4, seconds=2), layerdrop=0.4, spec_augment=True),
        "whisper-ctc": whisper_ctc(root / "4", layerdrop=0.4, spec_augment=True, vocabulary=PIECES),
    }
    return made


def real() -> dict[str, schema.Backbone]:
    source = Path(os.environ["SPEECHCTL_TEST_DATA"]) / "backbones" / "whisper-tiny.en"
    return {
        "tiny.en": whisper(source, layerdrop=0.4, spec_augment=True),
        "tiny.en-ctc": whisper_ctc(source, layerdrop=0.4, spec_augment=True, vocabulary=CHARACTERS),
    }


@pytest.mark.ranks
@pytest.mark.timeout(3000 if REAL else 600)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's own
def test_families(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    corpus = tiny_corpus
    if REAL:  # eleven utterances, under the name that these runs train on
        corpus, excerpt = tmp_path / "real", Path(os.environ["SPEECHCTL_TEST_DATA"]) / "data" / "LibriSpeech"
        shutil.copytree(excerpt / "dev-clean", corpus / "train-clean-100")
    (tmp_path / "packs").mkdir()
    write_pack(corpus, "train-clean-100", tmp_path / "packs" / "train-clean-100", 2**20, 1, lambda _: None)
    made = real() if REAL else families(tmp_path / "backbones")
    made |= {f"lora-{name}": value for name, value in made.items() if name in LORA}
    named = {f"{name}/{stage}": (value, stage) for name, value in made.items() for stage in STAGES.get(name, (2, 3))}
    heard_on: dict[str, Any] = {"subsets": ["train-clean-100"], "at_start": False, "batch_seconds": 0.3}  # one by one
    attempts = [
        prepared(tmp_path, name.replace("/", "-"), value, stage, lora=adapters(name), **heard_on)
        for name, (value, stage) in named.items()
    ]
    trained_together(Path(__file__).with_name("families.py"), attempts, tmp_path)

    runs = {name: attempt.run for name, attempt in zip(named, attempts, strict=True)}
    losses = {name: [row["loss"] for row in read_lines(run.attempts()[0].metrics)] for name, run in runs.items()}
    exports, models = {}, {}
    for name, run in runs.items():
        first = run.attempts()[0].root
        dropped = [read_lines(first / f"dropped-{rank}.jsonl") for rank in (0, 1)]
        assert dropped[0] == dropped[1], name
        rows = [row["dropped"] for row in dropped[0]]
        assert any(map(any, rows)) and not all(map(all, rows)) and len(rows) >= 5, name
        assert len(losses[name]) == 5 and run.sealed_steps() == [5], name
        exports[name] = tmp_path / "exports" / name
        command = ["export", str(run.root), "--step", "5", "--target", str(exports[name])]
        assert worker.main(command) == 0
        # Nothing that unpickles. Of Whisper's tokenizer transformers 4.57 also writes merges.txt.
        assert {p.suffix for p in exports[name].iterdir()} <= {".json", ".safetensors", ".model", ".txt"}
        assert not list(exports[name].glob("*adapter*"))
        models[name] = restored(run, 5, named[name][0], 1).eval()
    for name in made:
        for stage in STAGES.get(name, (2,)):
            assert losses[f"{name}/{stage}"] == pytest.approx(losses[f"{name}/3"], rel=1e-4), (name, stage)

    rows = read_lines(next(iter(runs.values())).hypotheses(5))[:UTTERANCES]
    assert len(rows) == UTTERANCES
    sounds, waveforms = [], []
    for row in rows:
        waveforms.append(soundfile.read(next(corpus.rglob(f"{row['utt_id']}.flac")), dtype="float32")[0])
        sounds.append(tmp_path / f"{row['utt_id']}.npy")
        np.save(sounds[-1], waveforms[-1])
    limits = {name: v.max_new_tokens for name, (v, _) in named.items() if isinstance(v, schema.Whisper)}
    theirs = by_plain_transformers(exports, sounds, limits)
    for name, run in runs.items():
        ours = [list(by_us(models[name], waveform)) for waveform in waveforms]
        assert ours == theirs[name], name
        assert len({tuple(ids) for ids, _ in ours}) > 1, f"{name} hears the same everywhere"
        # What the ranks wrote together, from the weights that they shared.
        written = {row["utt_id"]: row["text"] for row in read_lines(run.hypotheses(5))}
        assert [text for _, text in ours] == [written[row["utt_id"]] for row in rows], name
