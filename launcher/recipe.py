"""The recipe: one YAML file that says what one whole run is, and its schema.

Every field is documented under itself, with its unit. The section `launch` is in `recipe_launch.py`, `backbone` in
`recipe_backbone.py`, how a model learns in `recipe_optimization.py`, units are in `recipe_values.py`; reading the file,
overrides and located errors are in `recipe_file.py`; what a recipe comes to on given hosts is in `plan.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from launcher.recipe_backbone import Backbone as Backbone
from launcher.recipe_backbone import Characters as Characters
from launcher.recipe_backbone import Letters as Letters
from launcher.recipe_backbone import SentencePiece as SentencePiece
from launcher.recipe_backbone import TinyCtc as TinyCtc
from launcher.recipe_backbone import Vocabulary as Vocabulary
from launcher.recipe_backbone import Wav2Vec2 as Wav2Vec2
from launcher.recipe_backbone import Whisper as Whisper
from launcher.recipe_backbone import WhisperCtc as WhisperCtc
from launcher.recipe_feed import Augment, Feed
from launcher.recipe_launch import Launch
from launcher.recipe_optimization import Freeze, Lora, Offload, Optimizer, RawDeepSpeed, Schedule
from launcher.recipe_values import Bytes, Count, Fraction, Location, Name, Seconds, Section


def _no_bool(value: Any) -> Any:
    """`Literal[1]` takes True for 1."""
    if isinstance(value, bool):
        raise ValueError("expected 'off', 0, 1, 2 or 3")
    return value


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("expected each subset once; one that is named twice would count twice")
    return names


class Synthesize(Section):
    train_utterances: Count = 600
    """Sentences for training, spoken by the training voices."""

    dev_utterances: Count = 60
    """Other sentences, spoken by other voices, for evaluation."""


class Data(Section):
    corpus: Annotated[Location, Field(examples=["data/LibriSpeech"])]
    """The root of a LibriSpeech tree: the directory that holds `train-clean-100` and its like."""

    synthesize: Synthesize | None = None
    """Make `corpus` from synthetic speech where it does not exist (needs the extra `demo`)."""

    packs: Annotated[Location, Field(examples=["data/packs"])]
    """Where the packs are: one directory for each subset."""

    remote: Annotated[str, Field(pattern=r"^(/|[a-z][a-z0-9+.-]*://.)")] | None = None
    """Where sealed packs are whose shards each node fetches as it needs them: an absolute path of a file system that
    all see, or a URL (`file://…`, or one that mosaicml-streaming downloads from, such as `s3://…`). `pack` then only
    brings their small files to `packs`."""

    train: Annotated[list[Name], AfterValidator(_each_once), Field(min_length=1, examples=["[train-clean-100]"])]
    """Subsets to train on, by LibriSpeech's names: `train-clean-100`, …"""

    weights: dict[Name, Annotated[int, Field(ge=1, le=1000)]] = {}
    """How often an epoch has each utterance of a subset, where not once: `{train-clean-100: 3, train-other-500: 1}`.
    Augmentation makes each time another."""

    min_utterance: Seconds = 0.1
    """Shorter training utterances are left out, and counted."""

    max_utterance: Seconds = 35.0
    """Longer training utterances are left out, and counted. Evaluation leaves nothing out."""

    max_train_utterances: Count | None = None
    """Train on the first so many utterances of the packs. For debugging."""

    shard_size: Bytes = 64 * 2**20
    """Size of one MDS shard."""

    @model_validator(mode="after")
    def _weights(self) -> Data:
        if others := sorted(self.weights.keys() - set(self.train)):
            raise ValueError(f"weights has {', '.join(others)}, and train has not; expected subsets of train")
        return self


