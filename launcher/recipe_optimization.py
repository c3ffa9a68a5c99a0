"""The recipe's sections on how a model learns: optimizer, learning rate, what is frozen when, adapters, offloading, and
what is handed to DeepSpeed as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from launcher.recipe_values import Count, Decay, Fraction, Section, Span


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

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each part of the model learns at so much of the rate of the part behind it, and the last one, the head, at
    `learning_rate` (BEiT, https://arxiv.org/abs/2106.08254). 1: all at the same rate."""

    ema: Annotated[float, Field(gt=0, lt=1, examples=[0.999])] | None = None
    """Decay of an exponential moving average of the weights, beside them in every checkpoint, 4 bytes for each that
    learns. Evaluations score it, and `evaluate` and `export` take it. After n updates the decay is
    `min(ema, (1 + n) / (10 + n))`, as in TensorFlow's `ExponentialMovingAverage`. Default: none is kept."""

    nonfinite_patience: Count = 10
    """So many steps in a row may be left out because their loss or gradient is not finite: all ranks leave them out
    together, the weights stay as they were, and the step is recorded. One more ends the run."""


class Schedule(Section):
    """Learning rate over the steps: a linear climb, a hold at the peak, and a decay to the last step."""

    kind: Literal["tri-stage", "linear", "cosine"] = "tri-stage"
    """Form of the decay. `tri-stage`: exponential, as fairseq fine-tunes; `linear`; `cosine`: half a wave."""

    warmup: Span = 0.1
    """Steps that climb from `init_scale` to the peak: up to 1 a share of the run, above it a number of steps."""

    hold: Span | None = None
    """Steps at the peak, as a share or a number. Default: 0.4 for `tri-stage`, 0 for the others."""

    init_scale: Fraction | None = None
    """First learning rate, as a share of the peak. Default: 0.01 for `tri-stage`, 0 for the others."""

    final_scale: Fraction | None = None
    """Last learning rate, as a share of the peak. Default: 0.05 for `tri-stage`, 0 for the others."""

    @property
    def shape(self) -> tuple[float, float, float]:
        """`hold`, `init_scale` and `final_scale`, each as said or by default."""
        hold, init, final = (0.4, 0.01, 0.05) if self.kind == "tri-stage" else (0.0, 0.0, 0.0)
        return (
            hold if self.hold is None else self.hold,
            init if self.init_scale is None else self.init_scale,
            final if self.final_scale is None else self.final_scale,
        )

    def stages(self, max_steps: int) -> tuple[float, float]:
        """At which step the climb ends, and at which the decay begins."""
        warmup, hold = (n * max_steps if n <= 1 else n for n in (self.warmup, self.shape[0]))
        return warmup, warmup + hold

    @model_validator(mode="after")
    def _possible(self) -> Schedule:
        hold, _, final = self.shape
        if self.warmup <= 1 and hold <= 1 and self.warmup + hold > 1:
            raise ValueError(f"warmup {self.warmup:g} and hold {hold:g} are more than the whole run")
        if self.kind == "tri-stage" and final == 0:
            raise ValueError("an exponential decay does not reach a final_scale of 0; kinds linear and cosine do")
        return self


class Freeze(Section):
    """Parts of the model that do not learn, for some of the steps or for all. They have no gradient then, and their
    moments stay as they are."""

    parts: Annotated[list[str], Field(min_length=1, examples=["[feature_encoder]"])]
    """Names of parts, from the sound to the head: `feature_encoder`, `encoder`, `layer.0`, …, `decoder`,
    `decoder_layer.0`, …, `head`, as far as the model has them. `layer.*` is all that begin so, `*` is all."""

    but: list[str] = []
    """Parts among these that do learn: `parts: ["*"], but: [head]` trains the head alone."""

    after_steps: Count = 0
    """They learn until so many steps are done."""

    until_steps: Annotated[Count, Field(ge=1)] | None = None
    """They learn again when so many steps are done (fairseq: `freeze_finetune_updates`). Default: never."""

    @property
    def is_forever(self) -> bool:
        return self.after_steps == 0 and self.until_steps is None

    @model_validator(mode="after")
    def _range(self) -> Freeze:
        if self.until_steps is not None and self.until_steps <= self.after_steps:
            raise ValueError(f"until_steps {self.until_steps} is not behind after_steps {self.after_steps}")
        return self


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685, by peft): small matrices learn in the place of large ones,
    which stay as they are. `export` writes an ordinary model with the adapters merged into it."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Inner width of an adapter."""

    alpha: Annotated[int, Field(ge=1)] = 16
    """What an adapter says counts `alpha / rank` times."""

    dropout: Fraction = 0.0
    """Of what goes into an adapter."""

    targets: Annotated[list[str], Field(min_length=1)] = ["q_proj", "v_proj"]
    """Modules that get one, by the last parts of their names. In tiny-ctc they are `qkv`, `out`, `up`, `down`."""

    train: list[str] = []
    """Parts of the model that learn as a whole besides. A fresh CTC head does in any case."""


class Offload(Section):
    """What lies in the host's memory in the place of the device's."""

    optimizer: bool = False
    """Optimizer state and fp32 weights, and the update happens on the CPU, by torch's own fused AdamW: nothing is
    compiled. Needs ZeRO 1, 2 or 3."""

    parameters: bool = False
    """Weights too, fetched as they are needed. Needs ZeRO 3."""

    pin_memory: bool = True
    """Take memory for it that the device copies to and from at full speed, and that is never swapped out."""


# As it stands to DeepSpeed -------------------------------------------------------------------------------------------

OWNED = {
    "train_batch_size": "batch.step_seconds",
    "train_micro_batch_size_per_gpu": "batch.max_rank_seconds",
    "gradient_accumulation_steps": "batch.max_rank_seconds",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
    "bf16.check_grad_overflow": "optimizer.nonfinite_patience",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload.optimizer",
    "zero_optimization.offload_optimizer.pin_memory": "offload.pin_memory",
    "zero_optimization.offload_param.device": "offload.parameters",
    "zero_optimization.offload_param.pin_memory": "offload.pin_memory",
    "activation_checkpointing": "activation_checkpointing",
    "checkpoint": "checkpoint",
    "elasticity": "launch",
    "tensorboard": "trackers",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "managed_gradient_accumulation": "",
}
"""Keys of DeepSpeed's configuration that a recipe says in its own words, and the field that says it; "": none does."""


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    """`a.b.c` of every value and every section."""
    for key, value in tree.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")


def _not_owned(raw: dict[str, Any]) -> dict[str, Any]:
    taken = [key for key in leaves(raw) if key in OWNED]
    if taken:
        said = (f"{key} ({f'say {OWNED[key]}' if OWNED[key] else 'speechctl sets it'})" for key in taken)
        raise ValueError(f"not to be set here: {', '.join(said)}")
    return raw


RawDeepSpeed = Annotated[dict[str, Any], AfterValidator(_not_owned)]


def merged(ours: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`ours` with the values of `raw` over it, section by section."""
    result = dict(ours)
    for key, value in raw.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return result
