"""Reads `config.json` field by field, and refuses what nobody read.

A field that is set and that neither the family nor the lists below know could change the result, so it is an error
that names it: nothing is ignored in silence. A field that is null counts as not set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from cluster.errors import CheckpointError, UnsupportedModelError

MAX_SIZE = 1 << 24  # a vocabulary or a width beyond this is a broken file, not a model
MAX_POSITIONS = 1 << 31

# Fields that change no logit: training, bookkeeping, tokens, generation defaults, other libraries' notes.
# fmt: off
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
    "_flash_attn_2_enabled", "_from_model_config", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "custom_pipelines", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id", "experts_implementation",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty",
    "max_length", "max_sequence_length", "max_window_layers", "min_length", "model_type", "name_or_path",
    "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_last_hidden_states", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
})
# fmt: on

# Fields that change the result unless they have one of these values, which say that it is off.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qkv_bias": (False,),
    "quantization_config": ({},),
    "rope_interleaved": (False,),
    "shared_expert_intermediate_size": (0,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}


class ConfigReader:
    """The fields of one JSON object, with their types checked; remembers which were read.

    Every method raises `CheckpointError` for a value of the wrong type or out of range, and `UnsupportedModelError`
    for one that is not built; both name the field and the value.
    """

    def __init__(self, fields: Mapping[str, object], prefix: str = "") -> None:
        """`prefix` stands before each name in messages, such as "rope_scaling."."""
        self._fields = fields
        self._prefix = prefix
        self._read: set[str] = set()

    def value(self, name: str) -> object | None:
        """The field as it is, None where it is null or not there."""
        self._read.add(name)
        return self._fields.get(name)

    def integer(
        self, name: str, *, default: int | None = None, low: int = 1, high: int = MAX_SIZE, alias: str | None = None
    ) -> int:
        """A whole number in [low, high]; without a `default` it must be there, under its name or its `alias`."""
        found = self.optional_integer(name, low=low, high=high)
        if alias is not None and (other := self.optional_integer(alias, low=low, high=high)) is not None:
            if found is not None and found != other:
                self.invalid(name, f"{found}, but {alias} is {other}: they mean the same")
            found = other
        if found is not None:
            return found
        if default is None:
            raise CheckpointError(f"config.json has no {self._prefix}{name}, which is needed", param=name)
        return default

    def optional_integer(self, name: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.invalid(name, f"{value!r}, not a whole number in [{low}, {high}]")
        return value

    def number(self, name: str, *, default: float | None = None, positive: bool = True) -> float:
        """A finite number, over 0 where `positive`; without a `default` it must be there."""
        found = self.optional_number(name, positive=positive)
        if found is not None:
            return found
        if default is None:
            raise CheckpointError(f"config.json has no {self._prefix}{name}, which is needed", param=name)
        return default

    def optional_number(self, name: str, *, positive: bool = True) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.invalid(name, f"{value!r}, not a finite number")
        if positive and value <= 0:
            self.invalid(name, f"{value!r}, not over 0")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.invalid(name, f"{value!r}, neither true nor false")
        return value

    def text(self, name: str, *, default: str) -> str:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.invalid(name, f"{value!r}, not text")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; none where it is not set."""
        value = self.value(name)
        if value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            self.invalid(name, f"{value!r}, not a list of whole numbers")
        return tuple(value)

    def table(self, name: str) -> Mapping[str, object]:
        """A JSON object; an empty one where it is not set."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.invalid(name, f"{value!r}, not an object")
        return value

    def only(self, name: str, *allowed: object) -> None:
        """The field, where it is set, must have one of these values."""
        value = self.value(name)
        if value is not None and value not in allowed:
            self.unsupported(name, value)

    def finish(self, harmless: frozenset[str] = HARMLESS, neutral: Mapping[str, tuple[object, ...]] = NEUTRAL) -> None:
        """Refuse the first field that is set and that nobody knows."""
        for name, value in self._fields.items():
            if value is None or name in self._read or name in harmless or value in neutral.get(name, ()):
                continue
            self.unsupported(name, value)

    def invalid(self, name: str, problem: str) -> NoReturn:
        raise CheckpointError(f"config.json: {self._prefix}{name} is {problem}", param=name)

    def unsupported(self, name: str, value: object, hint: str = "") -> NoReturn:
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "…"
        hint = hint or "it could change the model's output, and this version does not know it for this kind of model"
        raise UnsupportedModelError(f"config.json: {self._prefix}{name} = {shown} is not supported: {hint}", param=name)
