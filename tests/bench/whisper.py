"""What Whisper tiny.en hears of speakers it was not trained on, before and after a short training on an excerpt of
LibriSpeech: by `speechctl launch`, and by Hugging Face's Seq2SeqTrainer on the same batches, steps and rates.

    python -m tests.bench.whisper [--data DIR] [--steps 120] [--folder DIR] [--out build/whisper.json]

Needs a directory with `data/LibriSpeech` and `backbones/whisper-tiny.en` in it (SPEECHCTL_TEST_DATA). Both train on two
ranks on the CPU, in fp32, with one thread each: ours by `recipes/whisper-tiny-en-sample.yaml` with a linear schedule,
the Trainer on the utterances that stand in our ledger, rank by rank and step by step, with the labels, AdamW, clipping
and schedule of the recipe. So what is left between them is the loop: ours weighs all utterances of a step alike, the
Trainer all tokens of a rank's batch. Both write greedily, each by its own code, and `score.py` counts the words of both
under the normalizer `whisper-english`; jiwer counts them again.

With `--folder`, what is done there already is not done again.

Fails where the two differ by more than half a point on a subset, where training with its evaluations took us more than
60 minutes of CPU, where a speaker is on both sides, or where our greedy decoding and that of transformers write other
tokens with the weights that we trained.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from launcher import environment
from launcher.rundir import Run, read_lines
from launcher.worker.score import LEVEL, RESAMPLES, Errors, count, interval, normalizer, total

ROOT = Path(__file__).parents[2]
SUBSETS = ("test-other", "dev-clean")
NORMALIZER = "whisper-english"
RANKS = 2

BAR_POINTS = 0.5
BAR_CPU_S = 3600.0

Row = dict[str, Any]
Heard = dict[str, str]
"""What was heard in an utterance, by its id."""


class Parts:
    """Commands that are each run once in a folder, and the seconds of CPU that all their processes took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "parts.json"
        self.cpu_s: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def once(self, name: str, *argv: str) -> None:
        if name in self.cpu_s:
            return
        env = {**os.environ, **environment.base_variables(1, "cpu"), "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        before = children_s()
        with open(self.folder / f"{name}.log", "w") as log:
            done = subprocess.run([sys.executable, "-m", *argv], env=env, stdout=log, stderr=log, check=False)
        assert done.returncode == 0, (self.folder / f"{name}.log").read_text()[-5000:]
        self.cpu_s[name] = round(children_s() - before, 1)
        self.file.write_text(json.dumps(self.cpu_s))
        print(f"{name:<12} {self.cpu_s[name]:7.1f} s of CPU", flush=True)


def children_s() -> float:
    """User and system, of all descendants that have ended and were waited for."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


# Ours ----------------------------------------------------------------------------------------------------------------


def train(parts: Parts, options: argparse.Namespace) -> Run:
    """Pack, train and export; the last two verbs on the run of the first."""
    folder, data = parts.folder, options.data
    values = {
        "data.corpus": data / "data" / "LibriSpeech",
        "data.packs": folder / "packs",
        "run_dir": folder / "run",
        "backbone.source": data / "backbones" / "whisper-tiny.en",
        "launch.processes": RANKS,
        "max_steps": options.steps,
        "optimizer.learning_rate": options.learning_rate,
        "schedule": "{kind: linear, warmup: 0.1}",
        "evaluate.subsets": f"[{', '.join(SUBSETS)}]",
        "evaluate.normalizer": NORMALIZER,
        "evaluate.at_start": "true",
        "checkpoint.every_steps": options.steps,
    }
    sets = [x for key, value in values.items() for x in ("--set", f"{key}={value}")]
    recipe = str(ROOT / "recipes" / "whisper-tiny-en-sample.yaml")
    parts.once("pack", "launcher.cli", "pack", recipe, *sets)
    parts.once("launch", "launcher.cli", "launch", recipe, *sets)
    parts.once("export", "launcher.cli", "export", str(folder / "run"), str(folder / "export"), "--checkpoint", "last")
    return Run(folder / "run")


def ledger(run: Run) -> list[list[list[str]]]:
    """Utterances of each step and rank."""
    (attempt,) = run.attempts()
    ranks = [[row["ids"] for row in read_lines(attempt.ledger(rank))] for rank in range(RANKS)]
    return [list(step) for step in zip(*ranks, strict=True)]


# The Trainer, and transformers' own decoding --------------------------------------------------------------------------


def beside(parts: Parts, batches: list[list[list[str]]], evaluated: Sequence[str]) -> tuple[Row, Row]:
    """What `whisper_trainer.py` tells: of its training, and of its decoding with our weights."""
    folder = parts.folder
    assert all(batch for step in batches for batch in step), "a rank without an utterance is nothing for the Trainer"
    (folder / "batches.json").write_text(json.dumps({"batches": batches, "evaluated": evaluated}))
    module = "tests.bench.whisper_trainer"
    ranks = ("torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", module)
    parts.once("trainer", *ranks, "train", str(folder))
    parts.once("decode", module, "decode", str(folder))
    return json.loads((folder / "trainer.json").read_text()), json.loads((folder / "decoded.json").read_text())


# Scores --------------------------------------------------------------------------------------------------------------


def speaker(utt_id: str) -> int:
    return int(utt_id.split("-")[0])


def counted(references: Heard, heard: Heard) -> list[Errors]:
    """Of each reference, already normalized, with what was heard, as it was written.

    Raises:
        AssertionError: jiwer, asked for all of them at once, counts otherwise.
    """
    normalize = normalizer(NORMALIZER)
    pairs = [(said, normalize(heard[utt_id])) for utt_id, said in references.items()]
    errors = count(pairs)
    sums, other = total(errors), jiwer.process_words([r for r, _ in pairs], [h for _, h in pairs])
    kinds = ("substitutions", "deletions", "insertions")
    assert [sums[kind] for kind in kinds] == [getattr(other, kind) for kind in kinds] and sums["wer"] == other.wer
    return errors


def difference(speakers: Sequence[int], ours: Sequence[Errors], theirs: Sequence[Errors]) -> Row:
    """In points of WER, and its percentiles over speakers drawn with replacement, the same for both."""
    names, which = np.unique(speakers, return_inverse=True)
    more = np.bincount(which, [a.errors - b.errors for a, b in zip(ours, theirs, strict=True)], len(names))
    words = np.bincount(which, [row.words for row in ours], len(names))
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.quantile(more[drawn].sum(1) / words[drawn].sum(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"points": 100 * more.sum() / words.sum(), "low": 100 * float(low), "high": 100 * float(high)}


def subset_row(references: Heard, of: dict[str, Heard]) -> Row:
    """
    Args:
        of: what was heard, by who heard it: `before`, `speechctl`, `trainer`.
    """
    speakers = [speaker(utt_id) for utt_id in references]
    errors = {name: counted(references, heard) for name, heard in of.items()}
    told: Row = {name: {**total(some), "interval": interval(speakers, some)} for name, some in errors.items()}
    return {**told, "difference": difference(speakers, errors["speechctl"], errors["trainer"])}


def report(run: Run, parts: Parts, options: argparse.Namespace) -> Row:
    batches = ledger(run)
    rows = {step: read_lines(run.hypotheses(step)) for step in (0, options.steps)}
    zero_shot, heard = ({row["utt_id"]: row["text"] for row in rows[step]} for step in rows)
    trainer, decoded = beside(parts, batches, list(heard))
    trained_on = set(map(speaker, flat(batches)))
    metrics = read_lines(run.attempts()[0].metrics)
    assert len(metrics) == options.steps, f"{parts.folder} has another run"
    theirs = trainer["steps"]
    of = {"before": zero_shot, "speechctl": heard, "trainer": trainer["texts"]}
    references = {row["utt_id"]: (row["subset"], row["ref"]) for row in rows[0]}
    sizes = [sum(map(len, step)) for step in batches]
    last = max(1, options.steps // 5)
    return {
        "ranks": RANKS,
        "steps": {"speechctl": len(metrics), "trainer": len(theirs)},
        "utterances": {"in all": sum(sizes), "of a step": sorted(set(sizes)), "different": len(set(flat(batches)))},
        "learning_rate": options.learning_rate,
        "rates_apart": max(abs(a["learning_rate"] - b["learning_rate"]) for a, b in zip(metrics, theirs, strict=True)),
        "mean_loss": {
            name: {"first": mean([row["loss"] for row in some[:last]]), "last": mean([r["loss"] for r in some[-last:]])}
            for name, some in (("speechctl", metrics), ("trainer", theirs))
        },
        "trained_parameters": {
            name: r["trained_parameters"] for name, r in (("speechctl", decoded), ("trainer", trainer))
        },
        "subsets": {
            subset: subset_row({utt_id: ref for utt_id, (its, ref) in references.items() if its == subset}, of)
            for subset in SUBSETS
        },
        "speakers": {
            "trained_on": sorted(trained_on),
            "of both": sorted(trained_on & {speaker(i) for i in references}),
        },
        "decoding": {
            "utterances": len(references),
            "tokens_equal": decoded["token_equal"],
            "texts_equal": sum(heard[i] == decoded["texts"][i] for i in references),
            "trained_alike": sum(heard[i] == trainer["texts"][i] for i in references),
        },
        "cpu_s": parts.cpu_s,
    }


def flat(batches: list[list[list[str]]]) -> list[str]:
    return [utt_id for step in batches for batch in step for utt_id in batch]


def mean(some: Sequence[float]) -> float:
    return sum(some) / len(some)


def missed(result: Row) -> list[str]:
    """What is not as it has to be."""
    found = [
        f"{subset}: {of['difference']['points']:+.2f} points apart"
        for subset, of in result["subsets"].items()
        if abs(of["difference"]["points"]) > BAR_POINTS
    ]
    if result["cpu_s"]["launch"] > BAR_CPU_S:
        found.append(f"{result['cpu_s']['launch'] / 60:.0f} minutes of CPU")
    if result["speakers"]["of both"]:
        found.append(f"trained and evaluated on the same speakers: {result['speakers']['of both']}")
    decoding = result["decoding"]
    if any(decoding[kind] != decoding["utterances"] for kind in ("tokens_equal", "texts_equal")):
        found.append(f"decoding differs from that of transformers: {decoding}")
    if result["rates_apart"] > 1e-6 * result["learning_rate"]:
        found.append(f"the learning rates are {result['rates_apart']:.1e} apart")
    return found


def show(result: Row) -> None:
    utterances, decoding, losses = result["utterances"], result["decoding"], result["mean_loss"]
    sizes = " or ".join(map(str, utterances["of a step"]))
    print(f"{result['steps']['speechctl']} steps of {sizes} utterances on {RANKS} ranks, the same in both;", end=" ")
    print(f"{utterances['different']} utterances of speakers {result['speakers']['trained_on']}")
    for subset, of in result["subsets"].items():
        print(f"{subset}: {of['before']['words']} words of {of['before']['interval']['speakers']} speakers")
        for name in ("before", "speechctl", "trainer"):
            row = of[name]
            kinds = f"{row['substitutions']} sub, {row['insertions']} ins, {row['deletions']} del"
            between = f"{100 * row['interval']['low']:.2f} … {100 * row['interval']['high']:.2f}"
            print(f"  {name:<10} WER {100 * row['wer']:5.2f} %   {between:<14}   {kinds}")
        apart = of["difference"]
        print(f"  difference {apart['points']:+.2f} points   {apart['low']:+.2f} … {apart['high']:+.2f}")
    for name, loss in losses.items():
        print(f"loss of {name}: {loss['first']:.4f} in the first fifth of the steps, {loss['last']:.4f} in the last")
    print(
        f"of {decoding['utterances']} utterances, transformers writes the same tokens as we do with our weights in"
        f" {decoding['tokens_equal']}; both trainings end in the same text in {decoding['trained_alike']}"
    )
    spent = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in result["cpu_s"].items())
    print(f"minutes of CPU: {spent}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPEECHCTL_TEST_DATA"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--folder", type=Path, help="where packs, run and logs stay; else they are removed")
    parser.add_argument("--out", type=Path, default=Path("build/whisper.json"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data, or SPEECHCTL_TEST_DATA, is needed: a directory with data/ and backbones/")
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        parts = Parts(folder.resolve())
        result = report(train(parts, options), parts, options)
    show(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for problem in (problems := missed(result)):
        print(f"missed: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
