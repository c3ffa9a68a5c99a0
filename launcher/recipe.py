"""The recipe: one YAML file that says what one whole run is, and its schema.

Every field is documented under itself, with its unit. Reading the file, overrides and located errors are in
`recipe_file.py`; what a recipe comes to on given hosts is in `plan.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Quantities ----------------------------------------------------------------------------------------------------------

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COUNT = {"k": 10**3, "M": 10**6}


def _with_unit(value: Any, units: dict[str, float], example: str) -> Any:
    """`"2h"` -> 7200 by the table; numbers pass through for pydantic to judge, `1e4` as the whole number it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    if units is _SECONDS and (clock := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value.strip())):
        days, hours, minutes, seconds = (int(g or 0) for g in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]+)", value.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"expected a number, or one with a unit ({', '.join(units)}) such as {example}")
    number = float(match[1]) * units[match[2]]
    return int(number) if number.is_integer() else number


def _plain_path(value: Any) -> Any:
    """Refuses what would silently make a directory of the wrong name."""
    if value == "":
        raise ValueError("expected a path")
    if isinstance(value, str) and re.search(r"^~|\$\w|\$\{", value):
        raise ValueError("expected a path written out: `~` and environment variables are not expanded")
    return value


def _no_bool(value: Any) -> Any:
    """`Literal[1]` takes True for 1."""
    if isinstance(value, bool):
        raise ValueError("expected 'off', 0, 1, 2 or 3")
    return value


