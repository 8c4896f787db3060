"""What the README tells newcomers to type works as it stands there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load
from loadtests.processes import Server, own_server

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server(None, [1], num_threads=1, deadline_s=120.0) as server:
        yield server


def curls() -> list[tuple[str, Any]]:
    """URL and body of each."""
    text = "\n".join(blocks("")).replace("\\\n", " ")
    found = []
    for line in re.findall(r"^curl .*$", text, re.MULTILINE):
        words = shlex.split(line)
        found.append((next(word for word in words if word.startswith("http")), json.loads(words[-1])))
    return found


@pytest.mark.needs("demo")
def test_each_curl_is_answered(server: Server) -> None:
    assert len(curls()) == 3
    for url, body in curls():
        request = urllib.request.Request(
            url.replace(ADDRESS, server.base_url), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert reply.status == 200
            assert reply.read()


@pytest.mark.needs("demo", "openai")
def test_the_python_runs(server: Server) -> None:
    [program] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.base_url)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_settings_are_settings(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    settings = load(config=file)
    assert (settings.model, settings.max_num_seqs, settings.max_ttft_s) == ("Qwen/Qwen3-30B-A3B", 32, 20)


def test_the_service_runs_a_command_of_ours() -> None:
    [text] = blocks("ini")
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # names keep their case
    unit.read_string(text)
    program, *words = unit["Service"]["ExecStart"].split()
    assert program.endswith("/foretoken")
    assert words[:2] == ["serve", "--config"]
    environment = dict(word.split("=") for word in unit["Service"]["Environment"].split())
    assert environment["FORETOKEN_HOME"] == f"/var/lib/{unit['Service']['StateDirectory']}"


def test_every_command_is_one() -> None:
    lines = re.findall(r"^foretoken .*$", "\n".join(blocks("")), re.MULTILINE)
    ours = [shlex.split(line, comments=True) for line in lines]
    assert len(ours) >= 8
    for words in ours:
        names = [word for word in words[1:3] if word.isalpha()]
        shown = CliRunner().invoke(app, [*names[: 2 if names[0] in ("bench", "kernels", "cluster") else 1], "--help"])
        assert shown.exit_code == 0, words
        for flag in (word for word in words if word.startswith("--")):
            assert flag in shown.output or "bench" in names, (words, flag)
