"""What a checkpoint's generation_config.json says of sampling."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from cluster.gateway.settings import SamplingDefaults
from cluster.gateway.tokenizer import TextTokenizer


def test_given_fields_are_taken(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": null, "typical_p": 0.9, "max_length": 9}'
    )
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults(temperature=0.6, top_k=20, typical_p=0.9)


def test_without_a_file_they_are_ours(tmp_path: Path) -> None:
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ("{", None),
        ("[]", None),
        ("[" * 100_000, None),
        ('{"temperature": -1}', "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ('{"temperature": "0.6"}', "temperature"),
        ('{"top_p": 0}', "top_p"),
        ('{"top_p": 1.1}', "top_p"),
        ('{"top_k": "5"}', "top_k"),
        ('{"top_k": 2.5}', "top_k"),
        ('{"top_k": -1}', "top_k"),
        ('{"min_p": [0.1]}', "min_p"),
        ('{"typical_p": 0}', "typical_p"),
        ('{"typical_p": 1.5}', "typical_p"),
        ('{"typical_p": false}', "typical_p"),
        ('{"repetition_penalty": true}', "repetition_penalty"),
        ('{"repetition_penalty": 0}', "repetition_penalty"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, param: str | None) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{param or ''}") as caught:
        SamplingDefaults.from_checkpoint(tmp_path)
    assert caught.value.param == param


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_checkpoint_without_a_usable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.from_checkpoint(tmp_path)
