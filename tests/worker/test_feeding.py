"""Batches on their way to the step: made ahead by threads, from shards that are here or elsewhere, or damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher import recipe_file, sealing, shard_folder
from launcher.errors import DataError, InfrastructureError, SpeechctlError, StorageError, UsageError
from launcher.recipe import Recipe
from launcher.rundir import Run
from launcher.worker import pack, pack_reader, shard_cache
from launcher.worker.data import BackgroundCheck, Utterances, ahead, pad_to
from launcher.worker.models import build
from launcher.worker.sampler import Cursor
from launcher.worker.shard_cache import ShardCache
from launcher.worker.training_set import TrainingSet
from tests.conftest import RECIPE

SUBSET = "train-clean-100"


@pytest.fixture
def packed(tiny_corpus: Path, tmp_path: Path) -> Path:
    """The pack of 12 utterances in several shards."""
    target = tmp_path / "packs" / SUBSET
    pack.write_pack(tiny_corpus, SUBSET, target, 60_000, 1, lambda line: None)
    return target


def recipe(root: Path, **changes: object) -> Recipe:
    (root / "r.yaml").write_text(RECIPE)
    value = recipe_file.absolute(recipe_file.load(root / "r.yaml", ["data.packs=packs"]), root)
    whole = value.model_dump(mode="json")
    for key, change in changes.items():
        section, _, name = key.partition("__")
        whole[section][name] = change
    return Recipe.model_validate(whole)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard.*.mds"))


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def refusal(kind: type[SpeechctlError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return caught.value.render()


# Ahead ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "threads"), [(1, 1), (4, 1), (4, 3), (2, 8)])
def test_results_come_in_order_and_never_more_than_so_many_ahead(depth: int, threads: int) -> None:
    made: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))  # the second is done before the first
        with lock:
            made.append(item)
        return item * item

    for number, result in enumerate(ahead(work, range(40), depth, threads)):
        assert result == number * number
        assert len(made) <= number + 1 + depth
    assert sorted(made) == list(range(40))


def test_several_threads_work_at_once() -> None:
    """Three meet at a barrier that none can leave alone."""
    barrier = threading.Barrier(3, timeout=30)

    def work(item: int) -> int:
        barrier.wait()
        return item

    assert list(ahead(work, range(6), depth=3, threads=3)) == list(range(6))


def test_an_error_comes_in_its_place_and_nothing_goes_on_behind_it() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise DataError("the third", hint="")
        return item

    feed = ahead(work, range(1000), depth=4, threads=2)
    assert [next(feed), next(feed)] == [0, 1]
    with pytest.raises(DataError, match="the third"):
        next(feed)
    assert len(begun) <= 7
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]


def test_whoever_stops_in_the_middle_leaves_no_thread() -> None:
    feed = ahead(lambda item: item, range(1000), depth=8, threads=4)
    assert next(feed) == 0
    feed.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]


def test_sound_is_padded_and_features_are_left_alone() -> None:
    sound = {"inputs": torch.ones(2, 100), "lengths": torch.tensor([100, 90])}
    padded = pad_to(sound, 160)
    assert padded["inputs"].shape == (2, 160) and padded["inputs"][:, 100:].sum() == 0
    assert sound["inputs"].shape == (2, 100) and padded["lengths"] is sound["lengths"]
    assert pad_to(sound, 100) is sound
    features = {"inputs": torch.ones(2, 80, 3000)}
    assert pad_to(features, 480_000) is features


# The training set ----------------------------------------------------------------------------------------------------


def opened(value: Recipe) -> TrainingSet:
    return TrainingSet.open(value, build(value.backbone, seed=1))


def test_a_weight_is_how_often_an_epoch_has_an_utterance(packed: Path, tmp_path: Path) -> None:
    data = opened(recipe(tmp_path, data__weights={SUBSET: 3}))
    once = len(opened(recipe(tmp_path)))
    assert once > 1 and len(data) == len(np.unique(data.keys)) == 3 * once
    steps = data.sampler(recipe(tmp_path)).steps_left(Cursor(0, []), 2, 1)
    items = [int(i) for step in steps for b in step if not b.filler for i in b.indices]
    names = [data.example(item, epoch=0).utt_id for item in items]
    assert len(set(names)) == 3 * once, "an audit can tell its occurrences apart"
    plain = {name.partition("#")[0] for name in names}
    assert sorted(names) == sorted(f"{name}{times}" for name in plain for times in ("", "#2", "#3"))


def test_an_epoch_hears_what_was_planned(packed: Path, tmp_path: Path) -> None:
    """Every utterance at the speed of its key, exactly as long as the sampler took it to be."""
    value = recipe(tmp_path, augment__speed=[0.9, 1.0, 1.1])
    data = opened(value)
    sampler = data.sampler(value)
    plain = opened(recipe(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        for epoch in range(4):
            planned = data.samples[sampler.ways_in(epoch), np.arange(len(data))]
            heard = list(pool.map(lambda item, e=epoch: data.example(item, e), range(len(data))))
            assert [len(e.waveform) for e in heard] == planned.tolist()
            assert data.samples_in(epoch).tolist() == planned.tolist()
            again = [data.example(item, epoch) for item in reversed(range(len(data)))][::-1]
            assert all(np.array_equal(a.waveform, b.waveform) for a, b in zip(heard, again, strict=True))
    assert len({tuple(sampler.ways_in(epoch).tolist()) for epoch in range(4)}) == 4
    assert np.array_equal(data.samples[1], plain.samples[0])


def test_no_speed_breaks_the_recipe_s_own_limits(packed: Path, tmp_path: Path) -> None:
    """Nor makes an utterance too short for its text: it would have no path through CTC, and an infinite loss."""
    plain = opened(recipe(tmp_path)).samples[0]
    slow = opened(recipe(tmp_path, augment__speed=[0.5], data__max_utterance=plain.max() / 16_000)).samples[0]
    assert (slow == np.where(2 * plain <= plain.max(), 2, 1) * plain).all()
    assert 0 < (slow == plain).sum() < len(plain)
    fast = opened(recipe(tmp_path, augment__speed=[2.0]))
    model = build(recipe(tmp_path).backbone, seed=1)
    rows = np.array(fast.utterances.lengths[fast.usable])
    rows["n_samples"] = fast.samples[0]
    assert model.feasible(rows).all()
    halved = fast.samples[0] < fast.utterances.lengths["n_samples"][fast.usable]
    assert 0 < halved.sum() < len(fast), "some are, and some may not be"


# Damage --------------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_where_it_does_not_decode(packed: Path) -> None:
    utterances = Utterances([pack_reader.open_pack(packed)])
    shard = packed / utterances.packs[0].shard_of(0)
    content = shard.read_bytes()
    at = content.index(b"fLaC")
    shard.write_bytes(content[:at] + b"\0" * 2000 + content[at + 2000 :])
    said = refusal(DataError, lambda: utterances.example(0))
    assert shard.name in said and "has changed since it was sealed (xxh3-128 differs)" in said
    shard.write_bytes(b"\xff" * len(content))  # offsets that lead nowhere
    assert f"in shard {shard.name}" in refusal(DataError, lambda: utterances.example(0))
    shard.unlink()
    assert f"{shard} cannot be read: No such file" in refusal(DataError, lambda: utterances.example(0))


def test_one_flipped_bit_is_found_though_everything_decodes(packed: Path) -> None:
    """In a transcript: nothing but the hash can tell. Each shard is some rank's, whatever the number of ranks."""
    opened = pack_reader.open_pack(packed)
    assert len(opened.shards) >= 4
    for damaged in (opened.shards[0], opened.shards[-1]):
        shard, content = packed / damaged, (packed / damaged).read_bytes()
        flip(shard, content.rindex(b"HE") if b"HE" in content else -1)
        found = []
        for rank in range(3):
            check = BackgroundCheck([opened], slice(rank, None, 3))
            check.thread.join()
            if check.error is not None:
                found.append(refusal(DataError, check.complain))
        assert len(found) == 1 and f"shard {damaged} of {packed} was damaged" in found[0]
        shard.write_bytes(content)


