"""Measure the demo model: `python -m workers.demo.evaluate --corpus DIR [--json FILE] [--quick] [--show N]`.

Held-out bits per byte by kind of text beside a Kneser-Ney 5-gram fitted on the same training tokens, each expert's
share of the load, bits per byte by position in a long text, and how many of 50 held-out questions are answered with
an answer that ends by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workers.demo import model_path
from workers.demo.corpus import KINDS, TURN_START
from workers.demo.kneser_ney import KneserNey
from workers.demo.network import Shape, Weights, from_checkpoint, hidden_states

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Weights, shape and the ids that end an answer."""

    weights: Weights
    shape: Shape
    end_ids: tuple[int, ...]
    end_of_text_id: int

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Model:
        """Read a checkpoint folder. Raises FileNotFoundError if it holds none."""
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        shape = Shape.from_config(config)
        weights = from_checkpoint(load_file(str(folder / "model.safetensors")), shape)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        return cls(weights, shape, tuple(generation["eos_token_id"]), generation["pad_token_id"])

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, last: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits [batch, length, vocab], or [batch, vocab] at positions `last` [batch]; load [layers, experts]."""
        hidden, extras = hidden_states(self.weights, tokens, self.shape)
        if last is not None:
            hidden = hidden[torch.arange(len(tokens)), last]
        return hidden.float() @ self.weights["embed"].float().t(), torch.stack([load for _, _, load in extras])


def scoring_windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, score from, end) of overlapping windows; each token is scored once, with half a context before it."""
    stride, scored = context // 2, 0
    while scored < num_tokens:
        end = min(num_tokens, context if scored == 0 else scored + stride)
        yield max(0, end - context), scored, end
        scored = end


