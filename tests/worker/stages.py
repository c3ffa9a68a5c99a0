"""A rank that trains several prepared runs, one after the other, in one process group. Usage: stages.py ATTEMPT…"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.rundir import Attempt
from launcher.worker.ranks import Ranks
from launcher.worker.train import Training


def rank(attempts: list[str], last: bool = True) -> int:
    """
    Args:
        last: no other runs follow.
    """
    close, Ranks.close = Ranks.close, Ranks.barrier  # type: ignore[method-assign]
    for attempt in attempts:
        training = Training(Attempt(Path(attempt)), [False], fresh=False)
        training.go()
    Ranks.close = close  # type: ignore[method-assign]
    if last:
        close(training.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(rank(sys.argv[1:]))