# Shards that are elsewhere -------------------------------------------------------------------------------------------


@pytest.fixture
def remote(packed: Path, tmp_path: Path) -> Path:
    """The pack in a place that has to be fetched from."""
    there = tmp_path / "far away" / SUBSET
    there.parent.mkdir()
    packed.rename(there)
    return there


def cache_of(remote: Path, folder: Path, url: str | None = None) -> ShardCache:
    return ShardCache(url or str(remote), folder, sealing.manifest_of(remote)["files"])


FETCHER = """\
import json, sys, time
from pathlib import Path
from launcher.worker import shard_cache
remote, folder, log = sys.argv[1:]
own = shard_cache.fetch
def fetch(source, target, *, again=False):
    with open(log, "a") as file:
        print(source, file=file)
    time.sleep(0.05)
    own(source, target, again=again)
shard_cache.fetch = fetch
files = json.loads((Path(remote) / "MANIFEST.json").read_text())["files"]
cache = shard_cache.ShardCache(remote, Path(folder), files)
for name in sorted(n for n in files if n.startswith("shard.")):
    cache.need(name)
"""


def test_the_ranks_of_a_node_fetch_each_shard_once(remote: Path, tmp_path: Path) -> None:
    """Five processes that need all shards at once."""
    argv = [sys.executable, "-c", FETCHER, str(remote), str(tmp_path / "cache"), str(tmp_path / "log")]
    ranks = [subprocess.Popen(argv) for _ in range(5)]
    assert [rank.wait(100) for rank in ranks] == [0] * 5
    fetched = (tmp_path / "log").read_text().splitlines()
    assert sorted(fetched) == [str(path) for path in shards_of(remote)]
    for shard in shards_of(remote):
        assert (tmp_path / "cache" / shard.name).read_bytes() == shard.read_bytes()
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_rank_that_is_killed_in_a_transfer_leaves_nothing_that_is_used(remote: Path, tmp_path: Path) -> None:
    name = shards_of(remote)[0].name
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{name}.part").write_bytes(b"half of it")
    cache_of(remote, tmp_path / "cache").need(name)
    assert (tmp_path / "cache" / name).read_bytes() == (remote / name).read_bytes()


