"""Train the demo model: `python -m workers.demo.train --corpus DIR --work DIR --minutes 100 [--export DIR]`.

The run stops by time (`--minutes`, wall clock since the first start) or by `--steps`, whichever comes first. The rate
rises over `--warmup` steps, stays, and falls linearly to zero over the last `--decay` share of the budget, so a run
that is slowed or paused still ends annealed. Windows grow from 256 to 2,048 tokens on the way (`--lengths`).
A checkpoint is written every few minutes, and on SIGTERM; the same command continues from it. With `--steps` alone the
weights are the same, bit for bit, however often a run was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from workers.demo.corpus import END_OF_TEXT, SPECIAL_TOKENS, TURN_END
from workers.demo.network import PLAIN, Output, Parts, Shape, Weights, forward, initial_weights, to_checkpoint
from workers.demo.optimizer import Optimizer, OptimizerSettings

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class TrainSettings:
    """A run's budget and schedule. `lengths` are (share of the budget from which it holds, window length in tokens)."""

    minutes: float = float("inf")
    steps: int = 1_000_000_000
    batch_tokens: int = 8192
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.35, 512), (0.75, 1024), (0.93, 2048))
    warmup: int = 100
    decay: float = 0.35
    balance_weight: float = 0.01
    z_weight: float = 0.0005
    seed: int = 1
    compute: torch.dtype = torch.bfloat16
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


def rate_factor(step: int, progress: float, warmup: int, decay: float) -> float:
    """Share of the peak rate at a step; progress in [0, 1] is the share of the budget that is spent."""
    return max(0.0, min(1.0, (step + 1) / warmup, (1.0 - progress) / decay))


