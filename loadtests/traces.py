"""Real traces of LLM services: when requests came, and how long prompts and answers were.

They are found in the folder of the setting `data` (FORETOKEN_DATA), each in a folder of its own with its SOURCE.md.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cluster.errors import ConfigError, InvalidValueError

AZURE_FOLDER = "azure_llm_2023"
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float  # from the trace's first
    prompt_tokens: int
    output_tokens: int


def azure_2023(data: Path, kind: Literal["conv", "code"]) -> list[Arrival]:
    """The Azure LLM inference trace of 2023 (Splitwise, ISCA 2024): an hour of a chat or of a code service.

    Raises `ConfigError` where `data` does not have it, `InvalidValueError` naming the line that is none of a trace.
    """
    path = data / AZURE_FOLDER / f"AzureLLMInferenceTrace_{kind}.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no trace in {path} ({error}): set FORETOKEN_DATA to a folder that holds {AZURE_FOLDER}, the Azure LLM "
            "inference trace 2023 of the AzurePublicDataset",
            param="data",
        ) from None
    if not rows or rows[0] != AZURE_COLUMNS:
        raise InvalidValueError(f"{path}: the first line must be {','.join(AZURE_COLUMNS)}", param="data")
    arrivals: list[Arrival] = []
    first: datetime | None = None
    for number, row in enumerate(rows[1:], start=2):
        try:
            stamp, prompt, output = row
            when = datetime.fromisoformat(stamp)
            first = first or when
            arrival = Arrival((when - first).total_seconds(), int(prompt), int(output))
        except (ValueError, TypeError) as error:
            raise InvalidValueError(f"{path}, line {number}: {error}", param="data") from None
        if (
            arrival.at_s < (arrivals[-1].at_s if arrivals else 0.0)
            or min(arrival.prompt_tokens, arrival.output_tokens) < 0
        ):
            raise InvalidValueError(
                f"{path}, line {number}: times must ascend and counts not be negative", param="data"
            )
        arrivals.append(arrival)
    return arrivals


def first_seconds(arrivals: Sequence[Arrival], seconds: float) -> list[Arrival]:
    """The requests of a trace's first `seconds`."""
    return list(itertools.takewhile(lambda arrival: arrival.at_s < seconds, arrivals))


def shortened(arrivals: Sequence[Arrival], divisor: float, max_tokens: int) -> list[Arrival]:
    """Prompts and answers `divisor` times shorter, at least one token each, for a model of a shorter context.

    What is still longer than `max_tokens` together is cut, the prompt first. Times stay as they are.
    """
    if not divisor >= 1 or max_tokens < 2:
        raise InvalidValueError(f"divisor {divisor} must be at least 1, and max_tokens {max_tokens} at least 2")
    shorter = []
    for arrival in arrivals:
        output = min(max(1, round(arrival.output_tokens / divisor)), max_tokens - 1)
        prompt = min(max(1, round(arrival.prompt_tokens / divisor)), max_tokens - output)
        shorter.append(Arrival(arrival.at_s, prompt, output))
    return shorter
