"""What ranks need around them on this host, and what is refused before a run is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher import environment, new_run, recipe_file
from launcher.errors import PreflightError
from launcher.hosts import Host

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("3", 1), ("0,2,5", 3), ("GPU-5f3a", 1)])
def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.gpu_count() == count


def test_the_users_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment.base_variables(2)["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert re.fullmatch("[1-9][0-9]*", environment.base_variables(10**6)["OMP_NUM_THREADS"])


def test_cpu_leaves_the_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert environment.gpu_count("cpu") == 0
    variables = environment.rank_variables("local", 2, "cpu")
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["DS_ACCELERATOR"]) == ("", "cpu")
    assert environment.rank_variables("local", 2, "auto")["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_each_rank_needs_a_gpu_of_its_own() -> None:
    recipe = recipe_file.load(RECIPES / "demo.yaml", ["trackers=[]"])
    environment.check(recipe, [Host("localhost", 2)], gpus=2)
    environment.check(recipe, [Host("localhost", 2)], gpus=0)
    with pytest.raises(PreflightError, match="2 ranks, and this machine shows 1 GPU") as caught:
        environment.check(recipe, [Host("localhost", 2)], gpus=1)
    assert "launch.processes=1" in caught.value.hint and "launch.device=cpu" in caught.value.hint


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have failed on rank 0 after the model was built, as an ImportError in a log."""
    recipe = recipe_file.load(RECIPES / "demo.yaml", ["trackers=[tensorboard]"])
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    with pytest.raises(PreflightError, match="tensorboard"):
        environment.check(recipe, [Host("localhost", 2)], gpus=0)


def test_what_a_run_was_made_from_is_recorded_without_git_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    value = new_run.provenance({"packs": "0f"})
    assert value["code"] == {"revision": None, "changed": []}
    assert value["packs"] == "0f" and value["packages"]["torch"]
