"""What every test may lean on: the `needs` marker.

``@pytest.mark.needs("transformers")`` skips a test where that tool is missing, with the reason. Where the environment
variable FORETOKEN_REQUIRE (names, comma separated) promises the tool, the test fails instead: there a silent skip
would hide what is not tested.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _package(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"the package {name} is not installed"


def _program(*names: str) -> Callable[[], str]:
    return lambda: "" if any(map(shutil.which, names)) else f"no {' or '.join(names)} on the PATH"


def _cuda() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _demo() -> str:
    model = ROOT / "workers" / "demo" / "model" / "model.safetensors"
    return "" if model.is_file() else "the demo model is not in workers/demo/model"


def _opentelemetry() -> str:
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        return f"OpenTelemetry's packages are not all installed: {error.name}"
    return ""


def _traces() -> str:
    from cluster.config import load

    folder = load().data / "azure_llm_2023"
    return "" if folder.is_dir() else f"no traces in {folder.parent} (FORETOKEN_DATA)"


MISSING: dict[str, Callable[[], str]] = {  # tool -> why it cannot be used here; "": it can
    "anthropic": _package("anthropic"),
    "chromium": _program("chromium", "chromium-browser", "google-chrome"),
    "compiler": _program("c++", "g++", "clang++"),
    "cuda": _cuda,
    "demo": _demo,
    "helm": _program("helm"),
    "kubernetes_validate": _package("kubernetes_validate"),
    "linux": lambda: "" if sys.platform == "linux" else "Linux only",
    "make": _program("make"),
    "openai": _package("openai"),
    "opentelemetry": _opentelemetry,
    "packages": lambda: "" if "packages" in _required() else "it downloads 0.2 GB: promise packages to run it",
    "ray": _package("ray"),
    "redis": _program("redis-server"),
    "schemathesis": _package("schemathesis"),
    "scipy": _package("scipy"),
    "traces": _traces,
    "transformers": _package("transformers"),
}
CACHED = {tool: cache(check) for tool, check in MISSING.items()}


def _required() -> set[str]:
    return {name.strip() for name in os.environ.get("FORETOKEN_REQUIRE", "").split(",") if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    if unknown := _required() - set(MISSING):
        raise pytest.UsageError(f"FORETOKEN_REQUIRE names unknown tools {sorted(unknown)}; known: {sorted(MISSING)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for tool in marker.args:
            if tool not in CACHED:
                raise pytest.UsageError(f"{item.nodeid} needs an unknown tool {tool!r}; known: {sorted(MISSING)}")
            if reason := CACHED[tool]():
                if tool in _required():
                    pytest.fail(f"FORETOKEN_REQUIRE promises {tool}, but {reason}", pytrace=False)
                pytest.skip(reason)
