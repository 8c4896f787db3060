"""Who may go on with what another worker began, and whose model is the pool's."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.gateway.likeness import PoolModel, model_difference, token_difference
from tests.support.scripted_worker import hello

OURS, THEIRS = hello(), hello(checkpoint="decaf")


@pytest.mark.parametrize(
    ("changes", "is_other_model", "are_other_tokens"),
    [
        ({"worker_id": "another", "num_pages": 7, "served_name": "x"}, False, False),
        ({"checkpoint": "decaf"}, True, True),
        ({"dtype": "bfloat16"}, True, True),
        ({"numerics": "fast"}, False, True),
        ({"arithmetic": "another"}, False, True),
        ({"page_size": 16}, False, True),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], is_other_model: bool, are_other_tokens: bool) -> None:
    other = hello(**changes)
    for found, is_other in (
        (model_difference(OURS, other), is_other_model),
        (token_difference(OURS, other), are_other_tokens),
    ):
        assert (found is not None) == is_other
        if found is not None:
            ((field, value),) = changes.items()
            assert f"{field.replace('_', ' ')} {value!r} instead of {getattr(OURS, field)!r}" in found


def test_the_fast_class_asks_for_no_bits() -> None:
    fast = hello(numerics="fast")
    assert token_difference(fast, hello(numerics="fast", arithmetic="another", page_size=16)) is None
    assert token_difference(fast, hello(numerics="fast", dtype="bfloat16")) is not None
    assert token_difference(fast, OURS) is not None


def test_most_workers_say_which_model_it_is() -> None:
    model = PoolModel(reign_s=10.0)
    assert model.difference(THEIRS) is None, "nothing is known yet"
    model = model.counted([OURS], 1, 0.0)
    assert model.difference(OURS) is None
    assert model.difference(THEIRS) is not None
    assert model.differences({"a": OURS, "b": THEIRS}).keys() == {"b"}
    model = model.counted([THEIRS, OURS], 1, 1.0)
    assert model.hello == OURS, "who was there first stays among equals"
    model = model.counted([THEIRS, OURS, OURS], 1, 2.0)
    assert model.hello == OURS
    model = model.counted([THEIRS, OURS, THEIRS], 1, 3.0)
    assert model.difference(OURS) is not None
    assert model.difference(THEIRS) is None


def test_counting_changes_nothing() -> None:
    model = PoolModel(reign_s=10.0).counted([OURS], 0, 0.0)
    assert model.counted([THEIRS], 0, 1.0).hello == THEIRS
    assert model == PoolModel(reign_s=10.0, hello=OURS, seen_s=0.0)


def test_a_model_keeps_its_place_for_a_while() -> None:
    model = PoolModel(reign_s=10.0).counted([OURS], 1, 0.0).counted([OURS, THEIRS], 1, 5.0)
    model = model.counted([THEIRS], 1, 14.9)
    assert model.difference(THEIRS) is not None
    model = model.counted([THEIRS, OURS], 1, 14.95)
    assert model.hello == OURS, "it is back"
    model = model.counted([], 1, 50.0)
    assert model.hello == OURS, "nobody else was there"
    model = model.counted([THEIRS], 1, 51.0)
    assert model.difference(THEIRS) is None


def test_where_nobody_is_missing_nobody_is_waited_for() -> None:
    model = PoolModel(reign_s=10.0).counted([OURS], 0, 0.0)
    assert model.counted([THEIRS], 1, 1.0).hello == OURS
    assert model.counted([THEIRS], 0, 1.5).hello == THEIRS