class Batch(Section):
    step_seconds: Annotated[Seconds, Field(examples=["200s"])]
    """Padded audio in one optimizer step, over all ranks and all accumulation. The batch size of the experiment."""

    max_rank_seconds: Annotated[Seconds, Field(examples=["50s"])]
    """The most padded audio one rank holds at once. A matter of memory: accumulation follows from it and the world
    size."""

    padded_lengths: Annotated[int, Field(ge=1, le=4096)] = 80
    """Batches are padded to at most so many different lengths. Fewer: fewer shapes to compile or tune for, and more
    padding: on train-clean-100, 64 pad 1.1%, 80 0.9%, 24 2.6%."""

    quadratic_seconds: Seconds | None = None
    """An utterance of T padded seconds counts as T + T²/this in `step_seconds` and `max_rank_seconds`, since attention
    takes memory and time by the square. Default: as T."""


class EarlyStopping(Section):
    patience: Annotated[Count, Field(ge=1, examples=[5])]
    """End the run when so many evaluations in a row have not brought a lower WER, by `best_on`."""

    min_delta: Fraction = 0.0
    """A WER is lower when it is lower by more than this: 0.001 is a tenth of a percentage point."""


class Evaluate(Section):
    subsets: Annotated[list[Name], AfterValidator(_each_once), Field(min_length=1, examples=["[dev-clean]"])]
    """Subsets to evaluate on; WER is over all of them together, and for each."""

    every_steps: Annotated[Count, Field(ge=1)] | None = None
    """Evaluate after every so many steps."""

    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Evaluate after every so many epochs."""

    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Evaluate when rank 0's clock says that so many minutes have passed since the last one ended."""

    after_steps: Count = 0
    """No evaluation by cadence before this step."""

    at_start: bool = False
    """Also before the first step: what the backbone can do untrained."""

    at_end: bool = True
    """Also after the last step."""

    mode: Literal["collective", "rank0", "sidecar"] = "collective"
    """Who computes; rank 0 scores and publishes, and the WER is the same. `collective`: all ranks share the batches.
    `rank0`: rank 0 alone, while the others wait. `sidecar`: a process beside rank 0 evaluates a checkpoint, sealed at
    each evaluation, while training goes on; whatever becomes of that process, training is not touched."""

    sidecar_device: Literal["cpu"] | Annotated[int, Field(ge=0, strict=True)] = "cpu"
    """What a sidecar computes on: `cpu`, or the number of a GPU of rank 0's machine that no rank trains on."""

    best_on: Name | None = None
    """The subset whose WER decides which checkpoint is the best, and early stopping. Default: all subsets together."""

    early_stopping: EarlyStopping | None = None
    """End the run when evaluations no longer bring a lower WER. Default: it goes on to `max_steps`."""

    normalizer: Literal["librispeech", "whisper-english"] = "librispeech"
    """Applied to both sides before words are compared. Numbers under different normalizers cannot be compared."""

    batch_seconds: Seconds = 120
    """Padded audio in one evaluation batch of one rank."""

    @model_validator(mode="after")
    def _names(self) -> Evaluate:
        if self.best_on is not None and self.best_on not in self.subsets:
            raise ValueError(f"best_on {self.best_on} is none of the subsets to evaluate on: {', '.join(self.subsets)}")
        never = not (self.every_steps or self.every_epochs or self.every_minutes)
        if self.early_stopping is not None and never:
            raise ValueError("early_stopping needs evaluations: set every_steps, every_epochs or every_minutes")
        return self


class Checkpoint(Section):
    every_steps: Annotated[Count, Field(ge=1, examples=[200])]
    """Seal a checkpoint after every so many steps; also at every new best WER, at a stop and at the end."""

    keep_last: Annotated[int, Field(ge=2)] = 2
    """How many of the newest to keep. Only those that verify count, here and below."""

    keep_best: Annotated[int, Field(ge=1)] = 1
    """How many of those with the lowest WER to keep besides."""

    keep_every_steps: Annotated[Count, Field(ge=1, examples=["10k"])] | None = None
    """Keep every checkpoint of a step that this divides. Default: none for that reason alone."""

    asynchronous: Annotated[bool, Field(strict=True)] = True
    """Copy the state to host memory and train on while it is written, hashed and sealed. Takes as much host memory on
    each rank as its share of a checkpoint has bytes. Off: training waits until it is sealed."""


