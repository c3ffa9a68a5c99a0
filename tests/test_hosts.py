"""How many ranks this machine takes."""

from __future__ import annotations

from typing import Literal

import pytest

from launcher.hosts import Host, local


@pytest.mark.parametrize(
    ("processes", "gpus", "ranks"), [("auto", 0, 1), ("auto", 4, 4), (2, 0, 2), (2, 8, 2), (1, 4, 1)]
)
def test_this_machine_takes_what_was_asked_for_or_a_rank_for_each_gpu(
    processes: int | Literal["auto"], gpus: int, ranks: int
) -> None:
    assert local(processes, gpus) == [Host("localhost", ranks)]
