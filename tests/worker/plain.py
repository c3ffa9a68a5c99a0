"""What plain transformers hears with a directory that `export` wrote, and what the model of ours hears."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from launcher.worker.backbone import CtcModel, SpeechModel

PLAIN = """
import json, sys
try:
    import torchaudio
except (ImportError, OSError, RuntimeError):  # a build for CUDA beside a torch for CPUs; transformers needs it not
    sys.modules["torchaudio"] = None
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer
from transformers import __version__ as version
from transformers.models.whisper.modeling_whisper import WhisperEncoder

torch.set_num_threads(1)
exports, sounds, limits = json.loads(sys.argv[1])
answers = {}
for name, folder in exports.items():
    if name.split("/")[0].endswith("-ctc") and version.startswith("4."):  # which has no processor for the two
        extractor, processor = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    else:
        extractor = processor = AutoProcessor.from_pretrained(folder)
    if name.split("/")[0].endswith("-ctc"):
        encoder = WhisperEncoder.from_pretrained(folder).eval()
        head = load_file(folder + "/ctc_head.safetensors")
    elif name in limits:
        model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    else:
        model = AutoModelForCTC.from_pretrained(folder).eval()
    rows = []
    for sound in sounds:
        inputs = extractor(np.load(sound), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            if name.split("/")[0].endswith("-ctc"):
                heard = encoder(inputs.input_features).last_hidden_state
                frames = -(-len(np.load(sound)) // 320)
                ids = torch.nn.functional.linear(heard, head["weight"], head["bias"]).argmax(-1)[:, :frames]
            elif name in limits:
                ids = model.generate(**inputs, max_new_tokens=limits[name], force_unique_generate_call=True)
            else:
                ids = model(**inputs).logits.argmax(-1)
        text = processor.batch_decode(ids, skip_special_tokens=name in limits)[0]
        for special in ("<s>", "</s>", "<unk>"):  # which only untrained models write
            text = text.replace(special, "")
        rows.append((ids[0].tolist(), text.strip() if name in limits else " ".join(text.split())))
    answers[name] = rows
assert "launcher.worker.backbone" not in sys.modules
print(json.dumps(answers))
"""


def by_plain_transformers(exports: dict[str, Path], sounds: list[Path], limits: dict[str, int]) -> Any:
    """Tokens and text of each sound, by a process that has none of our code."""
    asked = json.dumps([{n: str(p) for n, p in exports.items()}, [str(p) for p in sounds], limits])
    command = [sys.executable, "-I", "-c", PLAIN, asked]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def by_us(model: SpeechModel, waveform: Any) -> tuple[list[int], str]:
    """The same by a model of ours."""
    tensors = model.collate([waveform], [""])
    with torch.no_grad():
        if isinstance(model, CtcModel):
            logits, frames = model.logits(tensors)
            return logits.argmax(-1)[0, : int(frames[0])].tolist(), model(tensors, transcribe=True)[1][0]
        words: Any = model
        written: list[Any] = []
        decode = words.tokenizer.batch_decode

        def noted(rows: Any, **named: Any) -> Any:
            written.append(rows)
            return decode(rows, **named)

        words.tokenizer.batch_decode = noted
        try:
            text = model(tensors, transcribe=True)[1][0]
        finally:
            words.tokenizer.batch_decode = decode
        return written[0][0].tolist(), text