class Recipe(Section):
    """One whole run."""

    name: Annotated[Name, Field(examples=["my-run"])]
    """What the run is called; `run_dir` follows from it."""

    run_dir: Location | None = None
    """Where the run lies, on a file system that all nodes share. Default: `runs/NAME`."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Of the initial weights, the order of utterances, dropout and augmentation."""

    launch: Launch = Launch()
    """Where the ranks run."""

    data: Data
    """Corpus and packs."""

    backbone: Backbone
    """The model."""

    zero_stage: Annotated[Literal["off", 0, 1, 2, 3], BeforeValidator(_no_bool)] = 2
    """What DeepSpeed shards over the ranks: 1 optimizer state, 2 gradients too, 3 parameters too, 0 nothing.
    `off`: no DeepSpeed; the same loop on Accelerate."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the forward and backward pass compute in. The optimizer always keeps fp32 weights. fp16 scales the loss, by
    as much as gradients bear, and needs a GPU."""

    max_steps: Annotated[Count, Field(ge=1, examples=["10k"])]
    """Optimizer steps of the whole run."""

    batch: Batch
    """How much audio is in a step."""

    feed: Feed = Feed()
    """How batches are made ahead of the step."""

    augment: Augment = Augment()
    """What is changed in the sound of training utterances."""

    optimizer: Optimizer
    """AdamW."""

    schedule: Schedule = Schedule()
    """Learning rate over the steps."""

    freeze: list[Freeze] = []
    """Parts of the model that do not learn, and for how long."""

    lora: Lora | None = None
    """Train low-rank adapters, and not the model itself."""

    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute the rest once more on the way back: less memory, about a third
    more time."""

    offload: Offload = Offload()
    """What lies in the host's memory."""

    deepspeed: RawDeepSpeed = {}
    """Any other keys of DeepSpeed's configuration, laid over ours: `zero_optimization: {overlap_comm: true}`. Keys that
    the recipe has words of its own for are refused; when the ranks start, those that DeepSpeed does not know, but for
    those in sections that it does not check, such as `flops_profiler`."""

    evaluate: Evaluate
    """WER at rank 0's cadence."""

    checkpoint: Checkpoint
    """Sharded checkpoints, sealed or absent."""

    trackers: list[Literal["tensorboard"]] = []
    """Where else rank 0 sends metrics, through Accelerate's trackers."""

    # A field that has mistakes of its own is not in `info.data`.

    @field_validator("schedule")
    @classmethod
    def _fits_the_run(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        max_steps = info.data.get("max_steps")
        if max_steps is not None and (peak_ends := schedule.stages(max_steps)[1]) > max_steps:
            raise ValueError(f"warmup and hold take {peak_ends:g} steps, and max_steps is {max_steps}")
        return schedule

    @field_validator("offload")
    @classmethod
    def _has_what_to_offload(cls, offload: Offload, info: ValidationInfo) -> Offload:
        stage = info.data.get("zero_stage", 3)
        if offload.optimizer and stage in ("off", 0):
            raise ValueError(f"offload.optimizer needs zero_stage 1, 2 or 3, and it is {stage}")
        if offload.parameters and stage != 3:
            raise ValueError(f"offload.parameters needs zero_stage 3, and it is {stage}")
        return offload

    @field_validator("deepspeed")
    @classmethod
    def _has_deepspeed(cls, raw: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if raw and info.data.get("zero_stage") == "off":
            raise ValueError("these keys are for DeepSpeed, and zero_stage is off")
        return raw

    @property
    def run_path(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def pack(self, subset: str) -> Path:
        return self.data.packs / subset

    @property
    def subsets(self) -> list[str]:
        """Every subset the run reads, training first, each once."""
        return list(dict.fromkeys([*self.data.train, *self.evaluate.subsets]))
