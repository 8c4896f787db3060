"""From a `Launch` message to an engine: device, weights, numerics, and how much memory the KV cache gets."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import ConfigError
from cluster.protocol import Launch, Likeness, Peer
from workers.bell import Bell
from workers.cache.kv_cache import page_bytes
from workers.engine import Engine, EngineOptions
from workers.experts.backend import LocalExperts
from workers.experts.exchange import PeerLink
from workers.experts.host import ExpertHost
from workers.experts.routed import RoutedExperts
from workers.experts.shard import ExpertIds, Shard
from workers.kernels.build import build_host_kernels
from workers.kernels.native import HostKernels
from workers.lease import Lease
from workers.models.decoder import Decoder
from workers.models.fingerprint import fingerprint
from workers.models.loader import empty_weights, eos_token_ids, load_experts, load_model, open_checkpoint
from workers.models.spec import ModelSpec
from workers.models.tokenizer import Tokenizer
from workers.models.weights import DenseWeights, ModelWeights, MoEWeights
from workers.numerics import Numerics, arithmetic, detect
from workers.scheduler import SchedulerOptions

log = logging.getLogger(__name__)

WEIGHTS_SHARE = 0.9  # of the memory that is free, for the weights
KV_SHARE = 0.5  # of what is free once the weights are loaded


@dataclass(frozen=True)
class BuiltEngine:
    engine: Engine
    num_parameters: int  # of the whole model
    likeness: Likeness
    turns: Lease  # not started: renewed with each layer, and while peers are waited for
    experts: RoutedExperts | None = None  # of the role attention: the engine steps while they are `ready`
    experts_changed: Bell = dataclasses.field(default_factory=Bell)  # rings on any thread


@dataclass(frozen=True)
class BuiltExperts:
    host: ExpertHost
    likeness: Likeness


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:<i> -> a device that is there. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:<i>", param="device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:<i>", param="device")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {name!r} was asked for, but torch sees no CUDA device: install a CUDA build of torch, or use "
                "--device cpu",
                param="device",
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices", param="device")
        device = torch.device("cuda", device.index or 0)
    return device


def free_bytes(launch: Launch, device: torch.device) -> int:
    """Memory that is free before anything is loaded: of the device, or of the host as the launcher found it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if launch.host_memory_bytes is not None:
        return launch.host_memory_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def product_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """The distinct [out, in] shapes of a model's products; of a wide vocabulary a part stands for the whole.

    Of all of them, whatever part of the model a worker has: so all of a kind find the same numerics.
    """
    weights = empty_weights(spec, torch.device("meta"), torch.float32)
    matrices = [weights.lm_head[:8192]]
    for layer in weights.layers:
        matrices += [layer.attention.qkv, layer.attention.out]
        if isinstance(layer.mlp, DenseWeights):
            matrices += [layer.mlp.gate_up, layer.mlp.down]
        elif layer.mlp.experts is not None:
            matrices += [layer.mlp.router, layer.mlp.experts.gate_up[0], layer.mlp.experts.down[0]]
    return sorted({(matrix.shape[0], matrix.shape[1]) for matrix in matrices})


