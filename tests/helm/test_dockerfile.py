"""The image: what the Dockerfile says agrees with the chart, and its steps run in a clean folder.

No Docker daemon is asked for: the build stage's steps run as they are written, with each absolute path moved into a
temporary folder. Two things differ: torch is linked from the environment of the tests (its download is large), and the
step that needs root (apt-get, useradd) is read, not run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.chart import ROOT, environment, pod_of, serve_yaml

STEP_TIMEOUT_S = 150
READY_TIMEOUT_S = 120
MOVED = ("/opt/foretoken", "/var/lib/foretoken", "/src", "/wheels")
NOT_IN_THE_IMAGE = ("hypothesis", "mypy", "pytest", "ruff", "scipy", "transformers", "uv")


@dataclass
class Stage:
    """What follows one FROM."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, its argument in one line

    def of(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.steps if name == instruction]


def _stages() -> list[Stage]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            stages.append(Stage(argument))
        elif instruction:
            stages[-1].steps.append((instruction, argument))
    return stages


BUILD, IMAGE = _stages()
ENVIRONMENT = dict(word.split("=", 1) for words in IMAGE.of("ENV") for word in shlex.split(words))


def _allowed() -> list[str]:
    """What .dockerignore lets into the build: it refuses all, then names what may pass."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_both_stages_begin_with_the_same_slim_python() -> None:
    assert BUILD.base == "python:3.11-slim AS build"
    assert IMAGE.base == "python:3.11-slim"


def test_it_names_no_registry_and_no_index() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "://" not in text
    assert "--index" not in text


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    copied = [source for step in BUILD.of("COPY") for source in step.split()[:-1]]
    assert sorted(copied) == sorted(_allowed())
    assert all((ROOT / source).exists() for source in copied)


def test_the_program_gets_signals_from_process_1() -> None:
    assert [json.loads(words) for words in IMAGE.of("ENTRYPOINT")] == [["tini", "--", "foretoken"]]
    (root_step,) = IMAGE.of("RUN")
    assert {"g++", "tini"} <= set(root_step.split())


@pytest.mark.needs("helm")
def test_the_user_is_the_charts_and_not_root() -> None:
    security = pod_of({})["securityContext"]
    assert IMAGE.of("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    (root_step,) = IMAGE.of("RUN")
    assert f"useradd --uid {security['runAsUser']} --create-home --home-dir {ENVIRONMENT['HOME']} " in root_step
    names = [name for name, _ in IMAGE.steps]
    assert names.index("USER") > names.index("RUN")


@pytest.mark.needs("helm")
def test_ports_and_variables_are_the_charts() -> None:
    (container,) = pod_of({})["containers"]
    assert IMAGE.of("EXPOSE") == [str(port["containerPort"]) for port in container["ports"]]
    ours = {name: value for name, value in environment(container).items() if isinstance(value, str)}
    assert {name: ENVIRONMENT[name] for name in ours} == ours
    settings = dict(line.split(": ") for line in serve_yaml({}).splitlines())
    for name in ENVIRONMENT:  # a variable comes before the chart's file: it may only say the same
        if name.startswith("FORETOKEN_"):
            assert settings[name.removeprefix("FORETOKEN_").lower()] == ENVIRONMENT[name]
    assert not [name for name in ENVIRONMENT if "TOKEN" in name and not name.startswith("FORETOKEN_")]


def _link_torch(site_packages: Path) -> None:
    """torch, and of what it needs that which the lock leaves to it, from the environment that runs this test."""
    locked = set(re.findall(r"^([a-z0-9][-a-z0-9]*)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted, seen = ["torch"], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or name in locked:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for top in {Path(path).parts[0] for path in found.files or () if ".." not in Path(path).parts}:
            if not (site_packages / top).exists() and top != "__pycache__":
                (site_packages / top).symlink_to(Path(str(found.locate_file(top))))
        requirements = [Requirement(line) for line in found.requires or ()]
        wanted += [
            canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
        ]


class Builder:
    """Runs the build stage below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root
        (root / "empty").mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "HOME") or name.startswith(("PIP_", "SSL_", "http", "no_proxy"))
        }

    def moved(self, text: str) -> str:
        """The text with each of the image's folders below `root`."""
        pattern = "|".join(map(re.escape, MOVED))
        return re.sub(rf"(?<![\w/])({pattern})\b", lambda match: f"{self.root}{match[1]}", text)

    def copy(self, words: str) -> None:
        *sources, target = words.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self.folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, self.folder / target)

    def build(self) -> None:
        for name, argument in BUILD.steps:
            if name == "WORKDIR":
                self.folder = Path(self.moved(argument))
                self.folder.mkdir()
            elif name == "COPY":
                self.copy(argument)
            elif name == "RUN":
                self.run(self.moved(argument))
                if "-m venv" in argument:
                    (site_packages,) = (self.root / "opt" / "foretoken" / "lib").glob("python*/site-packages")
                    _link_torch(site_packages)
            else:
                assert name == "ARG"

    def run(self, command: str) -> str:
        command = command.replace("python3 ", f"{sys.executable} ")
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment | {"TORCH": ""},
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The image's program with its variables, in an empty folder."""
        variables = {
            name: self.moved(value.replace("$PATH", os.environ["PATH"])) for name, value in ENVIRONMENT.items()
        }
        return subprocess.Popen(
            [f"{self.root}/opt/foretoken/bin/foretoken", *arguments],
            cwd=self.root / "empty",
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    builder = Builder(tmp_path_factory.mktemp("image"))
    builder.build()
    (builder.root / "var" / "lib" / "foretoken").mkdir(parents=True)
    return builder


def _url(lines: IO[str]) -> str:
    seen = []
    for line in lines:  # ends when the program does
        seen.append(line)
        if found := re.search(r"ready on (http://\S+)", line):
            return found[1]
    raise AssertionError("it ended before it was ready:\n" + "".join(seen))


@pytest.mark.timeout(600)
@pytest.mark.needs("packages", "helm", "compiler", "demo", "linux")
def test_its_steps_make_a_server_that_runs_the_charts_settings(builder: Builder) -> None:
    present = builder.run(f"{builder.root}/opt/foretoken/bin/python -m pip list --format json")
    names = {found["name"] for found in json.loads(present)}
    assert {"foretoken", "grpcio", "torch"} <= names
    assert not names & set(NOT_IN_THE_IMAGE)

    config = builder.root / "serve.yaml"
    config.write_text(builder.moved(serve_yaml({})))
    with builder.start("serve", "--config", str(config), "--port", "0") as server:
        try:
            assert server.stdout is not None
            url = _url(server.stdout)
            with urllib.request.urlopen(f"{url}/health/ready", timeout=READY_TIMEOUT_S) as answer:
                assert answer.status == 200
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=READY_TIMEOUT_S)
        finally:
            server.kill()
    assert server.returncode == 0
    assert list((builder.root / "var" / "lib" / "foretoken" / "kernels").glob("*.so"))
