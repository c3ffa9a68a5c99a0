"""Synthetic corpora: LibriSpeech's layout, equal bytes, an honest dev set, whole or absent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("espeakng_loader", reason="the extra `demo` is not installed")

import soundfile

from launcher.errors import PreflightError, UsageError
from launcher.worker import synthesize as module
from launcher.worker.synthesize import synthesize
from launcher.worker.vocabulary import encode


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 + 20 utterances: more than there are voices, so that some speakers have two."""
    root = tmp_path_factory.mktemp("synthetic") / "corpus"
    synthesize(root, train_utterances=100, dev_utterances=20, seed=3)
    return root


def transcripts(subset: Path) -> dict[str, str]:
    lines = [line for path in subset.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in lines}


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_layout_is_librispeechs(corpus: Path) -> None:
    assert sorted(p.name for p in corpus.iterdir()) == ["SPEAKERS.TXT", "dev-clean", "train-clean-100"]
    for subset, count in [("train-clean-100", 100), ("dev-clean", 20)]:
        texts = transcripts(corpus / subset)
        audio = {p.stem: p for p in (corpus / subset).rglob("*.flac")}
        assert len(texts) == count and texts.keys() == audio.keys()
        for utt_id, path in audio.items():
            speaker, chapter, number = utt_id.split("-")
            assert path == corpus / subset / speaker / chapter / f"{utt_id}.flac"
            assert (path.parent / f"{speaker}-{chapter}.trans.txt").is_file() and len(number) == 4
            info = soundfile.info(path)
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
            assert 1.5 < info.duration < 5
            assert encode(texts[utt_id])


def test_audio_is_speech_not_silence(corpus: Path) -> None:
    for path in corpus.rglob("*.flac"):
        samples, _ = soundfile.read(path)
        assert samples.std() > 0.02


def test_speakers_table(corpus: Path) -> None:
    rows = [line for line in (corpus / "SPEAKERS.TXT").read_text().splitlines() if not line.startswith(";")]
    listed = {}
    for row in rows:
        speaker, sex, subset, minutes, name = (field.strip() for field in row.split("|"))
        assert sex in ("F", "M") and float(minutes) > 0 and name
        listed[speaker] = subset
    found = {p.name: p.parent.name for subset in ("train-clean-100", "dev-clean") for p in (corpus / subset).iterdir()}
    assert listed == found


def test_dev_voices_and_sentences_are_new(corpus: Path) -> None:
    train, dev = transcripts(corpus / "train-clean-100"), transcripts(corpus / "dev-clean")
    assert set(train.values()).isdisjoint(dev.values())
    assert len(set(train.values())) == 100 and len(set(dev.values())) == 20
    voices: dict[str, set[str]] = {"train-clean-100": set(), "dev-clean": set()}
    for row in (corpus / "SPEAKERS.TXT").read_text().splitlines()[2:]:
        _, _, subset, _, name = (field.strip() for field in row.split("|"))
        voices[subset].add(name.partition("+")[2])  # not even the same variant in another accent
    assert voices["train-clean-100"].isdisjoint(voices["dev-clean"])


def test_at_least_40_words(corpus: Path) -> None:
    assert len(set(" ".join(transcripts(corpus / "train-clean-100").values()).split())) >= 40


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    """espeak keeps state from sentence to sentence: a second corpus of the same process once came out different."""
    synthesize(tmp_path / "a", 6, 3, seed=5)
    synthesize(tmp_path / "b", 6, 3, seed=5)
    code = "import sys, pathlib; from launcher.worker.synthesize import synthesize; "
    code += "synthesize(pathlib.Path(sys.argv[1]), 6, 3, seed=5)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, timeout=300)
    synthesize(tmp_path / "other", 6, 3, seed=6)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    assert content(tmp_path / "a") != content(tmp_path / "other")


def test_nothing_is_left_when_it_fails_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = []
    say = module._Espeak.say

    def stop_at_the_fifth(self: module._Espeak, text: str, voice: module._Voice, seed: int) -> bytes:
        spoken.append(text)
        if len(spoken) == 5:
            raise KeyboardInterrupt
        return say(self, text, voice, seed)

    monkeypatch.setattr(module._Espeak, "say", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "corpus", 6, 3, seed=5)
    assert len(spoken) == 5
    assert list(tmp_path.iterdir()) == []


def test_an_existing_corpus_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UsageError):
        synthesize(tmp_path / "corpus", 6, 3, seed=5)
    assert list(tmp_path.rglob("*")) == [tmp_path / "corpus"]


def test_more_sentences_than_the_grammar_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        synthesize(tmp_path / "corpus", 1_000_000, 3, seed=5)


def test_without_espeak_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(PreflightError) as caught:
        synthesize(tmp_path / "corpus", 6, 3, seed=5)
    assert "speechctl[demo]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(tmp_path / "corpus", 2, 1, seed=5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"synthesizing 2 \+ 1 utterances into .*\n", captured.err)
