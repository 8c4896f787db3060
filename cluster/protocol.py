"""Every message between processes. Values only: no logic, no defaults that depend on a model.

The gateway opens one bidirectional gRPC stream to each worker (`STREAM_METHOD`) and sends `ToWorker`; the worker
answers with one `Hello` and then `FromWorker`. The controller opens one (`CONTROL_METHOD`), sends `ToControlled` and
gets `WorkerReport`s. An attention worker asks an expert worker for a tensor link (`LINK_METHOD`). Bodies are msgpack
(msgspec), tagged by the struct's name. Every call says what its caller speaks (metadata `VERSION_KEY`): a worker of
another `PROTOCOL_VERSION` refuses it, and a gateway refuses the `Hello` of one. Where a worker has a token, every call
carries it: metadata `TOKEN_KEY`, value ``Bearer <token>``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 6
SERVICE = "foretoken.Worker"
STREAM_METHOD = f"/{SERVICE}/Stream"  # ToWorker stream -> FromWorker stream
STATE_METHOD = f"/{SERVICE}/State"  # empty -> EngineState
CONTROL_METHOD = f"/{SERVICE}/Control"  # ToControlled stream -> WorkerReport stream
LINK_METHOD = f"/{SERVICE}/OpenLink"  # OpenLink -> LinkOffer
TOKEN_KEY = "authorization"
VERSION_KEY = "foretoken-protocol"  # the caller's `PROTOCOL_VERSION`, in decimal
# gRPC's options of both ends of a connection: of a machine that vanished without a word, each learns within 15 s.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it grpc waits a minute, whatever the line above says
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # a server hangs up on who pings more often
)

STEP_TOKEN_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of `step_token_counts`

Role = Literal["all", "attention", "expert"]  # all: attention with every expert beside it
Pooling = Literal["last", "mean"]  # of a prompt's final hidden states: its last token's, or the mean of all


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message: immutable, keyword-only, defaults left off the wire."""


# ---------------------------------------------------------------------------------------------- launching a worker


class Launch(Message, frozen=True):
    """A worker's options, the first line (JSON) on its standard input. It reads no settings of its own."""

    address: str  # "unix:/path" or "host:port" to serve gRPC on; port 0: any free one
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

    # in a cluster
    role: Role = "all"
    name: str = ""  # its place in the placement: "attention-0"; the same for every process that takes this place
    node_id: str = ""
    token: str | None = None  # that every call must carry; None: who can reach the socket may call
    announce_path: str | None = None  # where it writes its `Announcement` once it serves
    tensor_host: str = "127.0.0.1"  # address of the interface that tensor links use
    heartbeat_s: float = 0.1  # between two reports, and between two beats on a silent stream
    peer_timeout_s: float = 2.0  # for a peer's answer, besides what its work takes
    reroute_timeout_s: float = 60.0  # a step waits so long for experts that nobody holds; then its requests fail
    orphan_timeout_s: float | None = None  # it ends itself when no controller was there for so long; None: never
    # It ends itself when its engine's thread neither finished a layer nor looked for work for so long, and for as long
    # as it waits for an expert worker besides: a layer of a full step takes it seconds at most on whatever is worth
    # serving from.
    stuck_after_s: float = 120.0

    def __repr__(self) -> str:
        """Without the token: it must not come into a log or a traceback."""
        shown = self if self.token is None else msgspec.structs.replace(self, token="***")
        return super(Launch, shown).__repr__()


class Announcement(Message, frozen=True):
    """What a worker that is no child of its launcher writes to `announce_path` (JSON), whole or not at all."""

    pid: int
    address: str  # with the port that it got
    worker_id: str


class ModelShape(Message, frozen=True):
    """What placing a model needs to know of it: the one line of JSON that `python -m workers.describe` prints."""

    num_layers: int
    moe_layers: tuple[int, ...]  # indices of the layers with routed experts
    num_experts: int  # of each of those; 0: dense
    expert_bytes: int  # one expert of one layer, as loaded on the device
    dense_bytes: int  # all other weights
    kv_token_bytes: int  # K and V of one position
    max_model_len: int


# ------------------------------------------------------------------------------------------------ gateway -> worker


