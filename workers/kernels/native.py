"""The host kernels through ctypes. Each method's reference twin is the function of its name beside this file."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch

from cluster.errors import ConfigError

ABI_VERSION = 4

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "linear": (*[_POINTER] * 4, *[_INT] * 4),
    "rms_norm": (*[_POINTER] * 3, _INT, _INT, _DOUBLE, _INT),
    "norm_rope_append": (
        *[_POINTER] * 3, _INT, _DOUBLE, *[_POINTER] * 5, _DOUBLE, _POINTER, *[_INT] * 6,
    ),
    "paged_attention": (*[_POINTER] * 4, _INT, _POINTER, _INT, _DOUBLE, _POINTER, *[_INT] * 5),
    "moe_route": (*[_POINTER] * 3, *[_INT] * 5),
    "moe_experts": (*[_POINTER] * 6, *[_INT] * 6),
    "moe_combine": (*[_POINTER] * 3, *[_INT] * 4),
    "gumbel_argmax": (*[_POINTER] * 6, *[_INT] * 3),
    "swiglu": (*[_POINTER] * 2, *[_INT] * 3),
}  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class HostKernels:
    """float32 kernels on the CPU. Tensors are contiguous unless said otherwise; weights lie [in, out] in memory."""

    def __init__(self, library: Path, num_threads: int) -> None:
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise ConfigError(f"the host kernels in {library} cannot be loaded: {error}") from error
        loaded.foretoken_abi_version.restype = _INT
        if (version := loaded.foretoken_abi_version()) != ABI_VERSION:
            raise ConfigError(f"{library} has ABI version {version}, this program needs {ABI_VERSION}: remove the file")
        self._functions = {}
        for name, types in _SIGNATURES.items():
            function = getattr(loaded, f"foretoken_{name}")
            function.argtypes, function.restype = types, None
            self._functions[name] = function
        self.num_threads = num_threads
        self.digest = hashlib.blake2b(library.read_bytes(), digest_size=8).hexdigest()  # of the machine code
        self._linear = self._functions["linear"]
        self._rms_norm = self._functions["rms_norm"]
        self._swiglu = self._functions["swiglu"]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in], weight [out, in] whose transpose is contiguous, bias [out] or None -> [T, out]."""
        num_out, num_in = weight.shape
        assert weight.stride(0) == 1, "the weight does not lie [in, out]"
        x = x.contiguous()
        y = torch.empty(x.shape[0], num_out)
        self._linear(
            x.data_ptr(), weight.data_ptr(), _pointer(bias), y.data_ptr(),
            x.shape[0], num_in, num_out, self.num_threads,
        )  # fmt: skip
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [T, H], weight [H] -> [T, H]."""
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], eps, self.num_threads)
        return y

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2I] -> [T, I]."""
        y = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._swiglu(gate_up.data_ptr(), y.data_ptr(), y.shape[0], y.shape[1], self.num_threads)
        return y

    def norm_rope_append(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        kv_slots: torch.Tensor,
        num_heads: int,
        clip: float | None,
    ) -> torch.Tensor:
        """See `workers.kernels.norm_rope_append`."""
        _, num_kv_heads, page_size, head_dim = v_cache.shape
        q = torch.empty(qkv.shape[0], num_heads, head_dim)
        self._functions["norm_rope_append"](
            qkv.data_ptr(), _pointer(q_norm), _pointer(k_norm), 0 if q_norm is None else q_norm.shape[0], eps,
            cos.data_ptr(), sin.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), kv_slots.data_ptr(),
            clip or 0.0, q.data_ptr(), qkv.shape[0], num_heads, num_kv_heads, head_dim, page_size,
            self.num_threads,
        )  # fmt: skip
        return q

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        blocks: torch.Tensor,
        page_ids: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """q [T, num_heads, head_dim]; blocks and page_ids as in `AttentionPlan` -> [T, num_heads, head_dim]."""
        _, num_kv_heads, page_size, head_dim = v_cache.shape
        out = torch.empty_like(q)
        self._functions["paged_attention"](
            q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), blocks.data_ptr(), blocks.shape[0],
            page_ids.data_ptr(), window or 0, scale, out.data_ptr(), q.shape[1], num_kv_heads, head_dim, page_size,
            self.num_threads,
        )  # fmt: skip
        return out

    def moe_route(self, logits: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """See `workers.kernels.moe_route`."""
        num_tokens, num_experts = logits.shape
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        topk_weights = torch.empty(num_tokens, top_k)
        self._functions["moe_route"](
            logits.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(), num_tokens, num_experts, top_k,
            int(norm_topk_prob), self.num_threads,
        )  # fmt: skip
        return topk_ids, topk_weights

    def moe_experts(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        """See `workers.kernels.moe_experts`; the weights' last two dimensions are transposed in memory."""
        num_tokens, top_k = topk_ids.shape
        num_experts, hidden_size, intermediate = down.shape
        assert gate_up.stride(1) == down.stride(1) == 1, "the experts do not lie [in, out]"
        out = torch.empty(num_tokens, hidden_size)
        self._functions["moe_experts"](
            hidden.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(),
            out.data_ptr(), num_tokens, top_k, num_experts, hidden_size, intermediate, self.num_threads,
        )  # fmt: skip
        return out

    def moe_combine(self, by_choice: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `workers.kernels.moe_combine`."""
        num_tokens, top_k, hidden_size = by_choice.shape
        out = torch.empty(num_tokens, hidden_size)
        self._functions["moe_combine"](
            by_choice.data_ptr(), topk_weights.data_ptr(), out.data_ptr(), num_tokens, top_k, hidden_size,
            self.num_threads,
        )  # fmt: skip
        return out

    def gumbel_argmax(
        self,
        logits: torch.Tensor,
        salts: torch.Tensor,
        keys: torch.Tensor | None,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's largest logit + temperature * noise, and where it is; NaN where any is.

        logits [R, V]; salts [V] int64 and keys [R] int64 as in `GumbelNoise`, keys None: no noise; temperature [R].
        -> (values [R], ids [R] int64).
        """
        logits = logits.contiguous()
        num_rows, vocab_size = logits.shape
        values, ids = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
        self._functions["gumbel_argmax"](
            logits.data_ptr(), salts.data_ptr(), _pointer(keys), _pointer(temperature), values.data_ptr(),
            ids.data_ptr(), num_rows, vocab_size, self.num_threads,
        )  # fmt: skip
        return values, ids
