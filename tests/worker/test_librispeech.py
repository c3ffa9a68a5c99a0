"""The LibriSpeech tree: what is read from it, and how it is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launcher.errors import DataError
from launcher.worker.librispeech import read_subset, stream_info


def refusal(corpus: Path, subset: str = "dev-clean") -> str:
    with pytest.raises(DataError) as caught:
        read_subset(corpus, subset)
    return caught.value.render()


def chapter(corpus: Path) -> Path:
    return corpus / "dev-clean" / "84" / "121"


def transcript(corpus: Path) -> Path:
    return chapter(corpus) / "84-121.trans.txt"


def test_utterances_are_sorted_and_say_what_the_sound_is(tiny_corpus: Path) -> None:
    utterances = read_subset(tiny_corpus, "dev-clean")
    assert [u.utt_id for u in utterances] == ["174-50-0000", "174-50-0001", "84-121-0000", "84-121-0001", "84-121-0002"]
    last = utterances[-1]
    assert (last.subset, last.speaker, last.chapter, last.sample_rate_hz) == ("dev-clean", 84, 121, 16000)
    assert last.text == "THE CAT SAT ON THE MAT"
    pcm, _ = soundfile.read(last.path, dtype="int16")
    assert last.n_samples == len(pcm)
    assert last.pcm_md5 == hashlib.md5(pcm.astype("<i2").tobytes()).digest()


def test_stream_info_reads_every_field() -> None:
    head = b"fLaC" + bytes([0x80, 0, 0, 34]) + bytes(10)
    packed = (44100 << 44) | (1 << 41) | (23 << 36) | 0xF_FFFF_FFFF
    info = stream_info(head + packed.to_bytes(8, "big") + bytes(range(16)))
    assert (info.sample_rate_hz, info.channels, info.bits, info.n_samples) == (44100, 2, 24, 2**36 - 1)
    assert info.pcm_md5 == bytes(range(16))


def test_line_without_audio_and_audio_without_line_are_reported_together(tiny_corpus: Path) -> None:
    (chapter(tiny_corpus) / "84-121-0001.flac").unlink()
    other = tiny_corpus / "dev-clean" / "174" / "50" / "174-50.trans.txt"
    other.write_text(other.read_text().splitlines()[0] + "\n")
    text = refusal(tiny_corpus)
    assert text == (
        f"error: {tiny_corpus / 'dev-clean'} is not whole: 4 transcript lines, 4 audio files, 3 matched, 2 problems:\n"
        f"  {transcript(tiny_corpus)}:2: no audio, 84-121-0001.flac is not beside it\n"
        f"  {other.parent / '174-50-0001.flac'}: no transcript, 174-50-0001 has no line in 174-50.trans.txt\n\n"
        "hint: unpack the archive of dev-clean again, or mend these places; every line needs its file and every file "
        "its line"
    )


def test_the_first_ten_problems_are_listed_and_the_rest_counted(tiny_corpus: Path) -> None:
    for path in (tiny_corpus / "train-clean-100").rglob("*.flac"):
        path.unlink()
    text = refusal(tiny_corpus, "train-clean-100")
    assert "12 transcript lines, 0 audio files, 0 matched, 12 problems" in text
    assert text.count("no audio") == 10
    assert "and 2 more" in text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"84-121-0009", "84-121-0009 has no text"),
        (b"84-121-0009   ", "84-121-0009 has no text"),
        (b"84-121 HELLO", "expected `SPEAKER-CHAPTER-NUMBER TEXT`"),
        (b"HELLO WORLD", "expected `SPEAKER-CHAPTER-NUMBER TEXT`"),
        (b"84-121-0009 ZERO\x00BYTE", "expected `SPEAKER-CHAPTER-NUMBER TEXT` in printable characters, found '84"),
        (
            "84-121-0009 ZERO\u200bWIDTH".encode(),
            "expected `SPEAKER-CHAPTER-NUMBER TEXT` in printable characters, found '84",
        ),
        (b"84-121-0009 CAF\xc9", "not UTF-8: byte 0xc9 in column 16"),
        (b"84-999-0009 HELLO", "84-999-0009 does not belong to 84-121"),
        (b"84-121-0000 AGAIN", "84-121-0000 was here before"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tiny_corpus: Path, line: bytes, complaint: str) -> None:
    with transcript(tiny_corpus).open("ab") as file:
        file.write(b"\n" + line + b"\n")
    text = refusal(tiny_corpus)
    assert f"84-121.trans.txt:5: {complaint}" in text
    assert "\x00" not in text and "\u200b" not in text


def test_a_byte_order_mark_is_refused_and_carriage_returns_are_not_text(tiny_corpus: Path) -> None:
    before = read_subset(tiny_corpus, "dev-clean")
    content = transcript(tiny_corpus).read_bytes()
    transcript(tiny_corpus).write_bytes(content.replace(b"\n", b"\r\n"))
    assert read_subset(tiny_corpus, "dev-clean") == before
    transcript(tiny_corpus).write_bytes(b"\xef\xbb\xbf" + content)
    assert "84-121.trans.txt:1: expected" in refusal(tiny_corpus)


def test_audio_that_is_not_16_khz_mono_16_bit_flac_is_refused(tiny_corpus: Path) -> None:
    folder = chapter(tiny_corpus)
    soundfile.write(folder / "84-121-0000.flac", np.zeros((800, 2)), 8000, subtype="PCM_24")
    (folder / "84-121-0001.flac").write_bytes(b"RIFF" + bytes(100))
    (folder / "84-121-0002.flac").write_bytes(b"")
    text = refusal(tiny_corpus)
    assert "84-121-0000.flac: expected 16000 Hz, 1 channel, 16 bits; found 8000 Hz, 2 channels, 24 bits" in text
    assert "84-121-0001.flac: not a FLAC file: expected `fLaC` and a header of 42 bytes, it starts with b'RIFF'" in text
    assert "84-121-0002.flac: not a FLAC file" in text and "it is empty" in text


def test_a_file_without_samples_is_refused(tiny_corpus: Path) -> None:
    path = chapter(tiny_corpus) / "84-121-0000.flac"
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert "84-121-0000.flac: its header says that it has no samples" in refusal(tiny_corpus)


def test_a_file_in_the_wrong_place_is_refused(tiny_corpus: Path) -> None:
    path = chapter(tiny_corpus) / "84-121-0000.flac"
    path.rename(tiny_corpus / "dev-clean" / "174" / "50" / path.name)
    text = refusal(tiny_corpus)
    assert "84-121-0000.flac: expected the name 174-50-NUMBER.flac here" in text
    assert "no audio, 84-121-0000.flac is not beside it" in text


@pytest.mark.parametrize("wrong", ["..", "dev-clean", "dev-clean/84"])
def test_a_corpus_one_directory_off_is_named(tiny_corpus: Path, wrong: str) -> None:
    text = refusal(tiny_corpus / wrong)
    assert "has no dev-clean: it lies " in text
    assert text.endswith(f"hint: set data.corpus to {tiny_corpus}")


def test_a_missing_subset_names_those_that_are_there(tiny_corpus: Path) -> None:
    text = refusal(tiny_corpus, "test-clean")
    assert f"{tiny_corpus} has no test-clean; it has dev-clean, train-clean-100" in text
    assert "there is no corpus at" in refusal(tiny_corpus / "nowhere")


def test_a_subset_without_utterances_is_refused(tiny_corpus: Path) -> None:
    (tiny_corpus / "test-clean" / "1" / "2").mkdir(parents=True)
    assert "has no utterances: 0 transcript lines, 0 audio files" in refusal(tiny_corpus, "test-clean")
