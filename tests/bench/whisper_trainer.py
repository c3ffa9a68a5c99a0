"""What `whisper.py` sets beside ours: transformers' Seq2SeqTrainer on the utterances of our ledger, and transformers'
greedy decoding of what we trained.

    torchrun … -m tests.bench.whisper_trainer train FOLDER      on every rank; writes trainer.json
    python -m tests.bench.whisper_trainer decode FOLDER         writes decoded.json

FOLDER has `run` with its resolved recipe, `export`, and `batches.json`: the utterances of each step and rank. `train`
takes the recipe's figures, sound and text; no code of ours makes its features or batches, trains, or writes what it
heard.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch.utils.data import DataLoader

from launcher import recipe as schema
from launcher import recipe_file
from launcher.worker import shims
from launcher.worker.whisper import WhisperModel

shims.apply()  # before transformers, which imports torchaudio

from transformers import (  # noqa: E402
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

SAMPLE_RATE_HZ = 16_000


class Speech(torch.utils.data.Dataset[dict[str, Any]]):
    """Utterances of a LibriSpeech tree, by their ids."""

    def __init__(self, source: str, corpus: Path, ids: Iterable[str], case: str) -> None:
        self.ids = list(ids)
        self.extractor = WhisperFeatureExtractor.from_pretrained(source)
        self.tokenizer = WhisperTokenizerFast.from_pretrained(source)
        self.files = {path.stem: path for path in corpus.rglob("*.flac")}
        lines = (line for path in corpus.rglob("*.trans.txt") for line in path.read_text().splitlines())
        said = (line.split(" ", 1) for line in lines)
        self.texts = {utt_id: text.lower() if case == "lower" else text for utt_id, text in said}

    def __len__(self) -> int:
        return len(self.ids)

    def sound(self, index: int) -> Any:
        waveform, rate = soundfile.read(self.files[self.ids[index]], dtype="float32")
        assert rate == SAMPLE_RATE_HZ
        return waveform

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self.extractor(self.sound(index), sampling_rate=SAMPLE_RATE_HZ).input_features[0]
        # With a blank in front, as Whisper itself begins, and as we label it.
        return {"input_features": features, "labels": self.tokenizer(f" {self.texts[self.ids[index]]}").input_ids}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As in transformers' examples/pytorch/speech-recognition/run_speech_recognition_seq2seq.py."""
        batch = self.extractor.pad([{"input_features": row["input_features"]} for row in rows], return_tensors="pt")
        labels = self.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        padded = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        if (padded[:, 0] == self.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")).all():
            padded = padded[:, 1:]
        return {"input_features": batch["input_features"], "labels": padded}


class InOurOrder(Seq2SeqTrainer):  # type: ignore[misc]
    batches: list[list[int]]
    """Of this rank."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)


def train(folder: Path, recipe: schema.Recipe, batches: list[list[list[str]]], evaluated: list[str]) -> dict[str, Any]:
    backbone, options = recipe.backbone, recipe.optimizer
    assert isinstance(backbone, schema.Whisper) and recipe.schedule.kind == "linear"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ids = sorted({utt_id for step in batches for batch in step for utt_id in batch})
    numbers = {utt_id: number for number, utt_id in enumerate(ids)}
    corpus = recipe.data.corpus
    data = Speech(backbone.source, corpus, ids, backbone.case)
    heard = Speech(backbone.source, corpus, evaluated, backbone.case)
    model = WhisperForConditionalGeneration.from_pretrained(backbone.source, dtype=torch.float32)
    (utterances,) = {len(batch) for step in batches[:1] for batch in step}
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "trainer"),
        seed=recipe.seed,
        max_steps=len(batches),
        per_device_train_batch_size=utterances,
        per_device_eval_batch_size=4,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.schedule.stages(len(batches))[0]),
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_epsilon=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.grad_clip,
        predict_with_generate=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        # Whisper's loss is the mean over a rank's tokens whatever the Trainer asks for (5.23), and would be multiplied
        # with the number of ranks.
        average_tokens_across_devices=False,
    )
    trainer = InOurOrder(model=model, args=arguments, train_dataset=data, data_collator=data.collate)
    trainer.batches = [[numbers[utt_id] for utt_id in step[rank]] for step in batches]
    assert world_size == len(batches[0]) and trainer.accelerator.num_processes == world_size

    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row and "grad_norm" in row]
    # Ranks that ran out of utterances repeat the first ones, behind all others.
    tokens = trainer.predict(heard, max_new_tokens=backbone.max_new_tokens).predictions[: len(heard)]
    tokens[tokens == -100] = heard.tokenizer.pad_token_id
    texts = heard.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return {
        "texts": {utt_id: text.strip() for utt_id, text in zip(evaluated, texts, strict=True)},
        "steps": steps,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@torch.no_grad()
def decode(folder: Path, recipe: schema.Recipe, evaluated: list[str]) -> dict[str, Any]:
    """The tokens that transformers writes by `generate` alone, one utterance at a time, beside those that our model
    has it write, four at a time."""
    backbone = recipe.backbone
    assert isinstance(backbone, schema.Whisper)
    source = str(folder / "export")
    data = Speech(source, recipe.data.corpus, evaluated, backbone.case)
    plain = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    ours = WhisperModel(backbone.model_copy(update={"source": source})).eval()
    made: list[Any] = []
    generate = ours.model.generate

    def kept(*arguments: Any, **options: Any) -> Any:
        made.extend((tokens := generate(*arguments, **options)).tolist())
        return tokens

    ours.model.generate = kept
    config = plain.generation_config
    special = {config.decoder_start_token_id, config.no_timestamps_token_id, config.eos_token_id}
    theirs, texts = [], []
    for number in range(len(data)):
        features = data.extractor(data.sound(number), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
        (tokens,) = plain.generate(features, max_new_tokens=backbone.max_new_tokens).tolist()
        theirs.append([t for t in tokens if t not in special])
        texts.append(data.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    for begin in range(0, len(data), 4):
        few = range(begin, min(begin + 4, len(data)))
        ours(ours.collate([data.sound(i) for i in few], [data.texts[data.ids[i]] for i in few]), transcribe=True)
    equal = sum([t for t in tokens if t not in special] == other for tokens, other in zip(made, theirs, strict=True))
    trained = sum(p.numel() for _, p in ours.trained())
    return {"token_equal": equal, "texts": dict(zip(evaluated, texts, strict=True)), "trained_parameters": trained}


def main() -> int:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    recipe = recipe_file.load(folder / "run" / "resolved.yaml")
    told = json.loads((folder / "batches.json").read_text())
    if verb == "decode":
        (folder / "decoded.json").write_text(json.dumps(decode(folder, recipe, told["evaluated"])))
        return 0
    result = train(folder, recipe, told["batches"], told["evaluated"])
    if os.environ["RANK"] == "0":
        (folder / "trainer.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
