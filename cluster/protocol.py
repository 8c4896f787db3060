"""Every message between processes. Values only: no logic, no defaults that depend on a model.

The gateway opens one bidirectional gRPC stream to each worker (`STREAM_METHOD`) and sends `ToWorker`; the worker
answers with one `Hello` and then `FromWorker`. Bodies are msgpack (msgspec), tagged by the struct's name. A peer of
another `PROTOCOL_VERSION` is refused at `Hello`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1
SERVICE = "foretoken.Worker"
STREAM_METHOD = f"/{SERVICE}/Stream"  # ToWorker stream -> FromWorker stream
STATE_METHOD = f"/{SERVICE}/State"  # empty -> EngineState


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message: immutable, keyword-only, defaults left off the wire."""


# ---------------------------------------------------------------------------------------------- launching a worker


class Launch(Message, frozen=True):
    """A worker's options, the first line (JSON) on its standard input. It reads no settings of its own."""

    address: str  # "unix:/path" or "host:port" to serve gRPC on
    model_path: str  # a local folder in Hugging Face layout
    served_name: str
    device: str = "auto"  # auto | cpu | cuda | cuda:<i>
    numerics: Literal["auto", "invariant", "fast"] = "auto"
    max_model_len: int | None = None  # None: the checkpoint's
    max_num_seqs: int = 64
    token_budget: int = 2048  # tokens a step
    page_size: int = 64  # KV positions a page
    host_memory_bytes: int | None = None  # what the machine, or its container, has free; None: as the worker finds it
    kv_cache_bytes: int | None = None  # None: sized to the machine
    prefix_cache: bool = True
    static_batching: bool = False  # wait for whole batches: the baseline of `mixed32/static_batching`
    num_threads: int | None = None
    kernels_dir: str | None = None  # cache of compiled host kernels; None: run without them
    drain_timeout_s: float = 10.0  # after SIGTERM, what runs may finish for this long
    exit_with_parent: bool = True  # end when standard input closes
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    progress: bool = False  # draw progress bars on stderr


# ------------------------------------------------------------------------------------------------ gateway -> worker


class Grammar(Message, frozen=True):
    """What the output must match; compiled by the worker, off the engine thread."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    source: str  # the schema as JSON, the regular expression, a JSON list of choices, or a Lark grammar


class Sampling(Message, frozen=True):
    """How the next token is drawn. Ranges are checked where a request enters (gateway, `Request`)."""

    seed: int  # 64 bits; with `choice` and the absolute position it fixes the noise
    choice: int = 0  # i of n
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()  # token id sequences that must not be completed
    logprobs: int | None = None  # alternatives beside the sampled token, 0..20; None: none
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    grammar: Grammar | None = None


class Stopping(Message, frozen=True):
    """When a request ends."""

    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # leave the matched string in the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # in the text; ids are always whole


class Submit(Message, frozen=True, tag="submit"):
    """Start one sequence, or go on with it: `output_ids` are the tokens that it already has."""

    request_id: str  # unique; choice i of n is a request of its own
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    group: str = ""  # requests of one group share a prompt: the first computes it, the others take its pages
    output_ids: tuple[int, ...] = ()
    priority: int = 0  # lower is sooner
    deadline_s: float | None = None  # seconds from receipt
    cache_salt: str = ""  # tenants with different salts share no prefix pages


class Abort(Message, frozen=True, tag="abort"):
    request_id: str


ToWorker = Submit | Abort


# ------------------------------------------------------------------------------------------------ worker -> gateway


class Hello(Message, frozen=True, tag="hello"):
    """A worker's first message on a stream: what it serves."""

    version: int
    worker_id: str  # new at every start of the process
    served_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    numerics: str
    num_pages: int
    page_size: int
    model_type: str
    num_parameters: int
    num_experts: int  # a layer; 0: dense
    num_layers: int


class TopLogprob(Message, frozen=True, array_like=True):
    token_id: int
    token: bytes  # the bytes the token stands for
    logprob: float


class TokenLogprobs(Message, frozen=True, array_like=True):
    """The sampled token's log probability (of the model, before any filter) and its best alternatives."""

    token_id: int
    token: bytes
    logprob: float
    rank: int  # 1: the most likely
    top: list[TopLogprob]


class Finish(Message, frozen=True):
    """A request's one terminal event."""

    reason: Literal["stop", "length", "abort", "error"]
    stop_reason: str | int | None = None  # the stop string or token id that matched
    error_code: str | None = None  # of `errors`, with reason "error"
    error_message: str | None = None


class RequestOutput(Message, frozen=True):
    """What one step gave one request."""

    request_id: str
    index: int  # of token_ids[0] among the request's generated tokens
    token_ids: list[int] = []
    text: str = ""  # released by this step; what could still become a stop string is held back
    logprobs: list[TokenLogprobs] = []  # one a token, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output; None for the first token
    cached_tokens: int = 0  # of the prompt, found in the prefix cache (with the first output)
    finish: Finish | None = None


class StepOutput(Message, frozen=True, tag="step"):
    """All that one step produced for one gateway."""

    outputs: list[RequestOutput] = []


FromWorker = Hello | StepOutput


class EngineState(Message, frozen=True):
    """Numbers of one engine at one moment; counters run from the start of the process."""

    worker_id: str = ""
    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0  # free or only kept for the prefix cache
    prompt_tokens: int = 0  # counter: computed prompt tokens
    generated_tokens: int = 0  # counter
    cached_tokens: int = 0  # counter: prompt tokens found in the prefix cache
    queried_tokens: int = 0  # counter: prompt tokens looked up there
    preemptions: int = 0  # counter
    steps: int = 0  # counter
    step_tokens: int = 0  # counter: tokens of all steps
    forward_s: float = 0.0  # counter: seconds inside the model
    step_s: float = 0.0  # counter: seconds inside `Engine.step`
    sequence_steps: int = 0  # counter: sequences of all steps
