"""Each host kernel against its reference twin, over awkward sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.numerics import host_kernels
from workers.kernels.linear import linear
from workers.kernels.moe_experts import moe_experts
from workers.kernels.moe_route import moe_route
from workers.kernels.rms_norm import rms_norm
from workers.kernels.swiglu import swiglu
from workers.numerics import FAST, Numerics, laid_out
from workers.sampling.gumbel import GumbelNoise, mix

pytestmark = pytest.mark.needs("compiler")

ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 64, 131)


def native(num_threads: int = 2) -> Numerics:
    return Numerics("invariant", native=host_kernels(num_threads))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (17, 5), (64, 96), (192, 512), (300, 70), (520, 259)])
def test_linear(num_in: int, num_out: int, num_threads: int) -> None:
    weight, bias = laid_out(normal(num_out, num_in) / num_in**0.5), normal(num_out)
    whole = None
    for rows in sorted(ROWS, reverse=True):
        x = normal(max(ROWS), num_in)[:rows]
        y = linear(x, weight, bias, native(num_threads))
        torch.testing.assert_close(y, linear(x, weight, bias, FAST), atol=1e-5, rtol=1e-5)
        whole = y if whole is None else whole
        assert torch.equal(y, whole[:rows])


@pytest.mark.parametrize("size", [8, 15, 64, 192, 259])
def test_rms_norm_and_swiglu(size: int) -> None:
    x, weight = normal(9, size), normal(size)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, native()), rms_norm(x, weight, 1e-6, FAST))
    wide = normal(9, 2 * size) * 5
    torch.testing.assert_close(swiglu(wide, native()), swiglu(wide, FAST), atol=1e-6, rtol=1e-5)


def test_swiglu_at_the_ends_of_float() -> None:
    wide = torch.tensor([[1e4, -1e4, 88.0, -88.0, 0.0, -0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(swiglu(wide, native()), swiglu(wide, FAST))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8)])
def test_moe_route(num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
    logits = normal(11, num_experts) * 3
    ids, weights = moe_route(logits, top_k, norm_topk_prob, native())
    expected_ids, expected_weights = moe_route(logits, top_k, norm_topk_prob, FAST)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("num_tokens", ROWS)
@pytest.mark.parametrize(("num_experts", "top_k", "hidden", "inner"), [(8, 2, 64, 32), (5, 3, 40, 24), (64, 4, 96, 16)])
def test_moe_experts(num_experts: int, top_k: int, hidden: int, inner: int, num_tokens: int, skewed: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if skewed:
        scores[:, 0] = 2  # every token's first choice
    ids, weights = scores.topk(top_k).indices, torch.rand(num_tokens, top_k, generator=generator)
    gate_up, down = laid_out(normal(num_experts, 2 * inner, hidden)), laid_out(normal(num_experts, hidden, inner))
    x = normal(num_tokens, hidden) / 8
    got = moe_experts(x, ids, weights, gate_up, down, native())
    for reference in (FAST, Numerics("invariant", row_block=16)):
        torch.testing.assert_close(got, moe_experts(x, ids, weights, gate_up, down, reference), atol=2e-4, rtol=1e-4)
    for threads in (1, 5):
        assert torch.equal(got, moe_experts(x, ids, weights, gate_up, down, native(threads)))


@pytest.mark.parametrize("vocab_size", [1, 7, 97, 1000, 4099])
def test_gumbel_argmax(vocab_size: int) -> None:
    noise = GumbelNoise(vocab_size, torch.device("cpu"))
    logits, temperature = normal(33, vocab_size) * 2, torch.linspace(0.1, 3, 33)
    logits[:, ::3] = -torch.inf
    logits[:, vocab_size // 2] = 0.5
    keys = torch.from_numpy(mix(np.arange(33, dtype=np.uint64)).view(np.int64))
    scores = noise.rows(keys) * temperature[:, None] + logits
    values, ids = host_kernels().gumbel_argmax(logits, noise.salts, keys, temperature)
    torch.testing.assert_close(values, scores.max(-1).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.gather(1, ids[:, None])[:, 0], values, atol=1e-5, rtol=1e-5)
    for rows in (1, 2, 7):
        alone = host_kernels(1).gumbel_argmax(logits[:rows], noise.salts, keys[:rows], temperature[:rows])
        assert torch.equal(alone[1], ids[:rows])
        assert torch.equal(alone[0], values[:rows])
    greedy = host_kernels().gumbel_argmax(logits, noise.salts, None, None)
    assert torch.equal(greedy[1], logits.argmax(-1))


def test_gumbel_argmax_tells_rows_without_a_token() -> None:
    noise = GumbelNoise(40, torch.device("cpu"))
    logits = normal(3, 40)
    logits[0, 33] = torch.nan
    logits[1] = -torch.inf
    values, ids = host_kernels().gumbel_argmax(logits, noise.salts, None, None)
    assert torch.isnan(values[0])
    assert values[1] == -torch.inf
    assert ids[2] == logits[2].argmax()
