"""Trains runs in one process group, as `stages.py` does, and writes down which layers each rank passes over."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher import rundir
from launcher.worker.backbone import SpeechModel
from tests.worker import stages


def main(attempts: list[str]) -> int:
    begin, rank = SpeechModel.begin, os.environ["RANK"]
    for attempt in attempts:
        path = Path(attempt) / f"dropped-{rank}.jsonl"

        def noted(model: SpeechModel, step: int, batch: int, path: Path = path) -> None:
            begin(model, step, batch)
            assert model.layer_drop is not None
            row = {"step": step, "batch": batch, "dropped": model.layer_drop.dropped.tolist()}
            assert model.training  # else nothing is passed over, whatever was drawn
            rundir.append_line(path, row)

        setattr(SpeechModel, "begin", noted)  # noqa: B010
        stages.rank([attempt], last=attempt == attempts[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