def test_every_utterance_is_read_through_the_cache(remote: Path, tmp_path: Path) -> None:
    """Of a path with a space, as a path and as a URL; the small files are brought by what `pack` does."""
    whole = pack_reader.open_pack(remote)
    url = remote.as_uri()
    assert "%20" in url
    manifest = pack_reader.bring(url, tmp_path / "packs" / SUBSET)
    assert pack_reader.bring(str(remote), tmp_path / "packs" / SUBSET) == manifest, "it is there already"
    assert sorted(p.name for p in (tmp_path / "packs" / SUBSET).iterdir()) == [
        "MANIFEST.json",
        "index.json",
        "lengths.npy",
        "stats.json",
    ]
    for number, place in enumerate((url, str(remote))):
        far = pack_reader.open_pack(tmp_path / "packs" / SUBSET, remote=place, cache=tmp_path / f"cache{number}")
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(far.sample, range(12))) == [whole.sample(i) for i in range(12)]
    said = refusal(DataError, lambda: pack_reader.open_pack(tmp_path / "packs" / SUBSET))
    assert "is missing" in said, "without the remote it is a damaged pack"


def test_only_what_is_needed_is_fetched(remote: Path, tmp_path: Path) -> None:
    pack_reader.bring(str(remote), tmp_path / "packs" / SUBSET)
    far = pack_reader.open_pack(tmp_path / "packs" / SUBSET, remote=str(remote), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    far.sample(11)
    assert [p.name for p in shards_of(tmp_path / "cache" / SUBSET)] == [far.shard_of(11)]


def test_a_shard_that_is_damaged_there_is_never_used(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(remote)[1]
    cache = cache_of(remote, tmp_path / "cache")
    flip(shard)
    tries, own = [], shard_cache.fetch

    def counted(source: str, target: Path, *, again: bool = False) -> None:
        tries.append(source)
        own(source, target, again=again)

    monkeypatch.setattr(shard_cache, "fetch", counted)
    said = refusal(DataError, lambda: cache.need(shard.name))
    assert f"shard {shard} is not what was sealed" in said
    assert len(tries) == shard_cache.TRIES, "it might have been the transfer"
    assert shards_of(tmp_path / "cache") == []
    flip(shard)
    cache.need(shard.name)


def test_what_cannot_be_fetched_is_told_from_what_is_not_there(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing shard would be missing again: exit 5. A server that does not answer may: exit 76, which tries again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    shard = shards_of(remote)[0]
    cache = cache_of(remote, tmp_path / "cache")
    shard.rename(remote / "elsewhere")
    assert f"{shard} does not exist" in refusal(DataError, lambda: cache.need(shard.name))
    (remote / "elsewhere").rename(shard)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert "could not be fetched in 3 tries" in refusal(InfrastructureError, lambda: cache.need(shard.name))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refusal(StorageError, lambda: cache.need(shard.name))
    strange = cache_of(remote, tmp_path / "cache", "gopher://far/pack")
    assert "nothing downloads from gopher://far/pack" in refusal(UsageError, lambda: strange.need(shard.name))


def test_the_folder_of_an_attempt_is_found_again_and_removed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.attempts_dir.mkdir(parents=True)
    first, second = run.new_attempt(), run.new_attempt()
    file = shard_folder.record(first, 0)
    folder = shard_folder.make(file, tmp_path / "disk")
    assert folder == shard_folder.make(file, tmp_path / "disk"), "the second rank of the node"
    assert folder != shard_folder.make(shard_folder.record(first, 1), tmp_path / "disk")
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "shard").touch()
    shard_folder.remove(file)
    assert not folder.exists()
    shard_folder.make(file, tmp_path / "disk")  # of an agent that was killed
    shard_folder.remove_older(second)
    assert list((tmp_path / "disk").iterdir()) == []


def test_nothing_but_its_own_folder_is_ever_removed_or_used(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.attempts_dir.mkdir(parents=True)
    file = shard_folder.record(run.new_attempt(), 0)
    (tmp_path / "precious").mkdir()
    file.write_bytes(os.fsencode(tmp_path / "precious"))
    shard_folder.remove(file)
    assert (tmp_path / "precious").exists()
    folder = shard_folder.make(file, tmp_path / "disk")
    folder.rmdir()
    folder.symlink_to(tmp_path / "precious")
    assert "is not a directory" in refusal(StorageError, lambda: shard_folder.make(file, tmp_path / "disk"))
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    assert "only its owner" in refusal(StorageError, lambda: shard_folder.make(file, tmp_path / "disk"))
