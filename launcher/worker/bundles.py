"""torchaudio's pretrained bundles as models in Hugging Face layout.

A bundle is a pickle on a web server, and torchaudio publishes no hash of it. So nothing is unpickled whose SHA-256 the
recipe does not give as `backbone.revision`; then torch reads tensors alone (`weights_only`), once, and what it read
lies as safetensors under a seal of ours. torchaudio's modules are named as transformers' are, but for where they hang
and for WavLM's attention, whose three projections it keeps as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher import bundle_cache, sealing, staging
from launcher.errors import DataError, UsageError
from launcher.worker import shims
from launcher.worker.vocabulary import LETTERS

SERVER = "https://download.pytorch.org/torchaudio/models/"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def bundle(source: str, kind: str | None = None) -> Any:
    """torchaudio's own description of the bundle that `source` names.

    Raises:
        UsageError: there is none of this name, or it is of another kind than the recipe says.
    """
    shims.apply()
    from torchaudio import pipelines

    name = source.removeprefix(bundle_cache.PREFIX)
    found = getattr(pipelines, name, None)
    if not isinstance(found, pipelines.Wav2Vec2Bundle):
        raise UsageError(f"torchaudio has no bundle {name}", hint=f"set backbone.source to one of {', '.join(names())}")
    if kind is not None and kind_of(name) != kind:
        raise UsageError(
            f"backbone {source}: a {kind_of(name)} model, the recipe says kind: {kind}",
            hint="set backbone.kind or backbone.source so that they agree",
        )
    return found


def names() -> list[str]:
    shims.apply()
    from torchaudio import pipelines

    return sorted(n for n, value in vars(pipelines).items() if isinstance(value, pipelines.Wav2Vec2Bundle))


def kind_of(name: str) -> str:
    return {"HUBERT": "hubert", "WAVLM": "wavlm"}.get(name.partition("_")[0], "wav2vec2")


def fetch(source: str, revision: str | None) -> Path:
    """The bundle, downloaded where torchaudio itself would look for it, hashed, converted and sealed.

    Raises:
        DataError: it cannot be had, or its hash is not `revision`: it was not opened.
        UsageError: there is no `revision`; says what it is.
    """
    described, target = bundle(source), bundle_cache.folder(source, revision)
    if target.is_dir():
        sealing.verify(target)
        return target
    url = described._path if described._path.startswith("https") else SERVER + described._path
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except OSError as error:
            raise DataError(
                f"cannot fetch {source}: {error}",
                hint=f"this machine must reach {url}, or copy that file to {file}",
            ) from error
    convert(file, source, revision, target)
    return target


def convert(file: Path, source: str, revision: str | None, target: Path) -> None:
    """Make `target` of the bundle's file, if the file is the one that `revision` means."""
    with file.open("rb") as opened:
        seen = hashlib.file_digest(opened, "sha256").hexdigest()
        if revision is None or not _SHA256.fullmatch(revision):
            raise UsageError(
                f"{source} is a pickle that the recipe does not vouch for: set backbone.revision to {seen}, the SHA-256"
                f" of {file}, if you trust it",
                hint="compare it with that of another source or another day",
            )
        if seen != revision:
            raise DataError(
                f"{file} has the SHA-256 {seen}, and backbone.revision says {revision}; it was not opened",
                hint="remove it and fetch it anew; where that gives the same, ask why the file changed",
            )
        opened.seek(0)
        try:
            state = torch.load(opened, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise DataError(f"{file} is no file of weights: {error}", hint="remove it and fetch it anew") from error
    from safetensors.torch import save_file
    from transformers import Wav2Vec2FeatureExtractor

    described, kind = bundle(source), kind_of(source.removeprefix(bundle_cache.PREFIX))
    head = "".join(getattr(described, "_labels", ())) == "".join(LETTERS[4:]) and len(state["aux.bias"]) == len(LETTERS)
    weights = {name: tensor.contiguous().clone() for name, tensor in renamed(state, kind, head).items()}
    with staging.staged(target, sum(t.nbytes for t in weights.values())) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(described._params, kind).to_dict(), indent=1) + "\n")
        layer = described._params["extractor_mode"] == "layer_norm"
        extractor = Wav2Vec2FeatureExtractor(do_normalize=described._normalize_waveform, return_attention_mask=layer)
        extractor.save_pretrained(folder)
        facts = {"format": "speechctl.backbone/1", "source": {"bundle": source, "sha256": seen}}
        sealing.seal(folder, target, facts)


def config(parameters: dict[str, Any], kind: str) -> Any:
    """transformers' configuration of a model that torchaudio makes with these parameters."""
    import transformers

    family = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}[kind]
    channels, kernels, strides = zip(*parameters["extractor_conv_layer_config"], strict=True)
    values = {
        "feat_extract_norm": parameters["extractor_mode"].removesuffix("_norm"),
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": parameters["extractor_conv_bias"],
        "hidden_size": parameters["encoder_embed_dim"],
        "num_conv_pos_embeddings": parameters["encoder_pos_conv_kernel"],
        "num_conv_pos_embedding_groups": parameters["encoder_pos_conv_groups"],
        "num_hidden_layers": parameters["encoder_num_layers"],
        "num_attention_heads": parameters["encoder_num_heads"],
        "intermediate_size": parameters["encoder_ff_interm_features"],
        "do_stable_layer_norm": parameters["encoder_layer_norm_first"],
        "num_feat_extract_layers": len(channels),
        "vocab_size": len(LETTERS),
        "architectures": [f"{family}Model"],
    }
    if kind == "wavlm":
        values |= {
            "num_buckets": parameters["encoder_num_buckets"],
            "max_bucket_distance": parameters["encoder_max_distance"],
        }
    return getattr(transformers, f"{family}Config")(**values)


def renamed(state: dict[str, Tensor], kind: str, head: bool) -> dict[str, Tensor]:
    """torchaudio's weights under transformers' names.

    Args:
        head: take it, too. It must be over fairseq's 32 English classes, whose order is ours; the file has the four
            that torchaudio leaves out.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("aux."):
            if head:
                found[name.replace("aux.", "lm_head.")] = tensor
            continue
        name = re.sub(r"^encoder\.transformer\.", "encoder.", name)
        name = re.sub(r"^encoder\.feature_projection\.", "feature_projection.", name)
        if kind == "wavlm":
            name = name.replace(".attention.attention.", ".attention.")
        if ".in_proj_" in name:
            what = name.rpartition("_")[2]  # weight or bias
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{kind}.{name.rpartition('.')[0]}.{part}_proj.{what}"] = rows
            continue
        found[f"{kind}.{name}"] = tensor
    return found


def opened(source: str, revision: str | None, kind: str) -> Path:
    """The converted bundle, as `prepare` left it, with every file hashed.

    Raises:
        DataError: it is not there.
    """
    bundle(source, kind)
    target = bundle_cache.folder(source, revision)
    if not target.is_dir():
        raise DataError(
            f"{source} is not at {target}" + ("" if revision else ", for want of backbone.revision"),
            hint="fetch it with `speechctl prepare RECIPE --fix`; it says the revision where the recipe has none",
        )
    sealing.verify(target)
    return Path(os.path.abspath(target))
