"""Making a model: from the recipe's backbone, from shapes alone, or from a directory that `export` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import TypeAdapter

from launcher import bundle_cache
from launcher import recipe as schema
from launcher.errors import DataError, NotFoundError
from launcher.worker import bundles, shims
from launcher.worker.backbone import Pretrained, SpeechModel, quiet_transformers
from launcher.worker.preflight import OF_A_BACKBONE
from launcher.worker.tiny_ctc import TinyCtcModel
from launcher.worker.vocabulary import Letters, Vocabulary, load
from launcher.worker.wav2vec2 import Wav2Vec2Model
from launcher.worker.whisper import WhisperCtcModel, WhisperModel

WEIGHTS = {"model.safetensors", "model.safetensors.index.json"}
"""One of them is where there are weights that can be opened without running anything."""


def build(backbone: schema.Backbone, *, seed: int, vocabulary: Vocabulary | None = None) -> SpeechModel:
    """The model with its weights, fp32, on the CPU, to be trained; the same on every rank.

    Args:
        vocabulary: of a CTC head, where the recipe asks for another one than LibriSpeech's letters.

    Raises:
        DataError: the directory of the backbone is missing or holds no weights, or the hub could not be reached.
    """
    torch.manual_seed(seed)
    # Transformers hands over what was pretrained in the mode for use, and DeepSpeed leaves it so.
    return _make(backbone, vocabulary, weights=True, seed=seed).train()


def skeleton(backbone: schema.Backbone, vocabulary: Vocabulary | None = None) -> SpeechModel:
    """The model with shapes and no memory behind them: to count parameters and frames."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = _make(backbone, vocabulary, weights=False, seed=0)
    if isinstance(model, WhisperModel):
        model.model.tie_weights()  # Accelerate parted the output projection from the embeddings
    return model


def _make(backbone: schema.Backbone, vocabulary: Vocabulary | None, *, weights: bool, seed: int) -> SpeechModel:
    vocabulary = vocabulary or Letters()
    asked = getattr(backbone, "vocabulary", None)
    if asked is not None and asked.kind != vocabulary.kind:
        raise RuntimeError(f"the recipe asks for a vocabulary of {asked.kind}, and the model got {vocabulary.kind}")
    if isinstance(backbone, schema.TinyCtc):
        return TinyCtcModel(backbone, vocabulary)
    if not backbone.source.startswith(bundle_cache.PREFIX):
        check_source(backbone.source, backbone.kind)
    shims.apply()
    from safetensors import SafetensorError

    with quiet_transformers():
        try:
            found = in_cache(backbone)
            model: SpeechModel
            if isinstance(found, schema.Wav2Vec2):
                model = Wav2Vec2Model(found, vocabulary, weights, seed)
            elif isinstance(found, schema.WhisperCtc):
                model = WhisperCtcModel(found, vocabulary, weights, seed)
            else:
                model = WhisperModel(found, weights, seed)
            model.backbone = backbone
            return model
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"cannot load {backbone.kind} from {backbone.source}: {error}",
                hint="give a directory in Hugging Face layout, or a hub id that this machine can reach or has cached",
            ) from error


def in_cache(backbone: Pretrained) -> Pretrained:
    """The backbone as a directory, where Hugging Face's cache has all of it: then nobody asks the hub for anything.
    What was fetched in part only is left to the hub."""
    if backbone.source.startswith(bundle_cache.PREFIX):
        converted = bundles.opened(backbone.source, backbone.revision, backbone.kind)
        return backbone.model_copy(update={"source": str(converted), "revision": None})
    if Path(backbone.source).is_dir():
        return backbone
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            backbone.source, revision=backbone.revision, allow_patterns=OF_A_BACKBONE, local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError):
        return backbone
    there = {p.name for p in Path(folder).iterdir()}
    needed = {
        "whisper": {"preprocessor_config.json", "tokenizer_config.json"},
        "whisper-ctc": {"preprocessor_config.json"},
    }.get(backbone.kind, set())
    if not {"config.json", *needed} <= there or not WEIGHTS & there:
        return backbone
    return backbone.model_copy(update={"source": folder, "revision": None})


def check_source(source: str, kind: str) -> None:
    """Refuse a directory that cannot be a backbone, before minutes are spent on it.

    Raises:
        DataError: says what was looked for and what is there.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise DataError(
                f"backbone {source}: no such directory", hint="set backbone.source to a directory or hub id"
            )
        return
    there = sorted(p.name for p in folder.iterdir())
    if "config.json" not in there:
        raise DataError(
            f"backbone {source}: no config.json (found: {', '.join(there[:8]) or 'nothing'})",
            hint="set backbone.source to a directory in Hugging Face layout",
        )
    try:
        is_kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"backbone {source}: config.json does not say model_type: {error}",
            hint="set backbone.source to a directory in Hugging Face layout",
        ) from error
    if is_kind != kind.removesuffix("-ctc"):
        raise DataError(
            f"backbone {source}: a {is_kind} model, the recipe says kind: {kind}",
            hint="set backbone.kind or backbone.source so that they agree",
        )
    if not WEIGHTS & set(there):
        raise DataError(
            f"backbone {source}: no weights: expected model.safetensors, found {', '.join(there[:8])}",
            hint="copy the weights there as safetensors (pickled weights are not opened), or give a hub id",
        )


def load_export(folder: Path) -> SpeechModel:
    """A model from a directory that `export` wrote, ready to transcribe.

    Raises:
        NotFoundError: there is no such directory.
        DataError: the directory is not an export, or was changed since.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such directory", hint="make one with `speechctl export RUN`")
    recorded = folder / "speechctl.json"
    if not recorded.is_file():
        raise DataError(
            f"{folder} was not exported by speechctl: no {recorded.name}", hint="make one with `speechctl export RUN`"
        )
    again = "export the run again with `speechctl export RUN`"
    try:
        value = json.loads(recorded.read_bytes())
        if value["kind"] != "tiny-ctc":
            value["source"], value["revision"] = str(folder), None
        backbone = TypeAdapter(schema.Backbone).validate_python(value)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{recorded} is not what an export writes: {error}", hint=again) from error
    model = _make(backbone, load(folder), weights=True, seed=0)
    if isinstance(model, TinyCtcModel):
        try:
            model.load_export(folder)
        except Exception as error:  # safetensors and torch have many ways to say it
            raise DataError(f"{folder} has no weights of this model: {error}", hint=again) from error
    return model.eval()


def write_export(model: SpeechModel, folder: Path) -> None:
    """`export`, and the backbone's section of the recipe beside it."""
    model.export(folder)
    (folder / "speechctl.json").write_text(json.dumps(model.backbone.model_dump(), indent=1) + "\n")
