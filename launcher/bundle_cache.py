"""Where a pretrained bundle of torchaudio lies once it was converted; both sides look there, one of them fills it."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "torchaudio:"
"""Before a bundle's name in `backbone.source`."""


def folder(source: str, revision: str | None) -> Path:
    """In the user's cache, by name and hash. What has no hash was never converted, and is at no place that exists."""
    home = os.environ.get("XDG_CACHE_HOME")
    cache = Path(home) if home else Path.home() / ".cache"
    return cache / "speechctl" / "backbones" / f"{source.removeprefix(PREFIX)}-{(revision or 'unpinned')[:16]}"
