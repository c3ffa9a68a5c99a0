"""`transcribe`: which files, of any rate and length, what is heard and when, how it is written, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from launcher.errors import UsageError
from launcher.worker import __main__ as worker
from launcher.worker import recognize, shims, sound, vocabulary
from launcher.worker.captions import FORMATS, Segment, Transcript, Word, segmented
from launcher.worker.models import build
from launcher.worker.recognize import ctc_windows, greedy_path, quiet_cut, samples_per_frame, timestamped, words_of
from tests.worker.backbones import make_wav2vec2, make_whisper, wav2vec2, whisper
from tests.worker.transcripts import Ear, exported, transcribe

CPU = torch.device("cpu")
SECOND = 16_000


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker binds itself to its parent's life, which the process of the tests must not."""
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports: `ctc` and `whisper`."""
    root = tmp_path_factory.mktemp("models")
    ctc = build(wav2vec2(make_wav2vec2(root / "a", "layer")), seed=3)
    words = build(whisper(make_whisper(root / "b")), seed=3)
    return {"ctc": exported(ctc, root / "ctc"), "whisper": exported(words, root / "whisper")}


def noise(seconds: float, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(int(seconds * SECOND)).astype(np.float32) * 0.1


# Which files ---------------------------------------------------------------------------------------------------------


def test_folders_are_searched_by_content_in_a_stable_order(tmp_path: Path) -> None:
    """What is sound is found whatever its name; what is called sound and is none is found too, to be told of."""
    root = tmp_path / "talks"
    for name in ("b/2.flac", "b/10.flac", "a.wav", "b/c/x.ogg", "unnamed", ".hidden.wav", "B.WAV", ".git/y.wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".ogg": "OGG", ".flac": "FLAC"}.get(Path(name).suffix, "WAV")
        soundfile.write(root / name, noise(0.1), SECOND, format=kind)
    (root / "notes.txt").write_text("no sound")
    (root / "broken.mp3").write_bytes(b"")
    (root / "b" / "loop").symlink_to(root)
    names = ["B.WAV", "a.wav", "broken.mp3", "unnamed", "b/10.flac", "b/2.flac", "b/c/x.ogg"]
    assert [str(found.name) for found in sound.find([root])] == names
    one = root / "b" / "2.flac"
    assert [str(found.name) for found in sound.find([one, root])] == ["2.flac", *(n for n in names if n != "b/2.flac")]
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing.flac"):
        with pytest.raises(UsageError, match=nothing.name):
            sound.find([one, nothing])


def test_any_rate_and_any_number_of_channels(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 kHz and stereo at 44.1 kHz give as much speech as 16 kHz, in the order given."""
    files = [tmp_path / name for name in ("b.flac", "a.wav", "c.wav")]
    for file, rate, channels in zip(files, (16_000, 8_000, 44_100), (1, 1, 2), strict=True):
        tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
        soundfile.write(file, np.stack([tone] * channels, 1), rate)
        assert len(sound.read(file)) == SECOND
    assert np.abs(sound.read(files[2]) - sound.read(files[0]))[1000:-1000].max() < 0.01
    code, out, err = transcribe(capsys, models["ctc"], *files)
    assert (code, err) == (0, "")
    assert [line.partition("\t")[0] for line in out.splitlines()] == [str(f) for f in files]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_long_sound_is_resampled_in_pieces_as_in_one(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shims.apply()
    import torchaudio

    monkeypatch.setattr(sound, "BLOCK_S", 2)
    for n_samples in (rate * 7 + 13, rate * 6, rate * 2 + 1):
        mono = np.random.default_rng(5).standard_normal(n_samples).astype(np.float32)
        whole = torchaudio.functional.resample(torch.from_numpy(mono), rate, SECOND).numpy()
        pieces = sound.resampled(mono, rate)
        assert pieces.shape == whole.shape
        assert np.abs(pieces - whole).max() < 1e-5


# CTC -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [40 * SECOND, 30 * SECOND, 3_200])
@pytest.mark.parametrize("hop", [320, 640, 80])
def test_windows_decide_every_frame_once(longest: int, hop: int) -> None:
    for n_samples in [1, longest, *range(longest + 1, 4 * longest, max(1, longest // 7))]:
        windows = ctc_windows(n_samples, longest, hop)
        assert windows[0][0] == windows[0][2] == 0 and windows[-1][1] == n_samples <= windows[-1][3]
        assert all(end - start <= longest and start % hop == 0 for start, end, _, _ in windows)
        assert [first for _, _, first, _ in windows[1:]] == [last for _, _, _, last in windows[:-1]]
        for start, end, first, last in windows:  # what it decides, it has heard
            assert start <= first * hop and min(last * hop, n_samples) <= end


@pytest.mark.parametrize("max_samples", [None, 30 * SECOND])
@pytest.mark.parametrize("seconds", [39.9, 40.02, 71.5, 95.3])
def test_a_long_file_is_heard_as_one(seconds: float, max_samples: int | None) -> None:
    """A model that hears each frame by itself writes the same for windows as for the whole: none is lost or doubled."""
    classes = np.random.default_rng(3).integers(0, 32, int(seconds * 50)).tolist()
    model = Ear(max_samples)
    assert samples_per_frame(model) == model.HOP
    assert greedy_path(model, model.say(classes), CPU, model.HOP) == classes
    longest = max_samples or 40 * SECOND
    assert max(model.heard) <= longest and (len(model.heard) > 1) == (len(classes) * model.HOP > longest)


def test_words_and_their_times() -> None:
    """By hand: 20 ms a frame; a doubled letter needs a blank between, and blanks belong to no word."""
    letter = vocabulary.LETTERS.index
    path = [0, letter("|"), letter("S"), letter("E"), 0, letter("E"), letter("E"), 0, letter("|"), letter("|"), 0, 3]
    path += [letter("I"), letter("'"), letter("M"), 0, 0]
    assert vocabulary.decode(path) == "SEE I'M"
    assert words_of(path, vocabulary.LETTERS, 0.02) == [Word("SEE", 0.04, 0.14), Word("I'M", 0.24, 0.3)]
    assert words_of([0, 3, letter("|")], vocabulary.LETTERS, 0.02) == []
    pieces = ["<blank>", "<s>", "</s>", "<unk>", "▁he", "ll", "o", "▁", "▁you"]
    path = [4, 4, 0, 5, 6, 0, 8, 7, 6, 0]
    assert words_of(path, pieces, 0.1) == [Word("hello", 0, 0.5), Word("you", 0.6, 0.7), Word("o", 0.8, 0.9)]


def test_segments_end_at_pauses_and_before_they_grow_too_long() -> None:
    def words(*starts: float, word: str = "WORD") -> list[Word]:
        return [Word(word, s, s + 0.2) for s in starts]

    assert [s.text for s in segmented(words(0, 0.5, 1.1, 2.2))] == ["WORD WORD WORD", "WORD"]
    assert [(s.start_s, s.end_s) for s in segmented(words(0, 0.5, 1.6))] == [(0, 0.7), (1.6, 1.8)]
    by_time = segmented(words(*(0.7 * i for i in range(20))))
    assert all(s.end_s - s.start_s <= 7 for s in by_time) and len(by_time) == 2
    by_text = segmented(words(*(0.1 * i for i in range(20)), word="A" * 20))
    assert [len(s.words) for s in by_text] == [4] * 5 and max(len(s.text) for s in by_text) == 83
    assert segmented([]) == []


# Whisper -------------------------------------------------------------------------------------------------------------


def cuts_of(waveform: Any) -> list[tuple[int, int]]:
    cuts, start = [], 0
    while start < len(waveform):
        cuts.append((start, quiet_cut(waveform, start, 30 * SECOND)))
        start = cuts[-1][1]
    return cuts


def test_windows_are_cut_where_it_is_quiet() -> None:
    waveform = noise(70)
    for quiet_s in (27.3, 54.0):
        waveform[int(quiet_s * SECOND) : int((quiet_s + 0.3) * SECOND)] *= 0.001
    cuts = cuts_of(waveform)
    assert (cuts[0][0], cuts[-1][1]) == (0, len(waveform))
    assert all(end - start <= 30 * SECOND for start, end in cuts)
    for (_, end), quiet_s in zip(cuts, (27.3, 54.0), strict=False):
        assert quiet_s < end / SECOND < quiet_s + 0.3
    assert cuts_of(waveform[: 30 * SECOND]) == [(0, 30 * SECOND)]


class Spelling:
    """A tokenizer of single characters; 7 is special."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens if token != 7)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    ("written", "segments"),
    [
        ([7, 1000, *b" hi", 1050, 1050, *b" you", 1150, 7], [("hi", 60, 61), ("you", 61, 63)]),
        ([7, 1010, *b" hi", 1050, 1075, *b" you", 7], [("hi", 60.2, 61), ("you", 61.5, 63)]),  # not closed
        ([7, *b" hi you", 7], [("hi you", 60, 63)]),  # none
        ([7, 1000, *b" hi", 2500, 7], [("hi", 60, 63)]),  # behind the end of the sound
        ([7, 1050, *b" hi", 1025, *b" you", 1060], [("hi", 61, 61), ("you", 61, 61.2)]),  # backwards
        ([7, 1000, 1100, 7], []),
    ],
)
def test_timestamps_become_segments(
    written: list[int], segments: list[tuple[str, float, float]], is_last: bool
) -> None:
    heard = timestamped(Spelling(), written, 1000, 60, 63, is_last=is_last)
    assert heard == ([Segment(*row) for row in segments], None)


@pytest.mark.parametrize(
    ("written", "is_last", "heard", "next_s"),
    [
        ([7, 1000, *b" hi", 2300, 7], False, ["hi"], 86),  # 4 s of a sentence that the window cuts through
        ([7, 1000, *b" hi", 2300, 2300, *b" yo", 7], False, ["hi"], 86),  # what it says of it does not count
        ([7, 1000, *b" hi", 2300, 7], True, ["hi"], None),  # silence until the end of the file
        ([7, 1000, *b" hi", 2300, 2300, 7], True, ["hi"], 86),  # more is announced
        ([7, 1000, *b" hi", 2300, 2350, *b" yo", 7], True, ["hi", "yo"], None),
        ([7, 1000, *b" hi", 2460, 7], False, ["hi"], None),  # less than a second is left
        ([7, 1000, *b" hi", 1200, 1200, *b" yo", 7], False, ["hi", "yo"], None),  # it would hardly get on
        ([7, 1000, *b" hi", 7], False, ["hi"], None),
    ],
)
def test_the_next_window_begins_where_the_last_sentence_ended(
    written: list[int], is_last: bool, heard: list[str], next_s: float | None
) -> None:
    """Whisper leaves a sentence that its window cuts through to the next one. Windows laid end to end lost it: of real
    speech, 11 words after the 26th of 30 s were in no segment."""
    segments, begins = timestamped(Spelling(), written, 1000, 60, 90, is_last=is_last)
    assert ([s.text for s in segments], begins) == (heard, next_s)


def test_whisper_hears_all_of_a_long_file(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of 65 s is three windows: each is heard as a file of its own would be. With times they say when; a model
    made without timestamps has one segment for each window."""
    waveform = noise(65)
    soundfile.write(tmp_path / "long.wav", waveform, SECOND, subtype="FLOAT")
    cuts = cuts_of(waveform)
    for number, (start, end) in enumerate(cuts):
        soundfile.write(tmp_path / f"{number}.wav", waveform[start:end], SECOND, subtype="FLOAT")
    code, out, err = transcribe(capsys, models["whisper"], *sorted(tmp_path.glob("*.wav")))
    texts = [line.partition("\t")[2] for line in out.splitlines()]
    assert (code, err, len(texts), len(cuts)) == (0, "", 4, 3)
    assert texts[3] == " ".join(t for t in texts[:3] if t) != ""
    code, out, _ = transcribe(capsys, models["whisper"], tmp_path / "long.wav", "--format", "json")
    row = json.loads(out)
    assert (code, row["duration_s"], row["text"] != "") == (0, 65, True)
    times = [t for s in row["segments"] for t in (s["start_s"], s["end_s"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 65

    model: Any = build(whisper(models["whisper"]), seed=3).eval()
    del model.model.generation_config.no_timestamps_token_id
    heard, plain = (recognize.recognize(model, waveform, CPU, file="x", timed=t) for t in (True, False))
    spans = [(round(a / SECOND, 3), round(b / SECOND, 3)) for a, b in cuts]
    assert (
        [s for s in spans if s in {(s.start_s, s.end_s) for s in heard.segments}]
        == [(s.start_s, s.end_s) for s in heard.segments]
        != []
    )
    assert heard.text == plain.text == " ".join(s.text for s in heard.segments) and plain.segments == []


# How it is written ---------------------------------------------------------------------------------------------------

HEARD = Transcript(
    "talk.flac",
    "ONE AND A MUCH LONGER SENTENCE THAT TAKES TWO LINES",
    3725.0,
    [
        Segment("ONE", 0.5, 0.9999),
        Segment("AND A MUCH LONGER SENTENCE THAT TAKES TWO LINES", 3723.25, 3725.0, [Word("AND", 3723.25, 3724)]),
    ],
)


def test_formats() -> None:
    assert FORMATS["txt"](HEARD) == HEARD.text + "\n"
    assert FORMATS["srt"](HEARD) == (
        "1\n00:00:00,500 --> 00:00:01,000\nONE\n\n"
        "2\n01:02:03,250 --> 01:02:05,000\nAND A MUCH LONGER SENTENCE THAT TAKES TWO\nLINES\n"
    )
    value = json.loads(FORMATS["json"](HEARD))
    assert value["segments"][1]["words"] == [{"word": "AND", "start_s": 3723.25, "end_s": 3724}]
    assert [FORMATS[f](Transcript("x", "", 1.0, [])) for f in ("txt", "srt")] == ["\n", ""]


def test_files_of_each_format_and_one_that_cannot_be_read(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One unreadable file does not end the rest; it is named, has no result, and the exit code says so."""
    root, target = tmp_path / "talks", tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "a.wav", noise(2), SECOND)
    soundfile.write(root / "deep" / "c.flac", noise(44, seed=2), SECOND)
    whole = (root / "deep" / "c.flac").read_bytes()
    (root / "b.flac").write_bytes(whole[: len(whole) // 2])
    options = ["--output", target, *(x for f in ("srt", "json", "txt") for x in ("--format", f))]
    code, out, err = transcribe(capsys, models["ctc"], root, *options)
    assert code == 5
    made = [target / f"{name}.{ending}" for name in ("a", "deep/c") for ending in ("srt", "json", "txt")]
    assert out.splitlines() == [str(p) for p in made]
    assert sorted(p for p in target.rglob("*") if p.is_file()) == sorted(made)
    assert err.splitlines()[0].startswith(f"{root / 'b.flac'} cannot be read as sound: ")
    assert "1 of 3 files were not transcribed" in err
    row = json.loads((target / "deep" / "c.json").read_bytes())
    assert row["text"] + "\n" == (target / "deep" / "c.txt").read_text() != "\n"
    assert [s["text"] for s in row["segments"]] and " ".join(s["text"] for s in row["segments"]) == row["text"]
    assert [w["word"] for s in row["segments"] for w in s["words"]] == row["text"].split()
    assert (target / "deep" / "c.srt").read_text().count(" --> ") == len(row["segments"])
    before = [p.read_bytes() for p in made]
    assert transcribe(capsys, models["ctc"], root, *options)[0] == 5
    assert [p.read_bytes() for p in made] == before  # the same, and written over


def test_what_is_wrong(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other, bad, empty, odd = (tmp_path / n for n in ("good.wav", "good.flac", "bad.flac", "empty.wav", "odd.wav"))
    for file in (good, other):
        soundfile.write(file, noise(1), SECOND)
    bad.write_bytes(b"no sound at all")
    soundfile.write(empty, np.zeros(0), SECOND)
    soundfile.write(odd, np.array([0.1, np.nan, 0.1]), SECOND, subtype="FLOAT")
    cases: list[tuple[list[object], int, str]] = [
        ([tmp_path / "missing.flac"], 2, "no such file"),
        ([bad], 5, "cannot be read as sound"),
        ([empty], 5, "holds no sound"),
        ([odd], 5, "samples that are not numbers"),
        ([good, bad, "--format", "srt"], 2, "SRT of several files"),
        ([good, "--format", "srt", "--format", "txt"], 2, "more than one result"),
        ([good, other, "--output", tmp_path / "out"], 2, "would both be written to"),
        ([good, "--output", good], 2, "good.wav is a file"),
    ]
    for arguments, wanted, words in cases:
        code, out, err = transcribe(capsys, models["ctc"], *arguments)
        assert (code, out) == (wanted, ""), words
        assert err.startswith("error: ") and words in err and "\n\nhint: " in err
    assert not (tmp_path / "out").exists()
    assert transcribe(capsys, tmp_path, good)[0] == 5  # no export
    assert transcribe(capsys, tmp_path / "nowhere", good)[0] == 6
    model = build(wav2vec2(models["ctc"]), seed=3)
    damaged = exported(model, tmp_path / "damaged") / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    code, out, err = transcribe(capsys, damaged.parent, good)
    assert (code, out) == (5, "") and "model.safetensors has changed since it was sealed" in err


def test_it_imports_no_deepspeed_and_minds_no_closed_pipe(models: dict[str, Path], tmp_path: Path) -> None:
    """Both kinds, in a process of their own as a user has it; the second has a reader that is gone."""
    soundfile.write(tmp_path / "a.wav", noise(1), SECOND)
    code = """
import sys
from launcher.worker import __main__ as worker
for model in sys.argv[2:]:
    print(worker.main(["transcribe", model, sys.argv[1], "--format", "json"]), file=sys.stderr)
    input()
print({"deepspeed", "streaming"} & sys.modules.keys(), file=sys.stderr)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.wav"), str(models["whisper"]), str(models["ctc"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["file"] == str(tmp_path / "a.wav")
        process.stdout.close()
        process.stdin.write("\n\n")
        process.stdin.close()
        assert process.stderr.read() == "0\n0\nset()\n"
