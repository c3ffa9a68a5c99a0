"""The shims, each in a process of its own: what they do is done to `sys.modules`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, first_on_path: Path | None = None) -> None:
    environment = dict(os.environ)
    if first_on_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(first_on_path), *filter(None, [environment.get("PYTHONPATH")])]
        )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def package(root: Path, name: str, source: str) -> None:
    (root / name).mkdir()
    (root / name / "__init__.py").write_text(source)


APPLY = "from launcher.worker import shims; shims.apply(); "


def test_torchaudio_transformers_and_streaming_work() -> None:
    run(
        APPLY
        + """
import torch
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram
assert MelSpectrogram(16000, center=False)(torch.zeros(1, 16000)).shape[1] == 128
assert resample(torch.zeros(22050), 22050, 16000).shape == (16000,)
import streaming
assert streaming.MDSWriter and streaming.StreamingDataset
from transformers import Wav2Vec2ForCTC
"""
    )


def test_a_broken_torchvision_looks_uninstalled(tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "import torchvision.ops\n")
    (tmp_path / "torchvision" / "ops.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    run(
        APPLY
        + """
import importlib.util, sys
assert importlib.util.find_spec("torchvision") is None
assert "torchvision.ops" not in sys.modules
import streaming
assert streaming.MDSWriter and streaming.StreamingDataset
from transformers import Wav2Vec2ForCTC
""",
        tmp_path,
    )


def test_nothing_is_replaced_where_all_import(tmp_path: Path) -> None:
    """What a CUDA machine sees."""
    package(tmp_path, "torchvision", "")
    package(tmp_path, "torchaudio", "from torchaudio import _extension\n")
    (tmp_path / "torchaudio" / "_extension.py").write_text("HEALTHY = True\n")
    run(
        APPLY
        + """
import sys, torchaudio, torchvision
assert torchvision.__file__ and torchaudio._extension.HEALTHY
assert sys.modules["torchaudio._extension"] is torchaudio._extension
assert not [name for name in sys.modules if name.startswith("streaming")]
""",
        tmp_path,
    )


def test_twice_is_once_and_touches_nothing_again() -> None:
    run(
        APPLY
        + """
import sys
before = dict(sys.modules)
shims.apply()
assert before == dict(sys.modules)
"""
    )
