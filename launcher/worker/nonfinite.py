"""A step that all ranks left out, since its loss or gradient is not finite: what may be to blame."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from launcher.worker.ranks import Ranks

SHOWN = 4
"""Ranks, and utterances of each, that the message names; the event has all."""


def blame(ranks: Ranks, heard: Sequence[tuple[list[str], Tensor]]) -> tuple[str, dict[str, list[str]]]:
    """In words and as they are, by rank: the utterances whose loss is not finite, or, where there is none, all that the
    step heard. All ranks ask together.

    Args:
        heard: ids and losses, shape (batch,), of each micro-batch of this rank.
    """
    bad = [i for ids, losses in heard for i, x in zip(ids, losses.tolist(), strict=True) if not math.isfinite(x)]
    everything = [i for ids, _ in heard for i in ids]
    said: list[list[list[str]]] = ranks.gather([bad, everything])
    anyone = any(of_rank[0] for of_rank in said)
    utterances = {str(r): of[0] if anyone else of[1] for r, of in enumerate(said) if of[0] or not anyone}
    where = "; ".join(
        f"rank {r}: {', '.join(ids[:SHOWN])}{f' and {len(ids) - SHOWN} more' if len(ids) > SHOWN else ''}"
        for r, ids in list(utterances.items())[:SHOWN]
    )
    of_many = f" and {len(utterances) - SHOWN} more ranks" if len(utterances) > SHOWN else ""
    return where + of_many, utterances