Seconds = Annotated[float, BeforeValidator(lambda v: _with_unit(v, _SECONDS, "30s or 02:00:00")), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(lambda v: _with_unit(v, _BYTES, "64MiB")), Field(gt=0)]
Count = Annotated[int, BeforeValidator(lambda v: _with_unit(v, _COUNT, "10k")), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[Path, BeforeValidator(_plain_path), Field(strict=False)]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("expected each subset once; one that is named twice would count twice")
    return names


class Section(BaseModel):
    """A mapping of the recipe. A key that is not in the schema is an error, never ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


# Sections ------------------------------------------------------------------------------------------------------------


class Deadlines(Section):
    """How long a rank may show no progress before the run is taken for hung: stacks are dumped, the rank that differs
    is named, and the attempt ends."""

    start: Seconds = 900
    """From the start of a rank to its first step, or from one sign of progress to the next in between: imports,
    weights, packs, the first meeting of the ranks."""

    step: Seconds = 300
    """Between two signs of progress in a step or an evaluation."""

    save: Seconds = 900
    """Inside the save of a checkpoint."""


class Relaunch(Section):
    """What follows a failure that is not of the recipe's or the code's making: all ranks start again, from the newest
    checkpoint that verifies."""

    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """So many attempts in a row without a new checkpoint end the run (exit 78)."""

    wait: Seconds = 5
    """Before the next attempt; doubled after each further one without a new checkpoint, up to ten minutes."""

    avoid: Seconds = 86400
    """How long a host at which a failure happened is left out, where another can take its place."""


SBATCH_OWN = (
    *("nodes", "ntasks", "ntasks-per-node", "export", "export-file", "requeue", "no-requeue", "open-mode", "signal"),
    *("output", "error", "array", "wrap", "parsable", "test-only", "wait", "chdir", "input"),
)
"""Options of sbatch that the launcher sets itself or cannot work with."""


def _sbatch_option(text: str) -> str:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", text, flags=re.DOTALL)
    if match is None:
        raise ValueError("expected a long option of sbatch, written as one word: --name or --name=value")
    if match[1] in SBATCH_OWN:
        raise ValueError(f"--{match[1]} is set by speechctl or cannot be used here")
    return text


class Slurm(Section):
    """How a job is asked for. What is left out, the cluster decides."""

    partition: str | None = None
    """--partition."""

    account: str | None = None
    """--account."""

    qos: str | None = None
    """--qos."""

    gres: str | None = None
    """--gres for each node, such as `gpu:8`."""

    time: Seconds | None = None
    """--time, the limit of one job. A run that needs longer is saved, requeued and goes on."""

    exclude: str | None = None
    """--exclude, as a SLURM node list: `gpu[03-05]`."""

    warning: Seconds = 180
    """How long before the time limit the ranks are asked to save and stop. SLURM may say it up to a minute early."""

    options: list[Annotated[str, AfterValidator(_sbatch_option)]] = []
    """Any other options of sbatch, each as one word: `--mem=0`, `--constraint=h100`, `--comment=two words`."""


def _secret(text: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=/.+)?", text) is None:
        raise ValueError("expected NAME, or NAME=FILE with the file's absolute path")
    return text


class Launch(Section):
    backend: Literal["local", "ssh", "slurm"] = "local"
    """How the nodes are reached. `local`: this machine. `ssh`: the machines of `hostfile`. `slurm`: a job's."""

    nodes: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """How many hosts to use. ssh: of those in the hostfile, in its order, and the others take the place of one that
    fails; `auto`: all. slurm: how many to ask for."""

    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Ranks on each node. `auto`: one for each GPU, or one where there is none; with slurm, as many as `slurm.gres`
    has GPUs. Over ssh the hostfile says it."""

    hostfile: Location | None = None
    """The machines, a line for each: `gpu-01 slots=8`. The first is the head node, where the ranks meet."""

    include: list[str] = []
    """Use only these hosts and slots of the hostfile, in DeepSpeed's grammar: `gpu-01`, `gpu-02:0,2`, `gpu-0*`."""

    exclude: list[str] = []
    """Leave out these hosts and slots of the hostfile."""

    device: Literal["auto", "cpu"] = "auto"
    """What ranks compute on. `auto`: GPUs, where there are any. `cpu`: leave GPUs alone."""

    stop_grace: Seconds = 120
    """After a request to stop: how long ranks may take to finish their step and seal, before they are killed."""

    secrets: list[Annotated[str, AfterValidator(_secret)]] = []
    """Environment variables for the ranks that nobody else may see: `HF_TOKEN` takes the value from the environment of
    the launcher, `HF_TOKEN=/home/me/.token` from a file. No value is written anywhere; in logs it is blacked out."""

    deadlines: Deadlines = Deadlines()
    """When a rank that shows no progress is taken for hung."""

    relaunch: Relaunch = Relaunch()
    """What follows a failure of the machines."""

    slurm: Slurm = Slurm()
    """How a SLURM job is asked for; the other backends do not look at it."""

    @model_validator(mode="after")
    def _hosts(self) -> Launch:
        if self.backend == "ssh" and self.hostfile is None:
            raise ValueError("backend ssh needs launch.hostfile, the file that names its machines")
        if self.backend == "ssh" and self.processes != "auto":
            raise ValueError("launch.processes is not for backend ssh: there the hostfile says slots=N for each host")
        if self.backend != "ssh" and (self.hostfile or self.include or self.exclude):
            raise ValueError(f"hostfile, include and exclude are of backend ssh, and the backend is {self.backend}")
        if self.backend == "local" and self.nodes not in ("auto", 1):
            raise ValueError("backend local is this machine, one node; launch.nodes is of backends ssh and slurm")
        names = [entry.partition("=")[0] for entry in self.secrets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"secrets names {', '.join(twice)} twice")
        if self.backend == "slurm" and (without := [entry for entry in self.secrets if "=" not in entry]):
            raise ValueError(
                f"a SLURM job has not the environment it was submitted from: give the files of the secrets,"
                f" {without[0]}=/path/of/a/file"
            )
        if self.backend == "slurm" and (waiting := [name for name in self.secrets if "=" not in name]):
            raise ValueError(
                f"under SLURM a secret comes from a file, as {waiting[0]}=/path/of/a/file: what is in the environment"
                " would wait in the queue with the job, where SLURM keeps it"
            )
        if self.backend == "slurm" and self.nodes == "auto":
            raise ValueError("backend slurm needs launch.nodes, how many nodes to ask for")
        if self.backend == "slurm":
            self._time_to_save()
        return self

    def _time_to_save(self) -> None:
        """A job that SLURM ends in the middle of a save is not requeued by anybody."""
        time, warning, grace = self.slurm.time, self.slurm.warning, self.stop_grace
        if time is not None and time <= warning + 60:
            raise ValueError(
                f"slurm.time, {time:g} s, leaves nothing to train in: SLURM may warn slurm.warning, {warning:g} s, and"
                f" 60 s more before that, {warning + 60:g} s in all"
            )
        if warning < grace + 10:
            raise ValueError(
                f"slurm.warning, {warning:g} s, must be longer than launch.stop_grace, {grace:g} s, and 10 s for the"
                f" end of a job: at least {grace + 10:g} s"
            )


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

    train: Annotated[list[Name], AfterValidator(_each_once), Field(min_length=1, examples=["[train-clean-100]"])]
    """Subsets to train on, by LibriSpeech's names: `train-clean-100`, …"""

    min_utterance: Seconds = 0.1
    """Shorter training utterances are left out, and counted."""

    max_utterance: Seconds = 35.0
    """Longer training utterances are left out, and counted. Evaluation leaves nothing out."""

    max_train_utterances: Count | None = None
    """Train on the first so many utterances of the packs. For debugging."""

    shard_size: Bytes = 64 * 2**20
    """Size of one MDS shard."""


class TinyCtc(Section):
    kind: Literal["tiny-ctc"]
    """Log-mel, convolution and transformer with a CTC head, from random weights. About a million parameters."""

    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 144
    """Width of the transformer."""

    layers: Annotated[int, Field(ge=1)] = 4
    """Depth of the transformer."""

    dropout: Fraction = 0.1
    """Everywhere in the transformer."""

    spec_augment: bool = True
    """Mask one span of time and one of frequency in each training utterance (torchaudio)."""


class Wav2Vec2(Section):
    kind: Literal["wav2vec2"]
    """wav2vec 2.0 with a fresh CTC head over LibriSpeech's letters."""

    source: Annotated[str, Field(min_length=1, examples=["facebook/wav2vec2-base"])]
    """A directory in Hugging Face layout, or a hub id."""

    revision: str | None = None
    """Commit of the hub id. Without one a run cannot be repeated for certain."""

    normalize: bool = False
    """Zero mean and unit variance for each utterance: false for base models, true for large-lv60."""

    freeze_feature_encoder: bool = True
    """Keep the convolutional front end as it was pretrained (fairseq: `feature_grad_mult: 0`)."""

    dropout: Fraction = 0.0
    """Attention, hidden and final dropout. fairseq fine-tunes with 0 here and `activation_dropout` 0.1."""

    activation_dropout: Fraction = 0.1
    """Inside the feed-forward layers."""

    layerdrop: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Only 0 for now: layers dropped by each rank's own dice give ranks different graphs, and ZeRO hangs or fails."""

    mask_time_prob: Fraction = 0.65
    """Share of frames covered by masked spans, counted before overlap (fairseq: `mask_prob`)."""

    mask_time_length: Annotated[int, Field(ge=1)] = 10
    """Frames in one masked span of time."""

    mask_channel_prob: Fraction = 0.5
    """Share of channels covered by masked spans, counted before overlap."""

    mask_channel_length: Annotated[int, Field(ge=1)] = 64
    """Channels in one masked span of channels."""


class Whisper(Section):
    kind: Literal["whisper"]
    """Whisper as a sequence-to-sequence model; every input is padded to 30 s, as it was pretrained."""

    source: Annotated[str, Field(min_length=1, examples=["openai/whisper-tiny.en"])]
    """A directory in Hugging Face layout, or a hub id."""

    revision: str | None = None
    """Commit of the hub id. Without one a run cannot be repeated for certain."""

    dropout: Fraction = 0.0
    """Everywhere in encoder and decoder."""

    spec_augment: bool = False
    """Mask one span of time and one of frequency in each training utterance (torchaudio)."""

    max_new_tokens: Annotated[int, Field(ge=1, le=440)] = 200
    """Longest transcript that greedy decoding may write."""


Backbone = Annotated[TinyCtc | Wav2Vec2 | Whisper, Field(discriminator="kind")]


class Batch(Section):
    step_seconds: Annotated[Seconds, Field(examples=["200s"])]
    """Padded audio in one optimizer step, over all ranks and all accumulation. The batch size of the experiment."""

    max_rank_seconds: Annotated[Seconds, Field(examples=["50s"])]
    """The most padded audio one rank holds at once. A matter of memory: accumulation follows from it and the world
    size."""


class Optimizer(Section):
    learning_rate: Annotated[float, Field(gt=0, examples=["1e-4"])]
    """Peak of the schedule. The optimizer is AdamW."""

    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.98]
    """Decay of the first and second moment."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled; on matrices only, never on biases and norms."""

    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