class Windows:
    """Training windows of tokens in an order that depends on (seed, epoch, length) only.

    An epoch shuffles the documents, joins them, cuts the stream in windows of length + 1 tokens and shuffles those.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, seed: int) -> None:
        self.tokens, self.starts, self.seed = tokens, starts, seed
        self.position: dict[str, int] = {"epoch": -1, "length": 0, "cursor": 0}
        self._stream, self._order = tokens[:0], starts[:0]

    def _begin_epoch(self, epoch: int, length: int) -> None:
        rng = np.random.default_rng((self.seed, epoch, length))
        documents = rng.permutation(len(self.starts) - 1)
        self._stream = np.concatenate([self.tokens[self.starts[i] : self.starts[i + 1]] for i in documents])
        self._order = rng.permutation((len(self._stream) - 1) // length)
        self.position = {"epoch": epoch, "length": length, "cursor": 0}

    def restore(self, position: dict[str, int]) -> None:
        """Continue at a checkpoint's position."""
        self._begin_epoch(position["epoch"], position["length"])
        self.position = dict(position)

    def next_batch(self, length: int, count: int) -> torch.Tensor:
        """[count, length + 1] int64. A change of length begins a new epoch."""
        if self.position["length"] != length or self.position["cursor"] + count > len(self._order):
            self._begin_epoch(self.position["epoch"] + 1, length)
        cursor = self.position["cursor"]
        self.position["cursor"] = cursor + count
        rows = [self._stream[i * length : i * length + length + 1] for i in self._order[cursor : cursor + count]]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class Trainer:
    """Weights, optimizer and position of one run; `train_step` is the whole of training."""

    def __init__(self, shape: Shape, settings: TrainSettings, windows: Windows, parts: Parts = PLAIN) -> None:
        self.shape, self.settings, self.windows, self.parts = shape, settings, windows, parts
        self.weights: Weights = initial_weights(shape, settings.seed)
        self.optimizer = Optimizer(self.weights, settings.optimizer)
        self.step, self.num_tokens, self.elapsed_s = 0, 0, 0.0

    def progress(self) -> float:
        """Share of the budget spent, by time or by steps."""
        return max(self.step / self.settings.steps, self.elapsed_s / 60 / self.settings.minutes)

    def train_step(self) -> Output:
        """One batch forward, backward, update."""
        settings, progress = self.settings, self.progress()
        length = [length for share, length in settings.lengths if progress >= share][-1]
        batch = self.windows.next_batch(length, max(1, settings.batch_tokens // length))
        leaves = {
            name: weight.detach().to(settings.compute, copy=True).requires_grad_()
            for name, weight in self.weights.items()
        }
        output = forward(leaves, batch, self.shape, self.parts)
        layers = self.shape.num_hidden_layers
        (
            output.loss + layers * (settings.balance_weight * output.balance + settings.z_weight * output.z_loss)
        ).backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        self.optimizer.step(
            self.weights, grads, self.step, rate_factor(self.step, progress, settings.warmup, settings.decay)
        )
        self.step += 1
        self.num_tokens += batch.shape[0] * length
        return output

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader sees the old file or the new one, never a half."""
        state = {
            "shape": asdict(self.shape),
            "weights": self.weights,
            "optimizer": self.optimizer.state,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "elapsed_s": self.elapsed_s,
            "position": self.windows.position,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same shape."""
        state = torch.load(path, weights_only=True)
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(tensor)
        self.optimizer.load(state["optimizer"])
        self.windows.restore(state["position"])
        self.step, self.num_tokens, self.elapsed_s = state["step"], state["num_tokens"], state["elapsed_s"]


def export(weights: Weights, shape: Shape, tokenizer_json: str, folder: Path) -> None:
    """Write a Hugging Face checkpoint: config, bf16 weights, tokenizer, chat template, generation defaults."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    specials = {
        text: index for index, text in enumerate(SPECIAL_TOKENS)
    }  # the trainer of the tokenizer puts them first
    if any(tokenizer.token_to_id(text) != index for text, index in specials.items()):
        raise ValueError(f"the tokenizer's first tokens are not {', '.join(SPECIAL_TOKENS)}")
    end_of_text, turn_end = specials[END_OF_TEXT], specials[TURN_END]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_checkpoint(weights, shape), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library writes it for the owner alone
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    written = {
        "config.json": shape.to_config(end_of_text, turn_end),
        "generation_config.json": {
            "eos_token_id": [turn_end, end_of_text],
            "pad_token_id": end_of_text,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
            "max_new_tokens": 256,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "bos_token": None,
            "add_bos_token": False,
            "added_tokens_decoder": {str(index): {"content": text, **added} for text, index in specials.items()},
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def run(trainer: Trainer, checkpoint: Path, save_every_s: float = 240.0, log_every: int = 20) -> None:
    """Train until the budget is spent or SIGTERM comes, logging progress and saving on the way."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    began = last_save = last_log = time.monotonic()
    before, tokens_then = trainer.elapsed_s, trainer.num_tokens
    while trainer.progress() < 1.0 and not stopped:
        output = trainer.train_step()
        now = time.monotonic()
        trainer.elapsed_s = before + now - began
        if trainer.step % log_every == 0:
            progress, load = trainer.progress(), output.load * trainer.shape.num_experts
            left_s = trainer.elapsed_s * (1 - progress) / max(progress, 1e-9)
            print(
                f"{time.strftime('%H:%M:%S')} step {trainer.step} ({progress:6.1%}, {left_s / 60:.1f} min left) "
                f"loss {output.loss.item():.4f} balance {output.balance.item():.4f} "
                f"load {load.min().item():.2f}-{load.max().item():.2f} of even, z {output.z_loss.item():.1f}, "
                f"{(trainer.num_tokens - tokens_then) / (now - last_log):,.0f} tokens/s, "
                f"{trainer.num_tokens / 1e6:.2f} M tokens",
                flush=True,
            )
            last_log, tokens_then = now, trainer.num_tokens
        if now - last_save > save_every_s:
            trainer.save(checkpoint)
            last_save = now
    trainer.save(checkpoint)
    print(
        f"{'stopped' if stopped else 'finished'} at step {trainer.step}, {trainer.num_tokens:,} tokens, "
        f"{trainer.elapsed_s:.0f} s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo model, or continue a run.")
    parser.add_argument("--corpus", type=Path, required=True, help="what workers.demo.corpus wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=TrainSettings.minutes)
    parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    parser.add_argument("--seed", type=int, default=TrainSettings.seed)
    parser.add_argument(
        "--balance", type=float, default=TrainSettings.balance_weight, help="load-balancing loss, per layer"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-compile", action="store_true", help="run layers without torch.compile (no C++ compiler needed)"
    )
    parser.add_argument("--export", type=Path, help="write the Hugging Face checkpoint here at the end")
    parser.add_argument("--export-only", action="store_true", help="only export the newest checkpoint")
    args = parser.parse_args(argv)
    if args.minutes == TrainSettings.minutes and args.steps == TrainSettings.steps and not args.export_only:
        parser.error("give a budget: --minutes or --steps")
    torch.set_num_threads(args.threads)
    settings = TrainSettings(minutes=args.minutes, steps=args.steps, seed=args.seed, balance_weight=args.balance)
    shape, checkpoint = Shape(), args.work / "checkpoint.pt"
    with np.load(args.corpus / "train.npz") as corpus:
        windows = Windows(corpus["tokens"], corpus["starts"], settings.seed)
    trainer = Trainer(shape, settings, windows, PLAIN if args.no_compile else Parts.compiled())
    args.work.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"continuing at step {trainer.step}", flush=True)
    if not args.export_only:
        run(trainer, checkpoint)
    if args.export:
        export(trainer.weights, shape, (args.corpus / "tokenizer.json").read_text(encoding="utf-8"), args.export)


if __name__ == "__main__":
    main()
