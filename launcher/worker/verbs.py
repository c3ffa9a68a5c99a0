"""What the commands of the CLI ask of the worker besides training: each runs in one process and answers on stdout."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from launcher import recipe_file, rundir, sealing, staging
from launcher.errors import DataError, UsageError
from launcher.recipe import Recipe
from launcher.rundir import Run


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pack(options: argparse.Namespace) -> int:
    """Make the corpus where the recipe asks for synthetic speech, then every pack that is not sealed yet."""
    from launcher.worker.pack import write_pack

    recipe = recipe_file.load(options.recipe)
    corpus = recipe.data.corpus
    if recipe.data.synthesize is not None and not corpus.exists():
        from launcher.worker.synthesize import synthesize

        say(f"making synthetic speech in {corpus}")
        wanted = recipe.data.synthesize
        synthesize(corpus, wanted.train_utterances, wanted.dev_utterances, seed=recipe.seed)
    if recipe.data.remote is not None:
        return bring(recipe, recipe.data.remote)
    new = not recipe.data.packs.exists()
    recipe.data.packs.mkdir(parents=True, exist_ok=True)
    answers = []
    try:
        for subset in recipe.subsets:
            target = recipe.pack(subset)
            manifest = write_pack(corpus, subset, target, recipe.data.shard_size, options.processes, say)
            stats = rundir.read_json(target / "stats.json")
            answers.append({"subset": subset, "pack": str(target), "digest": manifest["digest"], **stats})
    finally:
        if new and not any(recipe.data.packs.iterdir()):
            recipe.data.packs.rmdir()
    print(json.dumps(answers))
    return 0


def bring(recipe: Recipe, remote: str) -> int:
    """The small files of packs that are elsewhere."""
    from launcher.worker import pack_reader

    answers = []
    for subset in recipe.subsets:
        target = recipe.pack(subset)
        manifest = pack_reader.bring(f"{remote.rstrip('/')}/{subset}", target)
        say(f"{subset}: shards stay in {remote}")
        stats = rundir.read_json(target / "stats.json")
        answers.append({"subset": subset, "pack": str(target), "digest": manifest["digest"], **stats})
    print(json.dumps(answers))
    return 0


def facts(options: argparse.Namespace) -> int:
    """What the plan needs and only torch or the packs can tell. No weights are loaded."""
    from launcher.worker import learning, vocabularies
    from launcher.worker.data import Utterances
    from launcher.worker.evaluate import check_letters
    from launcher.worker.librispeech import SAMPLE_RATE_HZ
    from launcher.worker.models import skeleton
    from launcher.worker.sampler import Cursor, accumulation, summary
    from launcher.worker.training_set import TrainingSet

    recipe = recipe_file.load(options.recipe)
    model = learning.prepare(skeleton(recipe.backbone, vocabularies.of_recipe(recipe)), recipe)
    data = TrainingSet.open(recipe, model)
    batch, world_size = recipe.batch, options.world_size
    each = accumulation(batch.step_seconds, batch.max_rank_seconds, world_size)
    sampler = data.sampler(recipe)
    try:
        steps = sampler.steps_left(Cursor(0, []), world_size, each)
    except ValueError as error:
        raise UsageError(
            f"the batch does not fit: {error}",
            hint="take fewer ranks; or, in a new run, raise batch.step_seconds and batch.max_rank_seconds, or lower"
            " data.max_utterance",
        ) from error
    audio_s = float(data.samples_in(epoch=0).sum()) / SAMPLE_RATE_HZ
    order = summary(steps, world_size, audio_s)
    answer: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for _, p in model.trained()),
        "utterances": len(data),
        "left_out": data.left_out,
        "audio_s": audio_s,
        "accumulation": each,
        "steps_per_epoch": order.steps,
        "padding": order.waste,
        "straggler": order.straggler,
        "padded_lengths": order.padded_lengths,
        "longest_s": float(sampler.costs[-1]),
        "packs": data.utterances.digest,
    }
    evaluated = Utterances.of(recipe, recipe.evaluate.subsets)
    check_letters(model, evaluated)
    answer["evaluation_utterances"] = len(evaluated)
    print(json.dumps(answer))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """WER of a sealed checkpoint or of an average of several, in this process and in fp32, whatever the run computed
    in."""
    from launcher.worker.data import to_device
    from launcher.worker.evaluate import Evaluator
    from launcher.worker.ranks import Ranks
    from launcher.worker.weights import restored, source_of

    run = Run(options.run)
    ranks = Ranks()
    recipe = recipe_file.load(run.resolved)
    if options.subset:
        cadence = recipe.evaluate.model_copy(update={"subsets": options.subset})
        recipe = recipe.model_copy(update={"evaluate": cadence})
    model = restored(run, options.step, recipe.backbone, recipe.seed, ema=options.ema).eval().to(ranks.device)
    evaluator = Evaluator(recipe, model, ranks)
    source = source_of(run, options.step, ema=options.ema)
    facts: dict[str, Any] = {"mode": "evaluate", "weights": source["weights"], "source": source}
    facts["checkpoint"] = source["checkpoint"]
    search: Any = None
    if options.lm is not None:
        from launcher.worker.beam_search import BeamSearch, Options

        wanted = Options(options.lm, options.beam, options.lm_weight, options.word_score)
        search = BeamSearch(model, wanted)
        facts |= {"decoder": str(wanted), "beam_search": wanted.to_json()}
    say(f"evaluating {_which(options)} on {ranks.device}")
    began = time.monotonic()

    def infer(tensors: Any) -> Any:
        import torch

        with torch.inference_mode():
            tensors = to_device(tensors, ranks.device)
            losses, texts = model(tensors, transcribe=search is None)
            return losses, texts if search is None else search(tensors)

    rows = evaluator.alone(infer, lambda: False)
    assert rows is not None
    facts["lasted_s"] = round(time.monotonic() - began, 3)
    result = evaluator.publish(options.target, source["step"], rows, attempt=0, blocked_s=0.0, **facts)
    print(json.dumps(result))
    return 0


def _which(options: argparse.Namespace) -> str:
    """The weights that a command takes, in words."""
    if len(options.step) > 1:
        return f"the average of {len(options.step)} checkpoints"
    return f"{'the moving average of the weights at ' if options.ema else ''}step {options.step[0]}"


def sidecar(options: argparse.Namespace) -> int:
    """An evaluation of training in this process beside it: of a sealed checkpoint, in the precision of the run."""
    import torch

    from launcher.marks import mark
    from launcher.rundir import Attempt
    from launcher.worker.data import to_device
    from launcher.worker.evaluate import Evaluator
    from launcher.worker.ranks import Ranks
    from launcher.worker.weights import restored

    attempt, step, began = Attempt(options.attempt), options.step, time.monotonic()
    run, ranks = attempt.run, Ranks()
    recipe = recipe_file.load(run.resolved)
    mark("weights")
    ema = recipe.optimizer.ema is not None
    model = restored(run, step, recipe.backbone, recipe.seed, ema=ema).eval().to(ranks.device)
    bf16 = recipe.precision == "bf16"
    if bf16 and recipe.zero_stage != "off":
        model = model.to(torch.bfloat16)  # as DeepSpeed has it; without it, Accelerate computes under autocast
    mark("packs")
    evaluator = Evaluator(recipe, model, ranks)
    mark("begin", "evaluate", step)

    def infer(tensors: Any) -> Any:
        autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16 and recipe.zero_stage == "off")
        with torch.no_grad(), autocast:
            return model(to_device(tensors, ranks.device), transcribe=True)

    def go_on() -> bool:
        mark("batch")
        return False

    rows = evaluator.alone(infer, go_on)
    assert rows is not None
    mark("score")
    facts = {"lasted_s": round(time.monotonic() - began, 3)}
    facts["checkpoint"] = sealing.manifest_of(run.checkpoint(step))["digest"]
    result = evaluator.publish(run.evaluation(step), step, rows, attempt.number, blocked_s=0.0, **facts)
    say(f"step {step}: WER {result['wer']:.2%}")
    return 0


def reshard(options: argparse.Namespace) -> int:
    """Do, in one process and for nobody, what `--ranks` ranks would do to go on from a checkpoint; says what they get.

    Nothing is written: a resume takes what it needs out of the sealed files themselves. The weights are read in two
    ways, DeepSpeed's and ours, and must be the same bits; every element must be there once.

    Raises:
        DataError: the checkpoint does not verify, or does not have all of the model.
        UsageError: the recipe's batch does not fit so many ranks.
    """
    import torch

    from launcher.worker import learning
    from launcher.worker.checkpoint import Progress
    from launcher.worker.sampler import accumulation, utterances_in
    from launcher.worker.shards import Shards, check_coverage
    from launcher.worker.training_set import TrainingSet
    from launcher.worker.weights import restored

    run, world_size = Run(options.run), options.ranks
    recipe, folder = recipe_file.load(run.resolved), run.checkpoint(options.step)
    say(f"reading step {options.step} as {world_size} ranks would")
    model = restored(run, options.step, recipe.backbone, recipe.seed, merged=False)
    learning.freeze_for_ever(model, recipe.freeze)
    manifest = sealing.manifest_of(folder)
    identity, progress = manifest["identity"], Progress.from_json(manifest["progress"])
    if identity["zero_stage"] in ("1", "2", "3"):
        shards = Shards(folder / "deepspeed", int(identity["zero_stage"]), identity["world_size"])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        pieces = (piece for some in shards.pieces.values() for piece in some)
        check_coverage(str(folder), pieces, {name: p.numel() for name, p in trained.items()})
        for name, parameter in trained.items():
            if not torch.equal(shards.read("fp32", name, 0, parameter.numel()), parameter.detach().flatten()):
                raise DataError(
                    f"{folder}: {name} is read in two ways and differs", hint="report it: a bug of speechctl"
                )
    data, batch = TrainingSet.open(recipe, model), recipe.batch
    each = accumulation(batch.step_seconds, batch.max_rank_seconds, world_size)
    try:
        steps = data.sampler(recipe).steps_left(progress.cursor, world_size, each)
    except ValueError as error:
        raise UsageError(f"{world_size} ranks cannot go on: {error}", hint="take fewer ranks") from error
    answer = {
        "step": options.step,
        "saved_by": identity["world_size"],
        "ranks": world_size,
        "zero_stage": identity["zero_stage"],
        "accumulation": each,
        "epoch": progress.cursor.epoch,
        "steps_left_in_epoch": len(steps),
        "utterances_left_in_epoch": sum(map(utterances_in, steps)),
    }
    print(json.dumps(answer))
    return 0


def export(options: argparse.Namespace) -> int:
    """A checkpoint, or the average of several, as a directory that other programs can load; sealed or absent."""
    from launcher.worker.models import write_export
    from launcher.worker.weights import restored, source_of

    run = Run(options.run)
    recipe = recipe_file.load(run.resolved)
    model = restored(run, options.step, recipe.backbone, recipe.seed, ema=options.ema)
    if options.ema or len(options.step) > 1:
        say(f"writing {_which(options)}")
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    with staging.staged(options.target, need) as folder:
        write_export(model, folder)
        source = source_of(run, options.step, ema=options.ema)
        sealing.seal(folder, options.target, {"format": "speechctl.export/1", "source": source})
    print(options.target)
    return 0
