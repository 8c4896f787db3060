"""What the gateway is told when it is made. Frozen; nothing here reads the environment."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.errors import CheckpointError
from cluster.gateway.auth import NO_KEYS, Keys


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a sampling field is where the request gives none.

    A checkpoint's `do_sample` is not among them: the temperature alone decides, as everywhere in this API.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_checkpoint(cls, model_path: Path) -> SamplingDefaults:
        """The defaults of a checkpoint's `generation_config.json`; our own where it has none.

        Raises `CheckpointError` naming the file, and the field that is out of range or of a wrong type.
        """
        path = model_path / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            config = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a JSON object")
        bounds = {
            "temperature": (0.0, 100.0),
            "top_p": (math.ulp(0.0), 1.0),
            "top_k": (0, 2**31),
            "min_p": (0.0, 1.0),
            "typical_p": (math.ulp(0.0), 1.0),
            "repetition_penalty": (math.ulp(0.0), 100.0),
        }
        given = {name: config[name] for name in bounds if config.get(name) is not None}
        for name, value in given.items():
            low, high = bounds[name]
            kind, types = ("a whole number", int) if name == "top_k" else ("a number", int | float)
            if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
                raise CheckpointError(
                    f"{path}: {name} must be {kind} in [{low:g}, {high:g}], got {value!r}", param=name
                )
        return replace(cls(), **given)


ToolParser = Literal["auto", "hermes", "mistral", "none"]
ReasoningParser = Literal["auto", "think", "none"]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """One served model and the bounds that its callers meet."""

    served_name: str
    model_path: Path  # tokenizer.json, tokenizer_config.json and the chat template are read from here
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    tool_parser: ToolParser = "auto"  # how the model writes calls; auto: by its chat template and tokens
    reasoning_parser: ReasoningParser = "auto"  # and thoughts
    request_timeout_s: float = 600.0  # from a request's arrival to its last token, waiting for a worker included
    drain_timeout_s: float = 10.0
    max_open_requests: int = 1024  # over it: 429
    max_open_requests_per_tenant: int = 0  # over it: 429; 0: none but that of all
    max_ttft_s: float | None = None  # a request whose first token would come later: 429; None: no bound
    vllm_metrics: bool = False  # /metrics has vLLM's names as well
    keys: Keys = NO_KEYS  # none: no key is needed
    share_prefix_cache: bool = False  # tenants find each other's prefix pages
    max_choices: int = 128  # `n`
    max_sequences: int = 1024  # prompts x n of one request
    max_body_bytes: int = 16 * 2**20
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0  # a client that takes nothing for this long is cut
    template_timeout_s: float = 5.0
    max_rendered_chars: int = 8 * 2**20  # of a chat template's output
