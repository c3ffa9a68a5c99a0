"""What a person writes in a recipe, and what comes back: values, or a letter with every mistake in it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from launcher.errors import ExitCode, SpeechctlError
from launcher.recipe import Batch, Checkpoint, Data, Recipe, TinyCtc, Wav2Vec2
from launcher.recipe_file import RecipeError, absolute, dump, load
from launcher.recipe_launch import Launch

GOLDEN = Path(__file__).parent / "golden" / "recipe"

VALID = """\
name: tiny-cpu
seed: 7
launch:
  processes: 2
  stop_grace: 2m
data:
  corpus: data/LibriSpeech
  packs: data/packs
  train: [train-clean-100, train-other-500]
  shard_size: 16MiB
backbone:
  kind: tiny-ctc
  hidden: 64
zero_stage: off
precision: fp32
max_steps: 1k
batch:
  step_seconds: 200s
  max_rank_seconds: 50
optimizer:
  learning_rate: 1e-4
  betas: [0.9, 0.98]
evaluate:
  subsets:
    - dev-clean
  every_steps: 100
checkpoint:
  every_steps: 100
"""


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str | bytes, *overrides: str) -> Recipe:
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(Path("x.yaml"), overrides)


def refusal(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.render()


def test_a_recipe_is_read_with_its_units_and_defaults() -> None:
    recipe = read(VALID)
    assert recipe.launch == Launch(processes=2, stop_grace=120)
    assert recipe.data.shard_size == 16 * 2**20
    assert recipe.data.corpus == Path("data/LibriSpeech")
    assert recipe.backbone == TinyCtc(kind="tiny-ctc", hidden=64)
    assert recipe.max_steps == 1000
    assert recipe.batch == Batch(step_seconds=200, max_rank_seconds=50)
    assert recipe.optimizer.learning_rate == 0.0001
    assert recipe.checkpoint == Checkpoint(every_steps=100, keep_last=2)
    assert recipe.zero_stage == "off"


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_transcripts_of_broken_recipes(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(RecipeError) as caught:
        load(Path(golden.name))
    assert caught.value.render() + "\n" == golden.with_suffix(".txt").read_text(encoding="utf-8")


def test_problems_have_places_for_programs() -> None:
    with pytest.raises(RecipeError) as caught:
        read(VALID.replace("seed: 7", "seed: x"), "max_steps=0")
    places = [(p.key, p.spot.line, p.spot.column, p.spot.width, p.spot.source.order) for p in caught.value.problems]
    assert places == [("seed", 1, 6, 1, 0), ("max_steps", 0, 0, 0, 1)]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("12:00:00", 43200),
        ("1-00:00:01", 86401),
        ("90", 90),
        ("1.5", 1.5),
        ("250ms", 0.25),
        ("2h", 7200),
        ("1.5 min", 90),
        ("1e3", 1000),
        ("'30s'", 30),
    ],
)
def test_times(written: str, seconds: float) -> None:
    assert read(VALID, f"batch.step_seconds={written}").batch.step_seconds == seconds


@pytest.mark.parametrize("written", ["12:00", "12:60:00", "0", "-5s", "true", "5 weeks", "5H", "'5'", ".inf", "1e999s"])
def test_times_that_are_refused(written: str) -> None:
    assert "batch.step_seconds: expected" in refusal(VALID, f"batch.step_seconds={written}")


@pytest.mark.parametrize(("written", "count"), [("10k", 10_000), ("1.5M", 1_500_000), ("1e4", 10_000), ("1_000", 1000)])
def test_counts(written: str, count: int) -> None:
    steps = read(VALID, f"max_steps={written}").max_steps
    assert (steps, type(steps)) == (count, int)


@pytest.mark.parametrize("written", ["true", "1.5", "'10'", "0", "1.0005k", "ten", "null", "[1]", "10K"])
def test_counts_that_are_refused(written: str) -> None:
    assert "max_steps: expected" in refusal(VALID, f"max_steps={written}")


@pytest.mark.parametrize(("written", "size"), [("1GB", 10**9), ("3KiB", 3072), ("1GiB", 2**30), ("512", 512)])
def test_sizes(written: str, size: int) -> None:
    assert read(VALID, f"data.shard_size={written}").data.shard_size == size


@pytest.mark.parametrize(
    ("written", "rate"), [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("1", 1.0), ("+2.5e-5", 2.5e-5)]
)
def test_numbers_without_a_dot_are_numbers(written: str, rate: float) -> None:
    assert read(VALID.replace("1e-4", written)).optimizer.learning_rate == rate


def test_words_that_old_yaml_took_for_booleans_stay_words() -> None:
    assert read(VALID, "name=no", "data.train=[on, off, yes, y]").data.train == ["on", "off", "yes", "y"]
    assert read(VALID, "name=no").name == "no"
    assert read(VALID, "name=2024-01-01").name == "2024-01-01"


@pytest.mark.parametrize("written", ["true", "false", "4", "'0'", "on", "null"])
def test_zero_stages_that_are_refused(written: str) -> None:
    """`Literal[1]` takes True for 1, so `zero_stage: true` once was stage 1."""
    assert "zero_stage: expected 'off', 0, 1, 2 or 3, found" in refusal(VALID, f"zero_stage={written}")


@pytest.mark.parametrize("written", ["~/data", "$SCRATCH/data", "a/${USER}", "''", "5", "null"])
def test_paths_are_neither_expanded_nor_guessed(written: str) -> None:
    assert "data.corpus: expected a path" in refusal(VALID, f"data.corpus={written}")


def test_overrides_replace_values_and_make_sections() -> None:
    recipe = read(
        VALID,
        "data.synthesize.dev_utterances=3",
        "evaluate.subsets=[dev-clean, dev-other]",
        "backbone={kind: wav2vec2, source: a=b}",
        "run_dir=/runs/a b",
        "seed=8",
        "seed=9",
        "evaluate.every_steps=",
    )
    assert recipe.data.synthesize is not None
    assert recipe.data.synthesize.dev_utterances == 3
    assert recipe.evaluate.subsets == ["dev-clean", "dev-other"]
    assert recipe.backbone == Wav2Vec2(kind="wav2vec2", source="a=b")
    assert recipe.run_dir == Path("/runs/a b")
    assert recipe.seed == 9
    assert recipe.evaluate.every_steps is None


def test_an_override_mends_a_value_in_the_file() -> None:
    assert read(VALID.replace("max_steps: 1k", "max_steps: wrong"), "max_steps=5").max_steps == 5


def test_transcript_of_broken_overrides() -> None:
    overrides = [
        "batch.step_second=1",
        "max_steps=true",
        "seed",
        "name.x=1",
        "backbone.hidden=[",
        "bacth.x=2",
        "launch=",
    ]
    assert refusal(VALID.replace("precision: fp32", "precision: FP32"), *overrides) == (
        """\
