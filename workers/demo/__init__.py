"""The demo model: a 12-million-parameter Qwen3-MoE with its own tokenizer, and the recipe that trained it.

`model/` is a Hugging Face checkpoint (bf16 safetensors); `README.md` is its model card. `corpus.py` builds the text,
`network.py` is the training forward, `train.py` the command, `evaluate.py` the measurements, `kneser_ney.py` the
baseline they are compared with. Serving needs none of those modules, only `model_path()`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder with config.json, model.safetensors, tokenizer.json and the chat template."""
    return Path(__file__).resolve().parent / "model"