class TriStage(Section):
    """Linear warm-up, hold, exponential decay: fairseq's tri-stage schedule, as shares of the run."""

    warmup: Fraction = 0.1
    """Share of the steps that climb from `init_scale` to the peak."""

    hold: Fraction = 0.4
    """Share of the steps at the peak. The rest decays to `final_scale`."""

    init_scale: Annotated[float, Field(gt=0, le=1)] = 0.01
    """First learning rate, as a share of the peak."""

    final_scale: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Last learning rate, as a share of the peak."""

    @model_validator(mode="after")
    def _shares(self) -> TriStage:
        if self.warmup + self.hold > 1:
            raise ValueError(f"warmup {self.warmup} and hold {self.hold} are more than the whole run")
        return self


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

    mode: Literal["collective"] = "collective"
    """Who computes. `collective`: all ranks share the batches; rank 0 scores and publishes."""

    normalizer: Literal["librispeech", "whisper-english"] = "librispeech"
    """Applied to both sides before words are compared. Numbers under different normalizers cannot be compared."""

    batch_seconds: Seconds = 120
    """Padded audio in one evaluation batch of one rank."""


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

    precision: Literal["fp32", "bf16"] = "fp32"
    """What the forward and backward pass compute in. The optimizer always keeps fp32 weights."""

    max_steps: Annotated[Count, Field(ge=1, examples=["10k"])]
    """Optimizer steps of the whole run."""

    batch: Batch
    """How much audio is in a step."""

    optimizer: Optimizer
    """AdamW."""

    schedule: TriStage = TriStage()
    """Learning rate over the steps."""

    evaluate: Evaluate
    """WER at rank 0's cadence."""

    checkpoint: Checkpoint
    """Sharded checkpoints, sealed or absent."""

    trackers: list[Literal["tensorboard"]] = []
    """Where else rank 0 sends metrics, through Accelerate's trackers."""

    @property
    def run_path(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def pack(self, subset: str) -> Path:
        return self.data.packs / subset

    @property
    def subsets(self) -> list[str]:
        """Every subset the run reads, training first, each once."""
        return list(dict.fromkeys([*self.data.train, *self.evaluate.subsets]))
