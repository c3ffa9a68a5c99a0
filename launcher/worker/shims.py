"""Lets CPU torch live beside the CUDA builds of torchaudio and torchvision that the package index serves.

The index has one build of each, linked against CUDA. Beside a CPU torch both fail on import, and what imports them
fails with them: transformers' audio models and `import streaming`. Where both import, nothing here is replaced.
Call `apply()` before the first import of torchaudio, transformers or streaming.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_BROKEN = (ImportError, OSError, RuntimeError)
"""What an import of a foreign build raises: no `libcudart`, or `operator torchvision::nms does not exist`."""


@cache
def apply() -> None:
    """Make torchaudio, transformers and streaming importable in this process, at the cost of what needs CUDA.

    After it torchaudio's compiled parts (forced alignment, RNN-T loss, lfilter's fast path) may be absent; a broken
    torchvision looks uninstalled; without torchvision `streaming.vision`, `.text` and `.multimodal` are empty.
    """
    _mend_torchaudio()
    if not _has_torchvision():
        _empty_streaming_parts()


def _mend_torchaudio() -> None:
    if find_spec("torchaudio") is None:
        return
    try:
        import torchaudio  # noqa: F401
    except _BROKEN:
        _purge("torchaudio")
        # torchaudio loads its libraries in this one module; these two names are all that its Python asks of it.
        extension = ModuleType("torchaudio._extension")
        extension.__dict__.update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=_refuse_alignment)
        sys.modules["torchaudio._extension"] = extension
        import_module("torchaudio")


def _has_torchvision() -> bool:
    if find_spec("torchvision") is None:
        return False
    try:
        import_module("torchvision")
    except _BROKEN:
        _purge("torchvision")
        # None makes `import torchvision` raise ImportError and `find_spec` say absent, which is what transformers
        # asks before it imports its image code.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return False
    return True


def _empty_streaming_parts() -> None:
    """`streaming/__init__.py` imports three subpackages; one needs torchvision, none has to do with MDS files."""
    for name in ("streaming.multimodal", "streaming.text", "streaming.vision"):
        sys.modules.setdefault(name, ModuleType(name))


def _refuse_alignment(function: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{function.__name__} needs the torchaudio build of this torch")

    return refuse


def _purge(package: str) -> None:
    """Forget a half-imported package, so that its next import starts from nothing."""
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]
