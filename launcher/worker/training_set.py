"""What a run trains on: which utterances of its packs, how often, how fast they are played, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launcher.errors import DataError
from launcher.recipe import Recipe
from launcher.worker import augment, shims, vocabularies
from launcher.worker.augment import Keys
from launcher.worker.backbone import SpeechModel
from launcher.worker.data import Example, Utterances, Waveform
from launcher.worker.librispeech import SAMPLE_RATE_HZ
from launcher.worker.sampler import Indices, Sampler, Seconds


@dataclass(frozen=True)
class TrainingSet:
    """The items of an epoch: each usable utterance, as often as its subset's weight says."""

    utterances: Utterances
    usable: Indices
    """Position in `utterances` of each item, shape (items,)."""
    copies: Indices
    """Which of its utterance's occurrences in an epoch each item is, from 0; shape (items,)."""
    keys: Keys
    """What its random numbers follow from, shape (items,)."""
    speeds: list[float]
    samples: Indices
    """Samples of each item at each speed, shape (speeds, items); as at speed 1 where a speed is not for it."""
    seconds: Seconds
    """What each takes in a batch when it is the longest there, shape (speeds, items)."""
    left_out: dict[str, int]
    """How many utterances were left out, by reason."""
    seed: int

    @staticmethod
    def open(recipe: Recipe, model: SpeechModel) -> TrainingSet:
        """
        Raises:
            DataError: no utterance is left, or a pack is not what was sealed.
        """
        utterances = Utterances.of(recipe, recipe.data.train)
        lengths = utterances.lengths
        lengths["ctc_frames"] = vocabularies.ctc_frames(recipe, lengths["ctc_frames"])
        usable, left_out = _usable(recipe, model, lengths)
        weights = np.array([recipe.data.weights.get(p.path.name, 1) for p in utterances.packs], dtype=np.int64)
        pack = np.searchsorted(utterances.ends, usable, side="right")
        times = weights[pack]
        copies = np.concatenate([np.arange(n) for n in times]) if (times > 1).any() else np.zeros(len(usable), np.int64)
        usable, pack = np.repeat(usable, times), np.repeat(pack, times)
        starts = np.concatenate([[0], utterances.ends[:-1]])
        keys = np.empty(len(usable), dtype=np.uint64)
        for number, opened in enumerate(utterances.packs):
            of = pack == number
            keys[of] = augment.keys_of(opened.path.name, usable[of] - starts[number], copies[of])
        chosen = lengths[usable]
        samples = np.stack([_at_speed(recipe, model, chosen, speed) for speed in recipe.augment.speed])
        padded = np.stack([model.padded_samples(row) for row in samples]) / SAMPLE_RATE_HZ
        speeds = list(recipe.augment.speed)
        return TrainingSet(utterances, usable, copies, keys, speeds, samples, padded, left_out, recipe.seed)

    def __len__(self) -> int:
        return len(self.usable)

    def sampler(self, recipe: Recipe) -> Sampler:
        batch = recipe.batch
        return Sampler(
            self.seconds,
            step_seconds=batch.step_seconds,
            seed=self.seed,
            keys=self.keys,
            padded_lengths=batch.padded_lengths,
            quadratic_seconds=batch.quadratic_seconds,
        )

    def samples_in(self, epoch: int) -> Indices:
        """Samples of each item as this epoch hears it, without padding; shape (items,)."""
        ways = augment.choose(self.seed, epoch, self.keys, len(self.speeds))
        return np.asarray(self.samples[ways, np.arange(len(self))])

    def example(self, item: int, epoch: int) -> Example:
        """One item as this epoch hears it; the id of a second occurrence ends in `#2`. Safe from several threads.

        Raises:
            DataError: as `Utterances.example`.
        """
        read = self.utterances.example(int(self.usable[item]))
        way = int(augment.choose(self.seed, epoch, self.keys[item : item + 1], len(self.speeds))[0])
        wanted = int(self.samples[way, item])
        waveform = read.waveform if wanted == len(read.waveform) else at_speed(read.waveform, self.speeds[way], wanted)
        copy = int(self.copies[item])
        return Example(f"{read.utt_id}#{copy + 1}" if copy else read.utt_id, waveform, read.text)

    def dice(self, item: int, epoch: int) -> np.random.Generator:
        """Random numbers of one item in one epoch, from their beginning."""
        return augment.dice(self.seed, epoch, int(self.keys[item]))


def _usable(recipe: Recipe, model: SpeechModel, lengths: npt.NDArray[Any]) -> tuple[Indices, dict[str, int]]:
    seconds = lengths["n_samples"] / SAMPLE_RATE_HZ
    keep = seconds >= recipe.data.min_utterance
    left_out = {"shorter than data.min_utterance": int((~keep).sum())}
    for reason, mask in (
        ("longer than data.max_utterance", seconds <= recipe.data.max_utterance),
        ("not for this backbone (letters, or more of them than frames)", model.feasible(lengths)),
    ):
        left_out[reason] = int((keep & ~mask).sum())
        keep = keep & mask
    usable = keep.nonzero()[0].astype("int64")[: recipe.data.max_train_utterances]
    if len(usable) == 0:
        raise DataError(
            f"no training utterance is left of {len(lengths)}: {left_out}",
            hint="widen data.min_utterance and data.max_utterance, or look at the packs' stats.json",
        )
    return usable, {k: v for k, v in left_out.items() if v}


# Speed ---------------------------------------------------------------------------------------------------------------


def samples_at(n_samples: Indices, speed: float) -> Indices:
    """How many samples are left of so many at a speed, rounded up as torchaudio does, in whole numbers."""
    return -(-n_samples * 100 // round(speed * 100))


def _at_speed(recipe: Recipe, model: SpeechModel, lengths: npt.NDArray[Any], speed: float) -> Indices:
    own = lengths["n_samples"].astype(np.int64)
    other = np.array(lengths)
    other["n_samples"] = samples_at(own, speed)
    seconds = other["n_samples"] / SAMPLE_RATE_HZ
    fits = (seconds >= recipe.data.min_utterance) & (seconds <= recipe.data.max_utterance) & model.feasible(other)
    return np.where(fits, other["n_samples"], own)


def at_speed(waveform: Waveform, speed: float, n_samples: int) -> Waveform:
    """Played faster or slower, its pitch with it; exactly as long as was planned."""
    played = np.asarray(_resampler(round(speed * 100))(torch.from_numpy(waveform)), dtype=np.float32)[:n_samples]
    return np.pad(played, (0, n_samples - len(played)))


@cache
def _resampler(hundredths: int) -> Any:
    shims.apply()
    from torchaudio.transforms import Resample

    # As sound of another rate, which is then the recipe's: 110 of its samples become 100.
    return Resample(hundredths, 100)
