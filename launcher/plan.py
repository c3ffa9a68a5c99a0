"""(recipe, hosts, facts) -> Plan: what `launch` would do, as a value. Pure: no disk, no clock, no environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher import environment
from launcher.backends import ARGV, slurm
from launcher.hosts import Host
from launcher.recipe import Recipe
from launcher.recipe_optimization import merged
from launcher.rundir import Attempt, Run


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on given hosts."""

    name: str
    run_dir: str
    backend: str
    hosts: list[Host]
    world_size: int
    accumulation: int
    """Micro-batches that each rank adds up in one optimizer step."""
    micro_batch_seconds: float
    """Most padded audio that a rank computes at once."""
    step_seconds: float
    max_steps: int
    steps_per_epoch: int
    epochs: float
    utterances: int
    evaluation_utterances: int
    left_out: dict[str, int]
    audio_hours: float
    padding: float
    """Share of the padded audio that is padding."""
    straggler: float
    """Mean over steps of the longest micro-batch over the mean one: 1 is no waiting."""
    parameters: int
    trained_parameters: int
    state_bytes_per_rank: int
    """Weights, gradients and optimizer state; activations come on top and depend on the batch."""
    checkpoint_bytes: int
    files: list[str]
    """What is written before any rank starts."""
    commands: list[list[str]]
    """For each node, how it is started; under slurm first the one that asks for the job."""
    deepspeed: dict[str, Any] | None
    host_bytes_per_rank: int = 0
    """Model states that lie in the host's memory: what is offloaded."""
    notes: list[str] = field(default_factory=list)
    """What a person should know before saying yes."""
    padded_lengths: int | None = None
    """How many different lengths batches are padded to; None: an older plan."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "hosts": [h.to_json() for h in self.hosts]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Plan:
        return Plan(**{**value, "hosts": [Host.from_json(h) for h in value["hosts"]]})


def make(recipe: Recipe, hosts: Sequence[Host], facts: Mapping[str, Any]) -> Plan:
    """
    Args:
        facts: what `-m launcher.worker facts` printed for this recipe and world size.
    """
    world_size = sum(h.slots for h in hosts)
    accumulation = int(facts["accumulation"])
    weights, trained = int(facts["parameters"]), int(facts["trained_parameters"])
    state, on_host, saved = state_bytes(recipe, weights, trained, world_size)
    run = Run(recipe.run_path)
    attempt = Attempt(run.attempts_dir / "0001")
    files = [run.recipe, run.resolved, run.plan, run.provenance, *[run.deepspeed] * (recipe.zero_stage != "off")]
    files += [attempt.env, attempt.hosts, attempt.interpreter, attempt.pythonpath, attempt.node_script]
    asked = [slurm.sbatch(recipe, run)] if recipe.launch.backend == "slurm" else []
    start = ARGV[recipe.launch.backend]
    return Plan(
        name=recipe.name,
        run_dir=str(recipe.run_path),
        backend=recipe.launch.backend,
        hosts=list(hosts),
        world_size=world_size,
        accumulation=accumulation,
        micro_batch_seconds=recipe.batch.step_seconds / (world_size * accumulation),
        step_seconds=recipe.batch.step_seconds,
        max_steps=recipe.max_steps,
        steps_per_epoch=facts["steps_per_epoch"],
        epochs=recipe.max_steps / facts["steps_per_epoch"],
        utterances=facts["utterances"],
        evaluation_utterances=facts["evaluation_utterances"],
        left_out=facts["left_out"],
        audio_hours=facts["audio_s"] / 3600,
        padding=facts["padding"],
        straggler=facts["straggler"],
        parameters=weights,
        trained_parameters=trained,
        state_bytes_per_rank=state,
        host_bytes_per_rank=on_host,
        checkpoint_bytes=saved,
        files=[str(path) for path in files],
        commands=[*asked, *(start(attempt, k, host) for k, host in enumerate(hosts))],
        deepspeed=None if recipe.zero_stage == "off" else deepspeed_config(recipe, accumulation, trained),
        notes=notes_on_job(recipe) if recipe.launch.backend == "slurm" else [],
        padded_lengths=facts.get("padded_lengths"),
    )


def notes_on_job(recipe: Recipe) -> list[str]:
    launch = recipe.launch
    notes = ["node-000 and so on stand for the nodes that SLURM will give"]
    if launch.processes == "auto" and launch.device != "cpu" and not environment.gpus_of_gres(launch.slurm.gres):
        notes.append("one rank a node: launch.processes is auto, and launch.slurm.gres names no GPUs")
    if not any(o.startswith(("--exclusive", "--cpus-per-task", "--cpus-per-gpu")) for o in launch.slurm.options):
        notes.append(
            "processors: as many as SLURM gives to one task, which is one at many sites; launch.slurm.options takes"
            " --exclusive or --cpus-per-task=N"
        )
    return notes


def state_bytes(recipe: Recipe, weights: int, trained: int, world_size: int) -> tuple[int, int, int]:
    """(bytes of model states on one rank's device, in its host's memory, and of a checkpoint over all ranks).

    ZeRO paper, §3: with mixed precision 2 bytes a weight, 2 a gradient, 12 of optimizer state (fp32 weight and two
    moments), and 4 more for a moving average of the weights; stage 1 shares out the optimizer state, 2 the gradients
    too, 3 the weights too. In fp32 without ZeRO the weights are their own master copy. Offloading an optimizer takes a
    rank's share of the gradients along in fp32.
    """
    stage = 0 if recipe.zero_stage == "off" else recipe.zero_stage
    mixed = recipe.precision != "fp32" and recipe.zero_stage != "off"
    unit = 2 if mixed else 4
    optimizer = (12 if mixed or stage >= 1 else 8) + (0 if recipe.optimizer.ema is None else 4)
    of_weights = weights * unit / (world_size if stage >= 3 else 1)
    of_optimizer = trained * optimizer / (world_size if stage >= 1 else 1)
    device = of_weights + trained * unit / (world_size if stage >= 2 else 1) + of_optimizer
    host = 0.0
    if recipe.offload.optimizer:
        device, host = device - of_optimizer, of_optimizer + trained * 4 / world_size
    if recipe.offload.parameters:
        device, host = device - of_weights, host + of_weights
    saved = trained * optimizer + (weights * unit if stage < 3 else (weights - trained) * unit)
    return int(device), int(host), int(saved)


def deepspeed_config(recipe: Recipe, accumulation: int, trained: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. The optimizer is ours, and so is the learning rate."""
    # DeepSpeed allocates the whole bucket, 5e8 elements unless told otherwise, for the smallest of models.
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "reduce_bucket_size": max(1, min(5 * 10**8, trained))}
    offload = recipe.offload
    for name, is_on in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if is_on:
            zero[name] = {"device": "cpu", "pin_memory": offload.pin_memory}
    # Its own Adam for the CPU is compiled at the first start, for minutes, where there is a compiler.
    alone = {"zero_force_ds_cpu_optimizer": False} if offload.optimizer else {}
    mixed = recipe.precision != "fp32"
    # Without this, micro-batches are added up in bf16, and one GPU loses bits that eight keep. Stages 0 and 1 would
    # get another optimizer by it.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if mixed and recipe.zero_stage in (2, 3) else {}
    ours = {
        # Batches are cut by seconds, not by count: the sampler feeds them, DeepSpeed only counts micro-batches.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.grad_clip,
        "zero_optimization": zero,
        **alone,
        "bf16": {"enabled": recipe.precision == "bf16"},
        **({"fp16": {"enabled": True}} if recipe.precision == "fp16" else {}),
        **sums,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return merged(ours, recipe.deepspeed)
