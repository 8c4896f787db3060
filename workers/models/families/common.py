"""What the families share: from the fields of `config.json` to a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import CheckpointError
from workers.models.families.fields import MAX_POSITIONS, ConfigReader
from workers.models.families.names import MoENames
from workers.models.families.rope import context_length, read_rope
from workers.models.spec import LayerSpec, ModelSpec, MoESpec, QKNorm

MAX_LAYERS = 10_000
MAX_WIDTH = 1 << 20
MAX_EXPERTS = 1 << 16

Mlp = Literal["dense", "moe"]


@dataclass(frozen=True)
class Family:
    """A `model_type`: how its `config.json` is read, and what its checkpoints call a routed block (first: the hub)."""

    model_type: str
    read: Callable[[ConfigReader], ModelSpec]
    moe_layouts: tuple[MoENames, ...] = ()


def num_layers(config: ConfigReader) -> int:
    return config.integer("num_hidden_layers", high=MAX_LAYERS)


def read_moe(
    config: ConfigReader,
    *,
    intermediate: str = "moe_intermediate_size",
    norm_topk_prob: bool,
    shared_intermediate: int = 0,
) -> MoESpec:
    """The routed block; `intermediate` is the field with an expert's width."""
    num_experts = config.integer("num_experts", alias="num_local_experts", high=MAX_EXPERTS)
    return MoESpec(
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok", high=num_experts),
        intermediate=config.integer(intermediate, high=MAX_WIDTH),
        norm_topk_prob=norm_topk_prob,
        shared_intermediate=shared_intermediate,
    )


def sparse_mlps(config: ConfigReader) -> list[Mlp]:
    """Which layers are routed: each `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = set(config.integers("mlp_only_layers"))
    if outside := sorted(i for i in dense if not 0 <= i < num_layers(config)):
        raise CheckpointError(
            f"config.json: mlp_only_layers names layer {outside[0]}, the model has {num_layers(config)}",
            param="mlp_only_layers",
        )
    return ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(num_layers(config))]


def no_windows(config: ConfigReader) -> list[int | None]:
    """For families whose attention never slides; a window that is set and not switched off is refused."""
    if config.flag("use_sliding_window", default=True):
        config.only("sliding_window", 0)
        config.only("use_sliding_window", False)
    else:
        config.value("sliding_window")
    return _agreeing(config, [None] * num_layers(config))


def windows_everywhere(config: ConfigReader, *, switched: bool) -> list[int | None]:
    """For families in which every layer slides or none. `switched`: only with `use_sliding_window`.

    `max_window_layers` plays no part in these, as in transformers.
    """
    window = read_window(config) if switched else config.optional_integer("sliding_window", high=MAX_POSITIONS)
    return _agreeing(config, [window] * num_layers(config))


def windows_by_layer(config: ConfigReader, slides: Callable[[int, int], bool]) -> list[int | None]:
    """For families that take `layer_types`, or without it `slides(layer, max_window_layers)`."""
    window = read_window(config)
    types = layer_types(config)
    if types is not None:
        if window is None and "sliding_attention" in types:
            config.unsupported("layer_types", types, "it has sliding_attention, but no sliding window is switched on")
        return [window if kind == "sliding_attention" else None for kind in types]
    border = config.integer("max_window_layers", default=28, low=0)
    return [window if window is not None and slides(i, border) else None for i in range(num_layers(config))]


def read_window(config: ConfigReader) -> int | None:
    """`sliding_window` where `use_sliding_window` switches it on."""
    if not config.flag("use_sliding_window", default=False):
        config.value("sliding_window")
        return None
    return config.optional_integer("sliding_window", high=MAX_POSITIONS)


def layer_types(config: ConfigReader) -> list[str] | None:
    """The kind of each layer's attention, None where it is not set."""
    types = config.value("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers(config):
        config.invalid(
            "layer_types", f"{types!r}, not a list with one entry for each of the {num_layers(config)} layers"
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            config.unsupported("layer_types", kind, "known are full_attention and sliding_attention")
    return types


def _agreeing(config: ConfigReader, windows: list[int | None]) -> list[int | None]:
    """`windows`, once `layer_types`, which these families do not read, is seen to say the same."""
    types = layer_types(config)
    if types is not None and types != ["full_attention" if w is None else "sliding_attention" for w in windows]:
        config.unsupported("layer_types", types, "in this kind of model the layers are all alike")
    return windows


def decoder_spec(
    config: ConfigReader,
    *,
    windows: Sequence[int | None],
    mlps: Sequence[Mlp] | None = None,
    moe: MoESpec | None = None,
    default_theta: float = 10_000.0,
    default_rms_eps: float = 1e-6,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: QKNorm = "none",
    clip_qkv: float | None = None,
) -> ModelSpec:
    """The fields that all families share, and with them the whole spec. `mlps` None: all layers dense."""
    mlps = mlps or ["dense"] * len(windows)
    hidden = config.integer("hidden_size", high=MAX_WIDTH)
    num_heads = config.integer("num_attention_heads", high=MAX_WIDTH)
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads, high=MAX_WIDTH)
    if num_heads % num_kv_heads:
        config.invalid("num_key_value_heads", f"{num_kv_heads}, which does not divide num_attention_heads {num_heads}")
    head_dim = config.optional_integer("head_dim", high=MAX_WIDTH) or default_head_dim
    if head_dim is None:
        if hidden % num_heads:
            config.invalid("hidden_size", f"{hidden}, no multiple of num_attention_heads {num_heads}, without head_dim")
        head_dim = hidden // num_heads
    if head_dim % 2:
        config.invalid("head_dim", f"{head_dim}, which rotary positions cannot halve")
    max_position = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    rope = read_rope(config, default_theta=default_theta, max_position=max_position)
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        config.unsupported("hidden_act", activation, "only silu is")
    return ModelSpec(
        family=config.text("model_type", default=""),
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        layers=tuple(LayerSpec(mlp, window) for mlp, window in zip(mlps, windows, strict=True)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate=config.integer("intermediate_size", default=None if "dense" in mlps else 0, high=MAX_WIDTH),
        rms_eps=config.number("rms_norm_eps", default=default_rms_eps),
        rope=rope,
        max_position=context_length(rope, max_position),
        tie_embeddings=config.flag("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
        moe=moe if "moe" in mlps else None,
    )
