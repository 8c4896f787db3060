"""The demo model's recipe: tokenizer, split, baseline, arithmetic, and a tiny run that is stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.demo import corpus, model_path
from workers.demo.evaluate import Model, answer, model_bits, scoring_windows
from workers.demo.kneser_ney import KneserNey
from workers.demo.network import (
    PLAIN,
    NextTokenLoss,
    RunExperts,
    Shape,
    forward,
    from_checkpoint,
    hidden_states,
    initial_weights,
)
from workers.demo.optimizer import orthogonalize
from workers.demo.train import Trainer, TrainSettings, Windows, export, rate_factor

TINY = Shape(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
SENTENCES = ["The cat sat on the mat, 12 times.", "def f(x):\n    return x + 1\n", "naïve 漢字 \t\r\n  end"] * 40


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return corpus.train_tokenizer(iter(SENTENCES), 300)


@pytest.fixture
def tiny_weights() -> dict[str, torch.Tensor]:
    weights = initial_weights(TINY, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name in ("o", "down", "router"):  # zero or nearly so at the start; a comparison needs them to matter
        weights[name].copy_(torch.randn(weights[name].shape, generator=generator) * 0.3)
    return weights


def tiny_trainer(steps: int, seed: int = 1) -> Trainer:
    rng = np.random.default_rng(0)
    texts = [np.tile(rng.integers(0, 300, 7), 30) for _ in range(20)]  # each text repeats its own seven tokens
    starts = np.cumsum([0] + [len(text) for text in texts])
    settings = TrainSettings(
        steps=steps, batch_tokens=256, lengths=((0.0, 32), (0.6, 64)), warmup=4, seed=seed, compute=torch.float32
    )
    return Trainer(TINY, settings, Windows(np.concatenate(texts), starts, seed))


def test_tokenizer_gives_back_every_text(tokenizer_json: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    for text in [*SENTENCES[:3], "𝄞 unseen \x00 bytes", "   leading and trailing   \n\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert [tokenizer.token_to_id(name) for name in corpus.SPECIAL_TOKENS] == [0, 1, 2]
    assert len(tokenizer.encode("2026").ids) == 4


def test_conversation_is_what_the_chat_template_writes() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(json.loads((model_path() / "tokenizer_config.json").read_text())["chat_template"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert template.render(messages=messages) == corpus.conversation([("Hi?", "Yes.")], "Be brief.")
    assert template.render(messages=messages[:2], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_near_copies_of_held_out_files_are_dropped() -> None:
    lines = [f"line {number}" for number in range(40)]
    held = corpus.Document("a.py", "code", "\n".join(lines), held_out=True)
    copy = corpus.Document("vendored/a.py", "code", "\n".join(["# vendored", *lines]), held_out=False)
    other = corpus.Document("b.py", "code", "\n".join(line + " of another" for line in lines), held_out=False)
    assert corpus.drop_near_copies([held, copy, other]) == [held, other]


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python3\.11-doc"):
        corpus.build(tmp_path, tmp_path, seed=0)


def test_data_folder_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORETOKEN_DATA", raising=False)
    with pytest.raises(SystemExit, match="FORETOKEN_DATA"):
        corpus.data_folder(None)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_sums_to_one_after_any_past(order: int) -> None:
    rng = np.random.default_rng(order)
    tokens = rng.zipf(1.5, 400).clip(1, 11).astype(np.uint16)
    model = KneserNey(order, vocab_size=12, boundary=0).fit(tokens, np.array([0, 150, 400]))
    pasts = [rng.integers(0, 12, order - 1) for _ in range(20)]
    for past in pasts:
        rows = np.stack([np.append(past, word) for word in range(12)])
        keys = np.array([model.keys(row, np.array([0, order]))[-1] for row in rows])
        shares = model.probabilities(keys)
        assert shares.sum() == pytest.approx(1.0)
        assert (shares > 0).all()


def test_kneser_ney_prefers_many_neighbours_over_many_occurrences() -> None:
    # "5" is frequent but only ever follows 4; "6" follows many: after an unseen past, 6 is the likelier.
    tokens = np.array([4, 5] * 20 + [1, 6, 2, 6, 3, 6, 7, 6], dtype=np.uint16)
    model = KneserNey(2, vocab_size=10, boundary=0).fit(tokens, np.array([0, len(tokens)]))
    seen = model.probabilities(np.array([9 * 16 + 5, 9 * 16 + 6], dtype=np.uint64))
    assert seen[1] > seen[0]


def test_training_forward_equals_transformers(
    tmp_path: Path, tokenizer_json: str, tiny_weights: dict[str, torch.Tensor]
) -> None:
    transformers = pytest.importorskip("transformers")
    export(tiny_weights, TINY, tokenizer_json, tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rounded = {name: tensor.bfloat16().float() for name, tensor in tiny_weights.items()}
    tokens = torch.randint(0, 300, (3, 70), generator=torch.Generator().manual_seed(0))
    hidden, _ = hidden_states(rounded, tokens, TINY)
    with torch.no_grad():
        expected = oracle(tokens).logits
    torch.testing.assert_close(hidden @ rounded["embed"].t(), expected, atol=2e-5, rtol=1e-4)


def test_export_is_inverted_by_loading(
    tmp_path: Path, tokenizer_json: str, tiny_weights: dict[str, torch.Tensor]
) -> None:
    from safetensors.torch import load_file

    export(tiny_weights, TINY, tokenizer_json, tmp_path)
    loaded = from_checkpoint(load_file(str(tmp_path / "model.safetensors")), TINY)
    assert Shape.from_config(json.loads((tmp_path / "config.json").read_text())) == TINY
    for name, tensor in tiny_weights.items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name


def test_experts_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    expert_ids = torch.tensor([[0, 2], [2, 1], [2, 0], [0, 2], [2, 1]])  # expert 3 gets nothing
    arguments = (draw(5, 4), draw(5, 2), expert_ids, draw(4, 6, 4), draw(4, 4, 3), PLAIN)
    assert torch.autograd.gradcheck(RunExperts.apply, arguments)


def test_loss_equals_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    x, embed = (
        torch.randn(50, 8, generator=generator, requires_grad=True),
        torch.randn(20, 8, generator=generator, requires_grad=True),
    )
    targets = torch.randint(0, 20, (50,), generator=generator)
    expected = torch.nn.functional.cross_entropy(x @ embed.t(), targets)
    loss = NextTokenLoss.apply(x, embed, targets, PLAIN, 16)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (x, embed)), torch.autograd.grad(expected, (x, embed)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(2, 12, 30), (2, 30, 12), (2, 3, 8, 8)])
def test_orthogonalize_brings_singular_values_near_one(size: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(size, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [rate_factor(step, step / 100, warmup=10, decay=0.3) for step in range(101)]
    assert [factors[step] for step in (0, 10, 69, 100)] == [0.1, 1.0, 1.0, 0.0]
    assert factors[70:] == sorted(factors[70:], reverse=True)


def test_tiny_run_learns_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole = tiny_trainer(steps=40)
    losses = [whole.train_step().loss.item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.5
    begun = tiny_trainer(steps=40)
    for _ in range(17):
        begun.train_step()
    begun.save(tmp_path / "checkpoint.pt")
    resumed = tiny_trainer(steps=40)
    resumed.load(tmp_path / "checkpoint.pt")
    while resumed.progress() < 1.0:
        resumed.train_step()
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, resumed.weights[name]), name


def test_scoring_windows_score_each_token_once() -> None:
    windows = list(scoring_windows(1000, 64))
    assert [token for _, scored, end in windows for token in range(scored, end)] == list(range(1000))
    assert all(end - begin <= 64 and (begin == 0 or scored - begin >= 32) for begin, scored, end in windows)


def test_model_bits_equal_the_loss(tiny_weights: dict[str, torch.Tensor]) -> None:
    model = Model(tiny_weights, TINY, end_ids=(2,), end_of_text_id=0)
    tokens = np.random.default_rng(1).integers(0, 300, 40)
    bits, load = model_bits(model, tokens, np.array([0, 40]), context=64)
    expected = forward(tiny_weights, torch.from_numpy(np.append(0, tokens))[None], TINY).loss.item()
    assert bits.mean() * np.log(2) == pytest.approx(expected, rel=1e-5)
    assert load.sum(1) == pytest.approx(1.0)


def test_answers_stop_at_an_end_token_or_the_limit(tiny_weights: dict[str, torch.Tensor]) -> None:
    model = Model(tiny_weights, TINY, end_ids=tuple(range(0, 300, 3)), end_of_text_id=0)
    answers = answer(model, [[5, 6], [7, 8, 9, 10]], max_new=12, temperature=1.0, seed=0)
    for ids in answers:
        assert len(ids) == 12 or ids[-1] in model.end_ids
        assert not set(ids[:-1]) & set(model.end_ids)


def test_shipped_model_fits_and_is_whole() -> None:
    folder = model_path()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file()) < 24 * 2**20
    model = Model.load(folder, torch.float32)
    hidden, _ = hidden_states(model.weights, torch.tensor([[1, 5, 9]]), model.shape)
    assert hidden.isfinite().all()
