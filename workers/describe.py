"""`python -m workers.describe MODEL_PATH`: what placing a model needs to know of it, as one line of JSON.

From config.json and the headers alone; no tensor is read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import torch

from cluster.errors import ConfigError, ForetokenError
from cluster.protocol import ModelShape
from workers.cache.kv_cache import page_bytes
from workers.models.families import weight_parts
from workers.models.loader import empty_weights, expert_bytes, open_checkpoint


def describe(path: Path, device: torch.device) -> ModelShape:
    """The shape of the checkpoint in folder `path`, with the sizes that it has on `device`, which need not be here.

    Raises `CheckpointError`.
    """
    checkpoint = open_checkpoint(path, device)
    spec, dtype = checkpoint.spec, checkpoint.dtype
    dense = empty_weights(spec, torch.device("meta"), dtype, with_experts=False)
    return ModelShape(
        num_layers=len(spec.layers),
        moe_layers=tuple(index for index, count in enumerate(spec.num_experts) if count),
        num_experts=max(spec.num_experts, default=0),
        expert_bytes=expert_bytes(spec, dtype),
        dense_bytes=sum(part.nbytes for _, part in weight_parts(spec, dense, checkpoint.layouts, checkpoint.entries)),
        kv_token_bytes=page_bytes(spec, 1, dtype),
        max_model_len=spec.max_position,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.describe", description=__doc__)
    parser.add_argument("model_path", type=Path, help="a local folder in Hugging Face layout")
    parser.add_argument("--device", default="cpu", help="whose sizes: auto, cpu, cuda or cuda:<i> (default: cpu)")
    options = parser.parse_args()
    try:
        shape = describe(options.model_path, _device(options.device))
    except ForetokenError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    print(msgspec.json.encode(shape).decode())


def _device(name: str) -> torch.device:
    """Only its type matters. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:<i>", param="device")
    return torch.device(name.partition(":")[0])


if __name__ == "__main__":
    main()
