"""The recipe's sections `feed` and `augment`: how batches are made ahead of the step, and what is changed in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from launcher.recipe_values import Location, Section


class Feed(Section):
    threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads of each rank that decode, augment and collate. One decodes FLAC some 6,000 times as fast as it is
    spoken."""

    ahead: Annotated[int, Field(ge=1, le=256)] = 4
    """Micro-batches made ahead of the one that is computed, at most. Each takes `batch.max_rank_seconds` x 64 kB of
    memory."""

    cache: Location | None = None
    """A directory on a disk of each node. Shards of `data.remote` are kept there while an attempt lasts, one copy for
    all ranks of the node. Default: the system's directory for temporary files."""


def _speeds(factors: list[float]) -> list[float]:
    if len(set(factors)) < len(factors):
        raise ValueError("expected each factor once: all are equally likely")
    if any(abs(factor * 100 - round(factor * 100)) > 1e-9 for factor in factors):
        raise ValueError("expected factors with at most two decimals, such as 0.9: sound is resampled by their ratio")
    return factors


class Augment(Section):
    """All of it follows from seed, epoch and utterance: it is the same after a resume and at any number of ranks."""

    speed: Annotated[list[Annotated[float, Field(ge=0.5, le=2)]], AfterValidator(_speeds), Field(min_length=1)] = [1.0]
    """Each utterance is heard in each epoch at one of these speeds, and its pitch with it (Ko et al., 2015:
    `[0.9, 1.0, 1.1]`). Not where it would then break `data.min_utterance` or `data.max_utterance`, or be too short for
    its text."""