class Grammar(Message, frozen=True):
    """What the output must match; compiled by the worker, off the engine thread."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    source: str  # the schema as JSON, the regular expression, a JSON list of choices, or a Lark grammar


class Thinking(Message, frozen=True):
    """How a reply thinks before it answers. Only the answer follows `Sampling.grammar`."""

    start: str  # the text that opens its thoughts: "<think>"
    end: str  # and the text that closes them
    is_open: bool  # the prompt has opened them already
    budget: int | None = None  # tokens of thought, behind which `end` is forced; None: as many as it likes


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
    thinking: Thinking | None = None  # None: the whole reply is its answer


class Stopping(Message, frozen=True):
    """When a request ends."""

    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # leave the matched string in the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # in the text; ids are always whole
    shown_special_ids: tuple[int, ...] = ()  # these are in the text all the same: they mark parts of a reply


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
    pooling: Pooling | None = None  # embed the prompt instead of going on with it; `max_tokens` is 0 then
    traceparent: str = ""  # W3C trace context of the request that this is a part of


class Abort(Message, frozen=True, tag="abort"):
    request_id: str


ToWorker = Submit | Abort


# ------------------------------------------------------------------------------------------------ worker -> gateway


class Hello(Message, frozen=True, tag="hello"):
    """A worker's first message on a stream: what it serves.

    Two workers with the same `checkpoint` and `dtype` have the same model. In the class `invariant` those with the same
    `arithmetic` and `page_size` as well compute the same tokens; in the class `fast` nobody promises that.
    """

    version: int
    worker_id: str  # new at every start of the process
    served_name: str
    max_model_len: int
    vocab_size: int
    checkpoint: str  # a digest of the model's folder: `workers.models.fingerprint`
    dtype: str  # of its weights on the device: "float32"
    numerics: str  # the class: invariant or fast
    arithmetic: str  # what computes it: kernels, libraries, instruction set (`workers.numerics.arithmetic`)
    num_pages: int
    page_size: int
    model_type: str
    num_parameters: int
    num_experts: int  # a layer; 0: dense
    num_layers: int
    token_budget: int  # tokens of a step at most
    max_num_seqs: int  # sequences that run at once at most
    prefix_cache: bool = True
    startup_s: float = 0.0  # from the process's start until it served; 0: not known


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
    embedding: bytes = b""  # with `pooling`: [hidden] float32, little-endian, of L2 norm 1
    queue_s: float | None = None  # with the first output: from receipt until it was in a step first
    prefill_s: float | None = None  # and from there until this output
    finish: Finish | None = None


class StepOutput(Message, frozen=True, tag="step"):
    """All that one step produced for one gateway."""

    outputs: list[RequestOutput] = []
    state: EngineState | None = None  # now and then: what changed since it was told last


class Beat(Message, frozen=True, tag="beat"):
    """The worker lives and had nothing to say for `heartbeat_s`.

    It vouches for the engine too: a worker whose engine's thread hangs ends itself (`stuck_after_s`).
    """

    state: EngineState | None = None  # as in `StepOutput`


FromWorker = Hello | StepOutput | Beat


class EngineState(Message, frozen=True):
    """Numbers of one engine at one moment; counters run from the start of the process."""

    worker_id: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_compiling: int = 0  # sequences that wait for their grammar to be compiled
    prompt_tokens_ahead: int = 0  # of sequences that run or wait, not computed yet
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
    step_token_counts: tuple[int, ...] = ()  # counters: steps of up to STEP_TOKEN_BOUNDS[i] tokens, then of more
    expert_calls: int = 0  # counter: an expert worker's calls from attention workers
    expert_rows: int = 0  # counter: (token, choice) rows that it computed
    expert_s: float = 0.0  # counter: seconds in which it computed them


# ---------------------------------------------------------------------------------------------- controller <-> worker


class Lead(Message, frozen=True, tag="lead"):
    """Who controls. First on every control stream, then again each heartbeat: it renews the worker's lease.

    A worker refuses an epoch below the highest that it has seen: it reports that one and ends the stream.
    """

    epoch: int
    controller_id: str


class Assign(Message, frozen=True, tag="assign"):
    """Hold exactly these experts (an expert worker): what is new is loaded first, then the rest is dropped."""

    version: int  # grows with every assignment of one controller
    experts: tuple[tuple[int, ...], ...]  # by layer of the model: ids, ascending; empty for dense layers


class Peer(Message, frozen=True, array_like=True):
    """An expert worker, as an attention worker reaches it."""

    name: str
    worker_id: str  # another process under the same name is another peer
    address: str


class Route(Message, frozen=True, tag="route"):
    """Where an attention worker finds experts; takes the place of the route before, between two steps."""

    version: int  # grows with every route of one controller
    peers: tuple[Peer, ...]
    owners: tuple[tuple[tuple[int, ...], ...], ...]  # by layer, by expert: places in `peers`, the preferred first


ToControlled = Lead | Assign | Route


class WorkerReport(Message, frozen=True):
    """What a worker is and does: every heartbeat, and at once when something changed."""

    worker_id: str
    name: str
    epoch: int  # the highest seen
    assign_version: int = 0  # the last assignment that is in effect
    experts: tuple[tuple[int, ...], ...] = ()  # by layer: what it holds now
    route_version: int = 0  # the last route that is in effect
    lost_peers: tuple[str, ...] = ()  # worker ids of its route whose links broke
    error: str | None = None  # why the last assignment or route could not be carried out
    state: EngineState = EngineState()


# ------------------------------------------------------------------------------------ attention worker -> expert worker


class Likeness(Message, frozen=True):
    """What workers have in common that compute one request's tokens between them; the fields are `Hello`'s.

    `arithmetic` counts in the class `invariant` only.
    """

    checkpoint: str
    dtype: str
    numerics: str
    arithmetic: str


class OpenLink(Message, frozen=True):
    """Ask for a tensor link, over which both then meet: each at the other's address.

    An expert worker that is unlike refuses as FAILED_PRECONDITION, in words that name both.
    """

    link_id: str  # unique
    from_name: str
    likeness: Likeness  # of who asks
    address: bytes  # where who asks listens, as gloo says it to gloo
    worker_id: str = ""  # of the process that is meant; another one at its address refuses; empty: any


class LinkOffer(Message, frozen=True):
    address: bytes  # where the expert worker listens, as gloo says it to gloo