def num_kv_pages(launch: Launch, spec: ModelSpec, max_model_len: int, free_bytes: int, dtype: torch.dtype) -> int:
    """Pages for every sequence at full length, or what fits. Raises `ConfigError` where not one sequence fits."""
    one = page_bytes(spec, launch.page_size, dtype)
    wanted = launch.max_num_seqs * -(-max_model_len // launch.page_size)
    budget = launch.kv_cache_bytes if launch.kv_cache_bytes is not None else int(free_bytes * KV_SHARE)
    num_pages = min(wanted, budget // one)
    least = -(-max_model_len // launch.page_size)
    if num_pages < least:
        raise ConfigError(
            f"the KV cache has room for {num_pages * launch.page_size} tokens ({budget / 2**20:.0f} MiB), less than "
            f"one sequence of max_model_len {max_model_len} ({least * one / 2**20:.0f} MiB): lower --max-model-len",
            param="max_model_len",
        )
    return num_pages


def resolve_max_model_len(launch: Launch, spec: ModelSpec) -> int:
    if launch.max_model_len is None:
        return spec.max_position
    if launch.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len {launch.max_model_len} is over the checkpoint's {spec.max_position}", param="max_model_len"
        )
    return launch.max_model_len


def host_kernels(launch: Launch) -> HostKernels | None:
    """The host kernels where they can be had; otherwise the torch path, and one line that says why."""
    if launch.kernels_dir is None:
        return None
    try:
        kernels = HostKernels(build_host_kernels(Path(launch.kernels_dir)), torch.get_num_threads())
        # What is left to torch is small. Its threads would spin between calls on the cores that the kernels' need.
        torch.set_num_threads(1)
        return kernels
    except ConfigError as error:
        log.warning("running on torch's own operations, several times slower for small steps: %s", error.message)
        return None


def find_numerics(launch: Launch, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Numerics:
    """The numerics of a worker, the same for every role on one machine. Raises `ConfigError`."""
    native = host_kernels(launch) if device.type == "cpu" else None
    numerics = detect(launch.numerics, device, dtype, product_shapes(spec), native)
    if launch.numerics == "invariant" and numerics.name == "fast":
        raise ConfigError("this processor and torch build give no batch-invariant products", param="numerics")
    if launch.numerics == "auto" and device.type == "cpu" and numerics.name == "fast":
        log.warning("this processor and torch build give no batch-invariant products: numerics class is 'fast'")
    return numerics


def find_likeness(path: Path, device: torch.device, dtype: torch.dtype, numerics: Numerics) -> Likeness:
    """Of a worker that computes the checkpoint in folder `path` so. Raises `CheckpointError`."""
    return Likeness(
        checkpoint=fingerprint(path),
        dtype=str(dtype).removeprefix("torch."),
        numerics=numerics.name,
        arithmetic=arithmetic(numerics, device),
    )


def build_engine(
    launch: Launch,
    progress: Callable[[int, int], None] | None = None,
    link_opener: Callable[[Likeness], Callable[[Peer], PeerLink]] | None = None,
) -> BuiltEngine:
    """Load the checkpoint that `launch` names and make its engine, for the roles all and attention.

    The role attention leaves the routed experts out, and `link_opener` says how one that is so reaches those who have
    them. Raises `ConfigError` for options that this machine or checkpoint cannot meet, `CheckpointError` for the rest.
    """
    is_whole = launch.role == "all"
    if launch.num_threads is not None:
        torch.set_num_threads(launch.num_threads)
    device = resolve_device(launch.device)
    path = Path(launch.model_path)
    free = free_bytes(launch, device)
    spec, weights = load_model(
        path,
        device=device,
        progress=progress,
        limit_bytes=int(free * WEIGHTS_SHARE),
        laid_out=device.type == "cpu",
        with_experts=is_whole,
    )
    dtype = weights.embedding.dtype
    numerics = find_numerics(launch, spec, device, dtype)
    max_model_len = resolve_max_model_len(launch, spec)
    options = EngineOptions(
        max_model_len=max_model_len,
        num_pages=num_kv_pages(launch, spec, max_model_len, free - weight_bytes(weights), dtype),
        page_size=launch.page_size,
        prefix_cache=launch.prefix_cache,
        scheduler=SchedulerOptions(
            max_num_seqs=launch.max_num_seqs,
            token_budget=launch.token_budget,
            static_batching=launch.static_batching,
        ),
    )
    likeness = find_likeness(path, device, dtype, numerics)
    turns = Lease(launch.stuck_after_s, "the engine's thread did not come round for {:g} s")
    experts_changed = Bell()
    experts: LocalExperts | RoutedExperts
    if is_whole:
        layers = [layer.mlp.experts if isinstance(layer.mlp, MoEWeights) else None for layer in weights.layers]
        experts = LocalExperts(layers, numerics)
    else:
        assert link_opener is not None, "an attention worker needs a way to reach experts"
        experts = RoutedExperts(
            spec,
            numerics,
            launch.peer_timeout_s,
            link_opener(likeness),
            on_change=experts_changed.ring,
            on_wait=turns.renew,
        )
    decoder = Decoder(spec, weights, experts, numerics, num_positions=max_model_len, on_layer=turns.renew)
    engine = Engine(decoder, Tokenizer(path), eos_token_ids(path), options, model_name=launch.served_name)
    whole = weights if is_whole else empty_weights(spec, torch.device("meta"), dtype)
    routed = experts if isinstance(experts, RoutedExperts) else None
    return BuiltEngine(engine, num_parameters(whole), likeness, turns, routed, experts_changed)


def build_expert_host(launch: Launch) -> BuiltExperts:
    """An expert worker's host of the checkpoint that `launch` names, still empty. Raises as `build_engine` does."""
    if launch.num_threads is not None:
        torch.set_num_threads(launch.num_threads)
    device = resolve_device(launch.device)
    checkpoint = open_checkpoint(Path(launch.model_path), device)
    spec, dtype = checkpoint.spec, checkpoint.dtype
    if not any(spec.num_experts):
        raise ConfigError(f"{launch.model_path} is a dense model: it has no experts for a worker to hold", param="role")

    def load(expert_ids: ExpertIds, limit_bytes: int) -> Shard:
        laid_out = device.type == "cpu"
        return load_experts(
            checkpoint.path, expert_ids, device=device, dtype=dtype, limit_bytes=limit_bytes, laid_out=laid_out
        )

    # A GPU that workers share is fuller now than when they have moved their experts: they are told what fits there.
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_bytes(launch, device)
    limit_bytes = int(room * WEIGHTS_SHARE)
    numerics = find_numerics(launch, spec, device, dtype)
    host = ExpertHost(load, spec, numerics, limit_bytes)
    return BuiltExperts(host, find_likeness(checkpoint.path, device, dtype, numerics))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in a tree of tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def weight_bytes(weights: ModelWeights) -> int:
    """Memory of the distinct tensors; a tied embedding counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(weights)}.values())


def num_parameters(weights: ModelWeights) -> int:
    """Distinct parameters."""
    return sum({id(tensor): tensor.numel() for tensor in _tensors(weights)}.values())
