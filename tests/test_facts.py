"""What the worker told of a recipe is told again only where it is still true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import facts, recipe_file, rundir, sealing
from launcher.recipe import Recipe
from tests.conftest import RECIPE

TOLD = {"parameters": 1000, "left_out": {}}


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose packs are sealed directories."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "packs").mkdir()
    for subset in ("train-clean-100", "dev-clean"):
        seal(tmp_path / "packs" / subset, "sound")
    (tmp_path / "stub.yaml").write_text(RECIPE)
    return recipe_file.absolute(recipe_file.load(tmp_path / "stub.yaml"), tmp_path)


def seal(target: Path, content: str) -> None:
    staged = target.with_name(".staged")
    staged.mkdir()
    (staged / "shard").write_text(content)
    sealing.seal(staged, target, {})


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: part})


def test_the_answer_is_kept(packed: Recipe) -> None:
    assert facts.known(packed, 2) is None
    facts.remember(packed, 2, TOLD)
    assert facts.known(packed, 2) == TOLD
    assert facts.known(changed(packed, "optimizer", learning_rate=0.5), 2) == TOLD, "it does not depend on that"


def test_what_it_follows_from_makes_another(packed: Recipe) -> None:
    facts.remember(packed, 2, TOLD)
    assert facts.known(packed, 3) is None
    assert facts.known(changed(packed, "batch", step_seconds=48.0), 2) is None
    assert facts.known(changed(packed, "backbone", hidden=96), 2) is None
    assert facts.known(changed(packed, "data", max_utterance=3.0), 2) is None


@pytest.mark.parametrize(
    "lines", ["lora: {rank: 4, targets: [qkv]}", "lora: {rank: 4, targets: [nose]}", "freeze: [{parts: [head]}]"]
)
def test_what_learns_makes_another(packed: Recipe, tmp_path: Path, lines: str) -> None:
    """Also a part or a module that the model has not: the worker refuses it before there is a run."""
    facts.remember(packed, 2, TOLD)
    (tmp_path / "learning.yaml").write_text(f"{RECIPE}\n{lines}\n")
    learning = recipe_file.absolute(recipe_file.load(tmp_path / "learning.yaml"), tmp_path)
    assert facts.known(learning, 2) is None
    assert facts.known(packed, 2) == TOLD


def test_another_pack_or_a_damaged_one_is_asked_about(packed: Recipe) -> None:
    """A launch of a pack with a shard cut short must still be refused before it starts, not by its ranks."""
    facts.remember(packed, 2, TOLD)
    pack = packed.pack("dev-clean")
    (pack / "shard").write_text("soun")
    assert facts.known(packed, 2) is None
    (pack / "shard").unlink()
    (pack / rundir.MANIFEST).unlink()
    pack.rmdir()
    assert facts.known(packed, 2) is None
    seal(pack, "other")
    assert facts.known(packed, 2) is None


def test_a_model_in_a_directory_is_known_by_its_files(packed: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = RECIPE.replace("{kind: tiny-ctc}", f"{{kind: whisper, source: {folder}}}")
    (tmp_path / "stub.yaml").write_text(text)
    recipe = recipe_file.absolute(recipe_file.load(tmp_path / "stub.yaml"), tmp_path)
    facts.remember(recipe, 2, TOLD)
    assert facts.known(recipe, 2) == TOLD
    (folder / "config.json").write_text('{"layers": 2}')
    assert facts.known(recipe, 2) is None


def test_a_model_of_the_hub_is_kept_for_one_revision_only(packed: Recipe) -> None:
    model: dict[str, Any] = {"kind": "whisper", "source": "openai/whisper-tiny.en"}
    open_ended = Recipe.model_validate({**packed.model_dump(), "backbone": model})
    facts.remember(open_ended, 2, TOLD)
    assert facts.known(open_ended, 2) is None
    pinned = Recipe.model_validate({**packed.model_dump(), "backbone": {**model, "revision": "abc"}})
    facts.remember(pinned, 2, TOLD)
    assert facts.known(pinned, 2) == TOLD


def test_a_cache_that_is_damaged_or_cannot_be_written_does_no_harm(
    packed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.remember(packed, 2, TOLD)
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text("{")
    assert facts.known(packed, 2) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "stub.yaml"))
    facts.remember(packed, 2, TOLD)
    assert facts.known(packed, 2) is None