error: x.yaml has 8 errors

x.yaml:15:12: precision: expected 'fp32', 'bf16' or 'fp16', found 'FP32'; did you mean 'fp32'?
 15 | precision: FP32
    |            ^^^^
--set batch.step_second=1: batch.step_second: there is no such key; did you mean 'step_seconds'?
--set max_steps=true: max_steps: expected a whole number, found true
--set seed: expected KEY=VALUE, such as batch.step_seconds=200s
--set name.x=1: name: has a value, and no keys below it
--set backbone.hidden=[: what begins here does not end
    hint: close the quote or bracket
--set bacth.x=2: bacth: there is no such key; did you mean 'batch'?
--set launch=: launch: expected a section with keys below it, found nothing

hint: mend the recipe, then `speechctl recipe check x.yaml`"""
    )


def test_a_key_missing_from_a_section_that_an_override_made() -> None:
    text = VALID.replace("batch:\n  step_seconds: 200s\n  max_rank_seconds: 50\n", "")
    assert "--set batch.step_seconds=9: batch.max_rank_seconds: this key is missing" in refusal(
        text, "batch.step_seconds=9"
    )


def test_a_misspelt_key_is_one_mistake_not_two() -> None:
    assert "x.yaml has 1 error\n" in refusal(VALID.replace("step_seconds", "step_second"))


def test_no_caret_is_lost_in_a_long_line_or_among_control_characters() -> None:
    long = f"schedule: {{hold: 0.4,{' ' * 100}warmup: {'x' * 500}}}"
    _, line, caret = refusal(VALID.replace("seed: 7", long)).splitlines()[2:5]
    assert len(line) < 130
    assert line[caret.index("^") - 8 :] == "warmup: " + "x" * 60
    assert caret.strip(" |") == "^" * 60
    head, line, caret = refusal(VALID.replace("seed: 7", "seed: é\u200bx")).splitlines()[2:5]
    assert head.startswith("x.yaml:2:7: seed: expected a whole number")
    assert line == r"  2 | seed: é\u200bx"
    assert caret == "    |       ^^^^^^^^"
    assert "  2 | trackers: [\\u200b, 5]\n    |                    ^\n" in refusal(
        VALID.replace("seed: 7", "trackers: [\u200b, 5]")
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    Path("tiny-cpu.yaml").write_text(VALID)
    for path, message, hint in [
        ("tiny-gpu.yaml", "tiny-gpu.yaml: there is no such file", "did you mean tiny-cpu.yaml?"),
        ("zzz", "zzz: there is no such file", ". has tiny-cpu.yaml"),
        ("no/such/x.yaml", "no/such/x.yaml: there is no such file", "there is no recipe in no/such"),
        (".", ".: cannot be read: Is a directory", "give the path of a recipe, such as recipes/demo.yaml"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load(Path(path))
        assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, ExitCode.USAGE)


def test_bytes_that_are_no_recipe() -> None:
    assert "x.yaml:2:3: expected UTF-8, found the byte 0xff" in refusal(b"name: a\nb \xff\n")
    assert "x.yaml:1:8: a character that YAML does not allow, U+0001" in refusal(b"name: a\x01\n")
    assert "larger than 1 MiB" in refusal(b"#" * (2**20 + 1))
    assert "nested deeper than 20 levels" in refusal("a: " + "[" * 10_000)
    assert "line breaks and control characters are not read" in refusal(VALID.replace("tiny-cpu", '"a\\ud800"'))
    assert "an escape that names no character" in refusal(VALID.replace("tiny-cpu", '"\\U00110000"'))
    assert "… and 951 more" in refusal("a: &x 1\n" + "a: 1\n" * 991)


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    assert read(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode()) == read(VALID)
    assert "x.yaml:1:7: name: expected text, found 5\n  1 | name: 5\n    |       ^" in refusal(b"\xef\xbb\xbfname: 5\n")


def test_of_two_values_for_a_key_the_first_is_the_one_that_is_judged() -> None:
    assert "x.yaml has 2 errors" in refusal(VALID.replace("seed: 7", "seed: x\nseed: 7"))
    assert "x.yaml has 1 error\n" in refusal(VALID.replace("seed: 7", "seed: 7\nseed: x"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["zero_stage=3", "launch.processes=auto", "name=no", "data.train=['1e5', 'null', '2024-01-01', '0x1F', 1.5s]"],
        ["backbone={kind: wav2vec2, source: 'a: b # c', normalize: true}", "run_dir=/a b/ü/{x}"],
        [
            "backbone={kind: whisper, source: '1e5'}",
            "data.synthesize={}",
            "optimizer.eps=1e-12",
            "trackers=[tensorboard]",
        ],
    ],
)
def test_a_dumped_recipe_loads_as_itself(overrides: list[str]) -> None:
    recipe = read(VALID, *overrides)
    text = dump(recipe)
    assert read(text) == recipe
    assert dump(read(text)) == text
    assert list(Recipe.model_fields) == [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]


def test_a_long_value_is_dumped_on_one_line() -> None:
    path = "/" + "a b " * 100 + "c"
    assert f"run_dir: {path}\n" in dump(read(VALID, f"run_dir={path}"))


def test_absolute_leaves_hub_ids_alone(tmp_path: Path) -> None:
    (tmp_path / "models" / "w2v").mkdir(parents=True)

    def source(written: str) -> str:
        recipe = absolute(read(VALID, f"backbone={{kind: wav2vec2, source: {written}}}"), tmp_path)
        assert isinstance(recipe.backbone, Wav2Vec2)
        return recipe.backbone.source

    assert source("models/w2v") == str(tmp_path / "models" / "w2v")
    assert source("./nowhere") == str(tmp_path / "nowhere")
    assert source("/nowhere") == "/nowhere"
    assert source("facebook/wav2vec2-base") == "facebook/wav2vec2-base"


def test_absolute_fills_in_every_path() -> None:
    recipe = absolute(read(VALID), Path("/base"))
    assert recipe.run_dir == Path("/base/runs/tiny-cpu")
    assert (recipe.data.corpus, recipe.data.packs) == (Path("/base/data/LibriSpeech"), Path("/base/data/packs"))
    assert absolute(recipe, Path("/elsewhere")) == recipe


def test_numbers_in_python_are_strict_too() -> None:
    with pytest.raises(ValidationError):
        Data.model_validate({"corpus": 5, "packs": "p", "train": ["a"]})
    assert Data.model_validate({"corpus": "c", "packs": Path("p"), "train": ["a"]}).packs == Path("p")


@pytest.mark.parametrize("seed", range(300))
def test_any_damage_gives_a_recipe_or_a_letter(seed: int) -> None:
    dice = random.Random(seed)
    text = VALID
    for _ in range(dice.randint(1, 4)):
        at, lines = dice.randrange(len(text)), text.splitlines()
        line = dice.randrange(len(lines))
        text = dice.choice(
            [
                text[:at] + text[at + 1 :],
                text[:at] + text[at] + text[at:],
                text[:at]
                + dice.choice("\t\r\n\0\x85\u2028 :-[]{}&*!|>'\"%@`#,?\\é\U0001f600~<=$9.e_")
                + text[at + 1 :],
                text[:at]
                + dice.choice(["!!x ", "&a ", "*a", "<<: ", '"\\U00110000"', "---\n", "? ", "|\n"])
                + text[at:],
                "\n".join([*lines[:line], *lines[line + 1 :]]),
                "\n".join([*lines[:line], lines[line], *lines[line:]]),
                "\n".join([*lines[:line], dice.choice(lines), *lines[line + 1 :]]),
            ]
        )
    try:
        recipe = read(text)
    except SpeechctlError as e:
        e.render().encode()
    else:
        assert read(dump(recipe)) == recipe


def test_importing_the_reader_leaves_the_heavy_libraries_out() -> None:
    heavy = "torch, numpy, typer, rich, deepspeed, transformers"
    code = f"import launcher.recipe_file, sys; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=GOLDEN.parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_value_in_a_mapping_is_named_by_its_key() -> None:
    """It was `data.weights: expected at least 1, found a section`."""
    said = refusal(VALID, "data.weights={train-clean-100: -2}")
    assert "data.weights.train-clean-100: expected at least 1, found -2" in said
