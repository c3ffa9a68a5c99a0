"""What only torch and the packs can tell of a recipe, kept: the worker is asked once, and then only when the answer
could be another.

The worker takes seconds to import torch for it. Its answer follows from the packs, the model, what of it learns, the
batch and the code, and is kept under a digest of these in the user's cache.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher import rundir, sealing
from launcher.errors import SpeechctlError
from launcher.recipe import Recipe


def known(recipe: Recipe, world_size: int) -> dict[str, Any] | None:
    """The worker's earlier answer for a recipe with absolute paths, or None where it must be asked."""
    digest = _digest(recipe, world_size)
    if digest is None:
        return None
    try:
        value = rundir.read_json(_cache() / f"{digest}.json")
    except (SpeechctlError, OSError):
        return None
    return value if isinstance(value, dict) else None


def remember(recipe: Recipe, world_size: int, facts: dict[str, Any]) -> None:
    """Keep an answer of the worker. A cache that cannot be written is no reason to fail."""
    digest = _digest(recipe, world_size)
    if digest is not None:
        with suppress(OSError, SpeechctlError):
            _cache().mkdir(parents=True, exist_ok=True)
            rundir.write_json(_cache() / f"{digest}.json", facts)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "speechctl" / "facts"


def _digest(recipe: Recipe, world_size: int) -> str | None:
    """Of everything that the facts follow from; None where that cannot be known, or a pack is not as it was sealed."""
    model = recipe.backbone.model_dump(mode="json")
    source = model.get("source")
    if source is not None:
        if Path(source).is_dir():
            files = sorted(p for p in Path(source).iterdir() if p.is_file())
            model["files"] = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        elif model["revision"] is None:
            return None  # the hub may have another one tomorrow
    try:
        # Sizes and the manifest's own digest; every file is hashed by `pack`, and by nobody at a launch.
        # Of packs whose shards are elsewhere, only small files are here.
        manifest = sealing.manifest_of if recipe.data.remote else partial(sealing.verify, share=slice(0, 0))
        packs = [manifest(recipe.pack(s))["digest"] for s in recipe.subsets]
        code = [sealing.digest_file(p) for p in sorted((Path(__file__).parent / "worker").glob("*.py"))]
    except (SpeechctlError, OSError):
        return None  # the worker says why
    names = ("torch", "torchaudio", "transformers")
    return sealing.digest_json(
        {
            "model": model,
            "data": recipe.data.model_dump(mode="json"),
            "batch": recipe.batch.model_dump(mode="json"),
            "augment": recipe.augment.model_dump(mode="json"),
            "lora": recipe.lora and recipe.lora.model_dump(mode="json"),
            "freeze": [freeze.model_dump(mode="json") for freeze in recipe.freeze],
            "evaluate": recipe.evaluate.model_dump(mode="json"),
            "seed": recipe.seed,
            "world_size": world_size,
            "packs": packs,
            "code": code,
            "packages": {name: metadata.version(name) for name in names},
        }
    )
