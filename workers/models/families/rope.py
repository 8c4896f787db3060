"""Rotary settings of `config.json`: `rope_theta` with `rope_scaling`, or all in one `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping

from workers.models.families.fields import MAX_POSITIONS, ConfigReader
from workers.models.spec import RopeSpec

KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(config: ConfigReader, *, default_theta: float, max_position: int) -> RopeSpec:
    """The rotary embedding, with the defaults of transformers' `modeling_rope_utils`.

    Raises `UnsupportedModelError` for other kinds (dynamic, longrope, mrope …) and unknown settings of a kind.
    """
    theta = config.optional_number("rope_theta")
    # Phi-3's habit, which transformers gives priority for every family.
    original = config.optional_integer("original_max_position_embeddings", high=MAX_POSITIONS)
    name, table = _table(config)
    rope = ConfigReader(table, prefix=f"{name}.")
    inner = rope.optional_number("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        config.invalid("rope_theta", f"{theta}, but {name}.rope_theta is {inner}: leave one out")
    theta = inner or theta or default_theta
    old_kind = rope.text("type", default="default")
    kind = rope.text("rope_type", default=old_kind)
    rope.only("partial_rotary_factor", 1.0)
    spec = _scaled(rope, kind, theta, original, max_position)
    rope.finish(harmless=frozenset({"finetuned"}), neutral={})
    return spec


def _table(config: ConfigReader) -> tuple[str, Mapping[str, object]]:
    """-> (the name of the object that has the settings, the object)."""
    scaling, parameters = config.table("rope_scaling"), config.table("rope_parameters")
    if scaling and parameters and scaling != parameters:
        config.invalid("rope_scaling", "set beside rope_parameters with other values: leave one out")
    name, table = ("rope_parameters", parameters) if parameters else ("rope_scaling", scaling)
    for key, value in table.items():
        if isinstance(value, dict):
            config.unsupported(name, {key: value}, "one setting for all layers is, not one for each type of layer")
    return name, table


def _scaled(rope: ConfigReader, kind: str, theta: float, original: int | None, max_position: int) -> RopeSpec:
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", factor=rope.number("factor"))
    if kind not in ("llama3", "yarn"):
        rope.unsupported("rope_type", kind, f"known are {', '.join(KINDS)}")
    inner = rope.optional_integer("original_max_position_embeddings", high=MAX_POSITIONS)
    original = original or inner or max_position
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.invalid("high_freq_factor", f"{high}, not over low_freq_factor {low}")
        return RopeSpec(
            theta,
            "llama3",
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeSpec(
        theta,
        "yarn",
        factor=rope.number("factor", default=max_position / original),
        original_max_position=original,
        beta_fast=rope.optional_number("beta_fast", positive=False) or 32.0,
        beta_slow=rope.optional_number("beta_slow", positive=False) or 1.0,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale", positive=False),
        mscale_all_dim=rope.optional_number("mscale_all_dim", positive=False),
        truncate=rope.flag("truncate", default=True),
    )


def context_length(rope: RopeSpec, max_position: int) -> int:
    """Tokens a checkpoint is made for: YaRN stretches what it was trained on, whatever `max_position` says."""
    if rope.kind == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position