def model_bits(
    model: Model, tokens: np.ndarray, starts: np.ndarray, context: int, batch_tokens: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """-log2 P of every token [total], no document seeing another, and the load [layers, experts], rows sum to 1."""
    jobs = [
        (int(first), *window)
        for first, last in pairwise(starts)
        for window in scoring_windows(int(last - first), context)
    ]
    jobs.sort(key=lambda job: job[3] - job[1])  # like with like, so that little is padded
    bits = np.zeros(len(tokens))
    load, weight = torch.zeros(model.shape.num_hidden_layers, model.shape.num_experts), 0
    while jobs:
        count = max(1, batch_tokens // (jobs[-1][3] - jobs[-1][1]))
        group, jobs = jobs[-count:], jobs[:-count]
        longest = max(end - begin for _, begin, _, end in group)
        inputs = torch.full((len(group), longest), model.end_of_text_id)
        for row, (first, begin, _, end) in enumerate(group):
            past = tokens[first + begin - 1] if begin else model.end_of_text_id
            inputs[row, : end - begin] = torch.from_numpy(
                np.concatenate(([past], tokens[first + begin : first + end - 1])).astype(np.int64)
            )
        logits, batch_load = model.logits(inputs)
        load, weight = load + batch_load * inputs.numel(), weight + inputs.numel()
        for row, (first, begin, scored, end) in enumerate(group):
            wanted = torch.from_numpy(tokens[first + scored : first + end].astype(np.int64))
            nats = F.cross_entropy(logits[row, scored - begin : end - begin], wanted, reduction="none")
            bits[first + scored : first + end] = nats.numpy() / np.log(2)
    return bits, (load / weight).numpy()


@torch.no_grad()
def answer(model: Model, prompts: list[list[int]], max_new: int, temperature: float, seed: int) -> list[list[int]]:
    """Continue each prompt to an end id, which is kept, or for max_new tokens; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    sequences, open_rows = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(max_new):
        if not open_rows:
            break
        sizes = torch.tensor([len(sequences[row]) for row in open_rows])
        tokens = torch.full((len(open_rows), int(sizes.max())), model.end_of_text_id)
        for at, row in enumerate(open_rows):
            tokens[at, : len(sequences[row])] = torch.tensor(sequences[row])
        logits, _ = model.logits(tokens, sizes - 1)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        for row, token in zip(open_rows, chosen.tolist(), strict=True):
            sequences[row].append(token)
        open_rows = [row for row in open_rows if sequences[row][-1] not in model.end_ids]
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def held_out_questions(corpus: dict[str, np.ndarray], count: int, tokenizer: Any) -> list[list[int]]:
    """The first questions of `count` held-out conversations, a third of each kind, as prompts."""
    chats = [index for index, kind in enumerate(KINDS) if kind.startswith("chat-")]
    marker = tokenizer.encode(f"{TURN_START}assistant\n").ids
    prompts: list[list[int]] = []
    for place, kind in enumerate(chats):
        share = count // len(chats) + (place < count % len(chats))
        rows = np.flatnonzero(corpus["kinds"] == kind)
        for row in rows[np.linspace(0, len(rows) - 1, share).astype(int)]:
            ids = corpus["tokens"][corpus["starts"][row] : corpus["starts"][row + 1]].tolist()
            at = next(i for i in range(len(ids)) if ids[i : i + len(marker)] == marker)
            prompts.append(ids[: at + len(marker)])
    return prompts


def first_tokens(corpus: dict[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """The corpus cut to about `most` tokens a kind, whole documents except the last."""
    tokens, starts, kept, num_bytes = [], [0], [], []
    for kind in range(len(KINDS)):
        left = most
        for row in np.flatnonzero(corpus["kinds"] == kind):
            part = corpus["tokens"][corpus["starts"][row] : corpus["starts"][row + 1]][:left]
            whole = corpus["starts"][row + 1] - corpus["starts"][row]
            tokens.append(part)
            starts.append(starts[-1] + len(part))
            kept.append(kind)
            num_bytes.append(corpus["num_bytes"][row] * len(part) / whole)
            left -= len(part)
            if left <= 0:
                break
    return {
        "tokens": np.concatenate(tokens),
        "starts": np.array(starts),
        "kinds": np.array(kept),
        "num_bytes": np.array(num_bytes),
    }


def machine() -> str:
    """Processor, cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The source tree's commit, None outside of one."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def measure(
    model: Model, training: dict[str, np.ndarray], held_out: dict[str, np.ndarray], context: int
) -> Iterator[Row]:
    """Rows of bits per byte by kind and overall, by position, and the expert load by layer."""
    bits, load = model_bits(model, held_out["tokens"], held_out["starts"], context)
    baseline = KneserNey(5, model.shape.vocab_size, model.end_of_text_id).fit(training["tokens"], training["starts"])
    baseline_bits = baseline.bits_per_token(held_out["tokens"], held_out["starts"])
    owner = np.repeat(np.arange(len(held_out["kinds"])), np.diff(held_out["starts"]))
    kinds = held_out["kinds"][owner]
    for index, kind in [*enumerate(KINDS), (-1, "all")]:
        mine = kinds == index if index >= 0 else np.ones(len(bits), dtype=bool)
        num_bytes = (
            held_out["num_bytes"][held_out["kinds"] == index].sum() if index >= 0 else held_out["num_bytes"].sum()
        )
        if num_bytes:
            yield {
                "case": kind,
                "metric": "bits_per_byte",
                "value": bits[mine].sum() / num_bytes,
                "unit": "bit/byte",
                "baseline": baseline_bits[mine].sum() / num_bytes,
            }
    long_ones = np.flatnonzero(np.diff(held_out["starts"]) >= context)
    positions = np.concatenate([np.arange(size) for size in np.diff(held_out["starts"])])
    inside = np.isin(owner, long_ones) & (positions < context)
    edges = [0, 128, 512, 1024, 2048]
    for low, high in pairwise(edges):
        chosen = inside & (positions >= low) & (positions < high)
        if high <= context and chosen.any():
            yield {
                "case": f"tokens {low}-{high} of long texts",
                "metric": "bits_per_token",
                "value": bits[chosen].mean(),
                "unit": "bit/token",
                "baseline": baseline_bits[chosen].mean(),
            }
    even = 1.0 / model.shape.num_experts
    for layer, shares in enumerate(load):
        for metric, value in (("least_expert_load", shares.min()), ("greatest_expert_load", shares.max())):
            yield {
                "case": f"layer {layer}",
                "metric": metric,
                "value": float(value),
                "unit": "share of tokens",
                "baseline": even,
            }


def main(argv: list[str] | None = None) -> None:
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description="Measure the demo model against a Kneser-Ney 5-gram.")
    parser.add_argument("--corpus", type=Path, required=True, help="what workers.demo.corpus wrote")
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="at most 8,000 tokens a kind and 12 questions")
    parser.add_argument("--context", type=int, default=2048, help="tokens the model may look back on")
    parser.add_argument("--show", type=int, default=0, help="print this many answers")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = Model.load(args.model, getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    with np.load(args.corpus / "train.npz") as train_file, np.load(args.corpus / "heldout.npz") as held_out_file:
        training, held_out = dict(train_file), dict(held_out_file)
    prompts = held_out_questions(held_out, 12 if args.quick else 50, tokenizer)
    rows = list(measure(model, training, first_tokens(held_out, 8000) if args.quick else held_out, args.context))
    for case, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
        answers = answer(model, prompts, 256, temperature, seed=1)
        ended = sum(ids[-1] in model.end_ids for ids in answers)
        rows.append(
            {
                "case": f"{len(prompts)} held-out questions, {case}",
                "metric": "answers_ended",
                "value": ended / len(prompts),
                "unit": "share within 256 tokens",
                "baseline": None,
            }
        )
        for prompt, ids in list(zip(prompts, answers, strict=True))[:: max(1, len(prompts) // max(args.show, 1))][
            : args.show
        ]:
            print(f"--- {case}\n{tokenizer.decode([*prompt, *ids], skip_special_tokens=False)}")
    common = {"machine": machine(), "commit": commit()}
    rows = [
        {"bench": "demo_model", **row, "ratio": row["value"] / row["baseline"] if row["baseline"] else None, **common}
        for row in rows
    ]
    print(f"{'case':46} {'metric':22} {'value':>9} {'baseline':>9} {'ratio':>7}")
    for row in rows:
        base, ratio = (f"{row[name]:.4f}" if row[name] is not None else "-" for name in ("baseline", "ratio"))
        print(f"{row['case']:46} {row['metric']:22} {row['value']:9.4f} {base:>9} {ratio:>7}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
