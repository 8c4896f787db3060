from __future__ import annotations

from pathlib import Path

import pytest

from cluster.control.model import DEMO_PATH
from cluster.control.shape import describe
from cluster.errors import CheckpointError


@pytest.mark.needs("demo")
def test_the_demo_models_shape_is_read_by_a_child() -> None:
    shape = describe(DEMO_PATH, "cpu")
    assert shape.num_experts > 1
    assert set(shape.moe_layers) <= set(range(shape.num_layers))
    assert min(shape.expert_bytes, shape.dense_bytes, shape.kv_token_bytes, shape.max_model_len) > 0


def test_what_is_wrong_with_a_checkpoint_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        describe(tmp_path, "cpu")
    assert "Traceback" not in caught.value.message
