"""What a checkpoint's generation_config.json says of sampling."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from cluster.gateway.settings import SamplingDefaults
from cluster.gateway.tokenize import TextTokenizer


def test_given_fields_are_taken(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": null, "max_length": 9}'
    )
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults(temperature=0.6, top_k=20)


def test_without_a_file_they_are_ours(tmp_path: Path) -> None:
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("{", "generation_config.json"),
        ("[]", "generation_config.json"),
        ('{"temperature": -1}', "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ('{"top_p": 0}', "top_p"),
        ('{"top_k": "5"}', "top_k"),
        ('{"repetition_penalty": true}', "repetition_penalty"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, names: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=names):
        SamplingDefaults.from_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_checkpoint_without_a_usable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.from_checkpoint(tmp_path)
