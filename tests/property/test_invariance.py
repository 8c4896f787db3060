"""A row is bitwise equal at any batch size, in prefill and in decode, in any chunking: the class `invariant`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import TINY, Driver, make_decoder, random_weights
from tests.support.numerics import numerics
from workers.models.decoder import Decoder
from workers.models.spec import LayerSpec, ModelSpec

# One query head a KV head (OLMoE's case), and widths that no vector divides.
ODD = replace(
    TINY,
    layers=(LayerSpec("moe", sliding_window=9), LayerSpec("dense")),
    hidden=48,
    num_heads=2,
    num_kv_heads=2,
    head_dim=24,
    intermediate=40,
)
SPECS = {"tiny": TINY, "odd": ODD}


@pytest.fixture(scope="module", params=[pytest.param("native", marks=pytest.mark.needs("compiler")), "blocks"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=sorted(SPECS))
def decoder(request: pytest.FixtureRequest, kind: str) -> Decoder:
    spec: ModelSpec = SPECS[request.param]
    return make_decoder(spec, random_weights(spec), numerics(kind))


def sequence(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (length,), generator=generator).tolist()


def alone(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits [len, V], token by token, with nobody else in the batch."""
    return Driver(decoder, [tokens]).run([[(0, 1)]] * len(tokens))[0]


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16, 33, 64])
def test_a_decode_row_does_not_depend_on_the_batch(decoder: Decoder, batch: int) -> None:
    sequences = [sequence(5 + i % 9, seed=i) for i in range(batch)]
    driver = Driver(decoder, sequences)
    driver.step([(i, len(tokens) - 1) for i, tokens in enumerate(sequences)])
    together = driver.step([(i, 1) for i in range(batch)])
    for i in {0, batch // 2, batch - 1}:
        assert torch.equal(together[i][0], alone(decoder, sequences[i])[-1])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_chunks_and_neighbours(decoder: Decoder, data: st.DataObject) -> None:
    tokens = sequence(data.draw(st.integers(2, 70), label="length"), seed=7)
    expected = alone(decoder, tokens)
    others = [sequence(data.draw(st.integers(1, 50), label="other"), seed=50 + i) for i in range(3)]
    sequences = [tokens, *others]
    left = [len(item) for item in sequences]
    schedule: list[list[tuple[int, int]]] = []
    while left[0]:
        step = []
        for i in data.draw(st.permutations(range(len(sequences))), label="order"):
            if left[i] and (i == 0 or data.draw(st.booleans(), label="joins")):
                count = data.draw(st.integers(1, left[i]), label="chunk")
                left[i] -= count
                step.append((i, count))
        schedule.append(step)
    assert torch.equal(Driver(decoder, sequences).run(schedule)[0], expected)


def test_a_row_does_not_depend_on_its_pages(decoder: Decoder) -> None:
    tokens = sequence(60, seed=3)
    near, far = Driver(decoder, [tokens]), Driver(decoder, [tokens, *([tokens] * 4)])
    assert torch.equal(near.run([[(0, 60)]])[0], far.run([[(0, 60)]])[0])


def test_the_plain_form_agrees_within_rounding(decoder: Decoder) -> None:
    tokens = sequence(50, seed=5)
    plain = make_decoder(decoder.spec, decoder.weights, numerics("plain"))
    torch.testing.assert_close(
        Driver(decoder, [tokens]).run([[(0, 50)]])[0], Driver(plain, [tokens]).run([[(0, 50)]])[0], atol=1e-4, rtol=1e-4
    )


def test_the_property_can_fail() -> None:
    """Pages that are reduced in another order do give other bits: the comparison above sees a single one."""
    decoder = make_decoder(TINY, random_weights(TINY), numerics("blocks"))
    tokens = sequence(60, seed=3)
    by_16 = Driver(decoder, [tokens], page_size=16).run([[(0, 60)]])[0]
    by_64 = Driver(decoder, [tokens], page_size=64).run([[(0, 60)]])[0]
    assert not torch.equal(by_16, by_64)
    torch.testing.assert_close(by_16, by_64, atol=1e-4, rtol=1e-4)
