"""`foretoken generate` as a process, with a scripted worker process in place of the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.environment import PACKAGES
from cluster.errors import InvalidValueError
from cluster.gateway.settings import GatewaySettings
from cluster.generate import Prompt, read_prompt
from tests.support.scripted_process import save_tokenizer
from tests.support.scripted_worker import END_ID, NUM_BYTES, text_ids

ANSWER = "Hello, wörld! 🦀"
BEGIN_ID = NUM_BYTES  # the first special token


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


def _generate(checkpoint: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FORETOKEN_")}
    return subprocess.run(
        [sys.executable, "-m", "tests.support.scripted_process", "generate", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PACKAGES,
        env=clean | {"SCRIPTED_MODEL": str(checkpoint)} | environment,
    )


def test_prints_the_text_alone(checkpoint: Path) -> None:
    done = _generate(checkpoint, "--prompt", "Hi", "--max-tokens", "50")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ANSWER + "\n"


def test_json_is_one_line_with_generated_ids_and_the_final_eos(checkpoint: Path) -> None:
    done = _generate(checkpoint, "--prompt", "Hi", "--json", "--temperature", "0", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    ids = [*text_ids(ANSWER), END_ID]
    assert json.loads(done.stdout) == {
        "text": ANSWER,
        "token_ids": ids,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 3 + len(ids)},
    }


def test_stops_at_max_tokens(checkpoint: Path) -> None:
    done = json.loads(_generate(checkpoint, "--prompt", "Hi", "--json", "--max-tokens", "5").stdout)
    assert (done["text"], done["token_ids"], done["finish_reason"]) == ("Hello", text_ids("Hello"), "length")


def test_a_worker_that_cannot_start_leaves_stdout_empty(checkpoint: Path) -> None:
    done = _generate(checkpoint, "--prompt", "Hi", "--json", SCRIPTED_REFUSAL="no such tensor")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Error: no such tensor\n")


def test_a_prompt_over_the_context_is_refused_with_both_numbers(checkpoint: Path) -> None:
    done = _generate(checkpoint, "--prompt", "x" * 600)
    assert done.returncode == 1
    assert "512" in done.stderr
    assert "601 in the prompt" in done.stderr


def test_a_prompt_is_raw_text_unless_chat_is_asked(checkpoint: Path) -> None:
    gateway = GatewaySettings("m", checkpoint)
    _, raw = read_prompt(Prompt("Hi"), gateway)
    assert raw.prompts[0].ids == (BEGIN_ID, *text_ids("Hi"))  # the tokenizer's post-processor adds the first
    _, chat = read_prompt(Prompt("Hi", chat=True), gateway)
    assert chat.prompts[0].text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompts[0].ids[0] != BEGIN_ID


def test_a_value_out_of_range_names_its_field(checkpoint: Path) -> None:
    with pytest.raises(InvalidValueError) as caught:
        read_prompt(Prompt("Hi", temperature=-1.0), GatewaySettings("m", checkpoint))
    assert caught.value.param == "temperature"
