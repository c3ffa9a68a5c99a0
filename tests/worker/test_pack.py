"""Packs: bytes in are bytes out, counts reconcile, and what was not sealed is not there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import DataError, SpeechctlError, UsageError
from launcher.rundir import MANIFEST
from launcher.sealing import digest_file, digest_json
from launcher.worker import pack
from launcher.worker.librispeech import read_subset
from launcher.worker.pack_reader import SIDE_FILES, lengths_of, open_pack

SUBSET = "train-clean-100"
SHARD_BYTES = 60_000
"""Two or three utterances of the tiny corpus."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "PARTITION_UTTERANCES", 3)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "packs" / SUBSET


def write(corpus: Path, target: Path, processes: int = 1, subset: str = SUBSET) -> dict[str, Any]:
    return pack.write_pack(corpus, subset, target, SHARD_BYTES, processes, lambda line: None)


def refusal(kind: type[SpeechctlError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return caught.value.render()


def python(script: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script. Returns when every process that it started has closed its output, too."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=120, env=env
    )


def test_bytes_in_are_bytes_out(tiny_corpus: Path, target: Path) -> None:
    write(tiny_corpus, target)
    opened = open_pack(target, check=True)
    utterances = read_subset(tiny_corpus, SUBSET)
    assert len(opened) == len(utterances) == 12
    for i, utterance in enumerate(utterances):
        assert opened.sample(i) == {
            "audio": utterance.path.read_bytes(),
            "n_samples": utterance.n_samples,
            "sample_rate_hz": 16000,
            "text": utterance.text,
            "utt_id": utterance.utt_id,
            "speaker": utterance.speaker,
            "chapter": utterance.chapter,
            "subset": SUBSET,
        }
        assert opened.lengths[i]["n_samples"] == utterance.n_samples
        assert opened.lengths[i]["n_chars"] == len(utterance.text)
    for beyond in (-1, 12):
        with pytest.raises(IndexError):
            opened.sample(beyond)


def test_counts_reconcile(tiny_corpus: Path, target: Path) -> None:
    manifest = write(tiny_corpus, target)
    assert manifest["counts"] == {"transcript_lines": 12, "files": 12, "packed": 12}
    index = json.loads((target / "index.json").read_bytes())
    assert sum(shard["samples"] for shard in index["shards"]) == 12
    shards = [f"shard.{i:05d}.mds" for i in range(len(index["shards"]))]
    assert [shard["raw_data"]["basename"] for shard in index["shards"]] == shards
    assert sorted(p.name for p in target.iterdir()) == sorted([*shards, *SIDE_FILES, MANIFEST])
    stats = json.loads((target / "stats.json").read_bytes())
    assert (stats["utterances"], stats["speakers"]) == (12, 3)
    assert stats["words"] == sum(len(u.text.split()) for u in read_subset(tiny_corpus, SUBSET))
    assert [p.name for p in target.parent.iterdir()] == [SUBSET]


def test_an_utterance_larger_than_a_shard_gets_one_of_its_own(tiny_corpus: Path, target: Path) -> None:
    """MDSWriter starts with an empty shard in this case; the merge leaves it out."""
    pack.write_pack(tiny_corpus, SUBSET, target, 100, 1, lambda line: None)
    index = json.loads((target / "index.json").read_bytes())
    assert [shard["samples"] for shard in index["shards"]] == [1] * 12
    assert open_pack(target, check=True).sample(11)["utt_id"] == "26-495-0002"


def test_ctc_frames_count_boundaries_and_repeats(tiny_corpus: Path, target: Path) -> None:
    transcript = tiny_corpus / "dev-clean" / "84" / "121" / "84-121.trans.txt"
    transcript.write_text("84-121-0000 HELLO WORLD\n84-121-0001 CAFE 23\n84-121-0002 A\n")
    write(tiny_corpus, target, subset="dev-clean")
    assert lengths_of(target)["ctc_frames"][2:].tolist() == [12, -1, 1]


def test_samples_are_the_same_from_several_threads(tiny_corpus: Path, target: Path) -> None:
    write(tiny_corpus, target)
    opened = open_pack(target)
    alone = [opened.sample(i) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: opened.sample(i % 12), range(960))) == alone * 80


def test_stock_streaming_dataset_reads_a_pack_and_leaves_nothing_behind(
    tiny_corpus: Path, target: Path, tmp_path: Path
) -> None:
    script = """
import glob, json, os, sys
from launcher.worker import shims
shims.apply()
from streaming import StreamingDataset
dataset = StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)
prefix = f"{dataset._shm_prefix_int:06}_"
rows = [[(r["utt_id"], r["text"], r["audio"].hex()) for r in rows]
        for rows in (dataset, (dataset[i] for i in range(len(dataset))))]
print(json.dumps({"prefix": prefix, "rows": rows}))
sys.stdout.flush()
for segment in glob.glob(f"/dev/shm/{prefix}*"):
    os.unlink(segment)
os._exit(0)  # its resource tracker would complain that they are gone
"""
    write(tiny_corpus, target)
    # streaming leaves lock files in the temporary directory.
    done = python(script, target, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    expected = [[u.utt_id, u.text, u.path.read_bytes().hex()] for u in read_subset(tiny_corpus, SUBSET)]
    assert said["rows"] == [expected, expected]
    assert not list(Path("/dev/shm").glob(said["prefix"] + "*"))
    open_pack(target, check=True)


def test_lengths_need_neither_streaming_nor_torch(tiny_corpus: Path, target: Path) -> None:
    write(tiny_corpus, target)
    done = python(
        "import sys; from pathlib import Path; from launcher.worker.pack_reader import lengths_of\n"
        "print(lengths_of(Path(sys.argv[1]))['n_samples'].tolist(), {'torch', 'streaming'} & sys.modules.keys())",
        target,
    )
    assert done.stdout == f"{[u.n_samples for u in read_subset(tiny_corpus, SUBSET)]} set()\n", done.stderr
    assert isinstance(lengths_of(target), np.memmap)


# Damage in the corpus ------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_together_and_nothing_stays(tiny_corpus: Path, target: Path) -> None:
    utterances = read_subset(tiny_corpus, SUBSET)
    cut, flipped = utterances[1], utterances[10]
    os.truncate(cut.path, cut.path.stat().st_size * 2 // 3)
    content = bytearray(flipped.path.read_bytes())
    content[-2000:-1000] = bytes(1000)
    flipped.path.write_bytes(content)
    text = refusal(DataError, lambda: write(tiny_corpus, target))
    assert "2 of the 12 files of train-clean-100 do not decode to what their headers say" in text
    assert re.search(f"{re.escape(str(cut.path))}: {cut.n_samples} samples expected, [0-9]+ found", text)
    assert f"{flipped.path}: " in text
    assert "hint: unpack the archive of train-clean-100 again, or replace these files; nothing was packed" in text
    assert list(target.parent.iterdir()) == []


def test_a_file_of_another_sound_than_its_header_says_is_found(tiny_corpus: Path, target: Path) -> None:
    path = read_subset(tiny_corpus, SUBSET)[0].path
    content = bytearray(path.read_bytes())
    content[26] ^= 1
    path.write_bytes(content)
    assert "samples as expected, but their MD5 is" in refusal(DataError, lambda: write(tiny_corpus, target))


def test_a_header_without_md5_is_trusted_for_its_count_alone(tiny_corpus: Path, target: Path) -> None:
    path = read_subset(tiny_corpus, SUBSET)[0].path
    content = bytearray(path.read_bytes())
    content[26:42] = bytes(16)
    path.write_bytes(content)
    assert write(tiny_corpus, target)["counts"]["packed"] == 12


def test_a_corpus_that_is_not_whole_leaves_nothing(tiny_corpus: Path, target: Path) -> None:
    read_subset(tiny_corpus, SUBSET)[0].path.unlink()
    assert "no audio" in refusal(DataError, lambda: write(tiny_corpus, target))
    assert list(target.parent.iterdir()) == []


# Interruption and concurrency ----------------------------------------------------------------------------------------


def test_one_and_two_processes_make_the_same_pack(tiny_corpus: Path, target: Path, tmp_path: Path) -> None:
    assert write(tiny_corpus, target, 1) == write(tiny_corpus, tmp_path / "two", 2)


def test_after_a_kill_the_complete_parts_are_kept_and_the_pack_is_the_same(
    tiny_corpus: Path, target: Path, tmp_path: Path
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from launcher.worker import pack
pack.PARTITION_UTTERANCES = 3
def progress(line):
    if "part 2 of 4" in line:
        os.kill(os.getpid(), signal.SIGKILL)
pack.write_pack(Path(sys.argv[1]), "train-clean-100", Path(sys.argv[2]), int(sys.argv[3]), 2, progress)
"""
    # Two processes: that this returns also says that the children did not outlive their parent.
    assert python(script, tiny_corpus, target, SHARD_BYTES).returncode == -signal.SIGKILL
    assert not target.exists()
    staging = target.with_name(f".{SUBSET}.partial")
    kept = {p.stat().st_ino for p in staging.glob("part-????/*.mds")}
    assert len(kept) >= 2
    (staging / "part-0009").mkdir()
    said: list[str] = []
    manifest = pack.write_pack(tiny_corpus, SUBSET, target, SHARD_BYTES, 1, said.append)
    assert "of 4 parts are there from an earlier try" in said[0]
    assert manifest == write(tiny_corpus, tmp_path / "uninterrupted")
    assert kept <= {p.stat().st_ino for p in target.glob("*.mds")}
    assert [p.name for p in target.parent.iterdir()] == [SUBSET]


@pytest.mark.parametrize("step", ["_merge", "write_json", "seal"])
def test_an_interrupt_after_the_parts_is_made_good(
    tiny_corpus: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pack, step, interrupt)
        write(tiny_corpus, target)
    assert not target.exists()
    assert write(tiny_corpus, target) == write(tiny_corpus, tmp_path / "uninterrupted")


def test_parts_of_another_corpus_are_not_reused(
    tiny_corpus: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pack, "_merge", interrupt)
        write(tiny_corpus, target)
    transcript = tiny_corpus / SUBSET / "19" / "198" / "19-198.trans.txt"
    transcript.write_text(transcript.read_text().replace("THE", "ONE"))
    said: list[str] = []
    manifest = pack.write_pack(tiny_corpus, SUBSET, target, SHARD_BYTES, 1, said.append)
    assert said == [f"{SUBSET}: part {i} of 4" for i in (1, 2, 3, 4)]
    assert manifest == write(tiny_corpus, tmp_path / "uninterrupted")


def test_a_second_packer_refuses_and_names_the_first(tiny_corpus: Path, target: Path) -> None:
    target.parent.mkdir()
    with pack._only_packer(target):
        text = refusal(UsageError, lambda: write(tiny_corpus, target))
    assert f"error: {target} is being packed by pid {os.getpid()} on " in text
    assert write(tiny_corpus, target)["counts"]["packed"] == 12


# A pack that is there already ----------------------------------------------------------------------------------------


def test_a_sealed_pack_is_returned_or_refused_by_its_source(tiny_corpus: Path, target: Path) -> None:
    manifest = write(tiny_corpus, target)
    inode = target.stat().st_ino
    assert write(tiny_corpus, target) == manifest
    transcript = tiny_corpus / SUBSET / "19" / "198" / "19-198.trans.txt"
    transcript.write_text(transcript.read_text().replace("THE", "ONE"))
    text = refusal(DataError, lambda: write(tiny_corpus, target))
    assert f"{tiny_corpus / SUBSET} is not what {target} was packed from" in text
    assert f"remove {target} and run `speechctl pack RECIPE`" in text
    said: list[str] = []
    gone = tiny_corpus.parent / "gone"
    assert pack.write_pack(gone, SUBSET, target, SHARD_BYTES, 1, said.append) == manifest
    assert said == [f"{SUBSET}: there is no {gone / SUBSET}; its sealed pack {target} is used"]
    assert "is a pack of train-clean-100, expected dev-clean" in refusal(
        DataError, lambda: write(tiny_corpus, target, subset="dev-clean")
    )
    assert target.stat().st_ino == inode


def test_what_is_no_pack_is_left_alone(tiny_corpus: Path, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    assert "is in the way" in refusal(UsageError, lambda: write(tiny_corpus, target))
    assert (target / "notes.txt").read_text() == "mine"


def test_a_missing_pack_says_how_to_make_it(target: Path) -> None:
    text = refusal(DataError, lambda: open_pack(target))
    assert text == (f"error: the pack {target} does not exist\n\nhint: run `speechctl pack RECIPE` to make it")


def test_damage_in_a_shard_is_found_when_it_is_looked_for(tiny_corpus: Path, target: Path) -> None:
    write(tiny_corpus, target)
    shard = target / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    open_pack(target)
    assert f"{shard} has changed since it was sealed" in refusal(DataError, lambda: open_pack(target, check=True))
    shard.write_bytes(content[:-1])
    assert f"{shard} has {len(content) - 1} bytes" in refusal(DataError, lambda: open_pack(target))


def test_side_files_are_always_hashed(tiny_corpus: Path, target: Path) -> None:
    write(tiny_corpus, target)
    lengths = target / "lengths.npy"
    content = bytearray(lengths.read_bytes())
    content[-1] ^= 1
    lengths.write_bytes(content)
    assert f"{lengths} has changed" in refusal(DataError, lambda: lengths_of(target))


@pytest.mark.parametrize("what", ["basename", "column"])
def test_an_index_that_leads_elsewhere_is_refused_although_it_is_sealed(
    tiny_corpus: Path, target: Path, what: str
) -> None:
    """The seal can be made by anyone; an index from a stranger must not name files outside or columns that run code."""
    write(tiny_corpus, target)
    index = json.loads((target / "index.json").read_bytes())
    if what == "basename":
        index["shards"][0]["raw_data"]["basename"] = "../../secret"
    else:
        index["shards"][0]["column_encodings"][0] = "pkl"
    (target / "index.json").write_text(json.dumps(index))
    manifest = json.loads((target / MANIFEST).read_bytes())
    del manifest["digest"]
    manifest["files"]["index.json"] = digest_file(target / "index.json")
    manifest["digest"] = digest_json(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))
    complaint = {"basename": "names the shard '../../secret'", "column": "'audio': 'pkl'"}[what]
    assert complaint in refusal(DataError, lambda: open_pack(target))


# The real thing ------------------------------------------------------------------------------------------------------


def test_real_dev_clean(target: Path) -> None:
    data = os.environ.get("SPEECHCTL_TEST_DATA")
    if not data:
        pytest.skip("SPEECHCTL_TEST_DATA is not set: no real LibriSpeech to pack")
    corpus = Path(data) / "data" / "LibriSpeech"
    manifest = write(corpus, target, subset="dev-clean")
    assert manifest["counts"]["packed"] == 11
    opened = open_pack(target, check=True)
    for i, utterance in enumerate(read_subset(corpus, "dev-clean")):
        assert opened.sample(i)["audio"] == utterance.path.read_bytes()
