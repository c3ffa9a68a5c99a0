"""What `prepare` asks of torch and of the hub: a sum over all hosts, and the files of a backbone."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import timedelta

from launcher import bundle_cache

OF_A_BACKBONE = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""The files of a model repository that are wanted: weights that run nothing, and what describes them."""
BYTES = 4 * 2**20
ROUNDS = 10


def allreduce(options: argparse.Namespace) -> int:
    """Meet the ranks of the other hosts as training would, and sum up a buffer with them a few times."""
    import torch
    from torch import distributed

    on_gpu = options.backend == "nccl"
    device = torch.device("cuda", options.gpu) if on_gpu else torch.device("cpu")
    meeting = f"tcp://[{options.address}]" if ":" in options.address else f"tcp://{options.address}"
    began = time.monotonic()
    distributed.init_process_group(
        options.backend,
        init_method=f"{meeting}:{options.port}",
        rank=options.rank,
        world_size=options.world_size,
        timeout=timedelta(seconds=45),
    )
    buffer = torch.ones(BYTES // 4, device=device)
    distributed.all_reduce(buffer)
    if on_gpu:
        torch.cuda.synchronize()
    meeting_s = time.monotonic() - began
    right = bool((buffer == options.world_size).all())
    seconds = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        distributed.all_reduce(buffer)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    distributed.destroy_process_group()
    if not right:
        raise SystemExit("the sum over all hosts is wrong")
    print(json.dumps({"meeting_s": meeting_s, "seconds": statistics.median(seconds), "bytes": BYTES}))
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Put a backbone into Hugging Face's cache, at its revision: safetensors and what describes them, no pickles. Or
    convert a bundle of torchaudio's."""
    if options.source.startswith(bundle_cache.PREFIX):
        from launcher.worker import bundles

        print(json.dumps({"path": str(bundles.fetch(options.source, options.revision))}))
        return 0
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from launcher.errors import DataError

    try:
        path = snapshot_download(options.source, revision=options.revision, allow_patterns=OF_A_BACKBONE)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DataError(
            f"cannot fetch {options.source} at {options.revision or 'main'}: {str(error).splitlines()[0]}",
            hint="this machine must reach huggingface.co (HF_ENDPOINT names a mirror), or set backbone.source to a"
            " directory that has the model",
        ) from error
    print(json.dumps({"path": path}))
    return 0
