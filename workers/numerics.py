"""The two numerics classes, and what this processor needs for the stricter one.

`invariant`: a row's result does not depend on the rows beside it, so neither on batch, chunking nor slot. `fast`: the
same distribution, bits may differ. Matrix products are the one op that breaks invariance: a library picks another
kernel, with another order of additions, by the number of rows. Intel's MKL keeps one order under
``MKL_CBWR=<isa>,STRICT`` (set by the launcher before torch is imported). Where that is not honoured every product is
cut into blocks of one fixed number of rows (`row_block`), so that there is only one shape, hence one kernel. Which
of the two it takes is found by `detect`, by trying. The host kernels (`cuda/host`) need neither: each output is one
chain of additions there, whatever the batch.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from workers.kernels.build import processor
from workers.kernels.native import HostKernels

ROW_BLOCKS = (None, 16)  # tried in this order; None: the library is invariant by itself
PROBE_ROWS = (1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 33, 64, 129)


@dataclass(frozen=True)
class Numerics:
    """A numerics class as the kernels read it."""

    name: Literal["invariant", "fast"]
    native: HostKernels | None = None  # run every op on the host kernels: invariant by construction
    row_block: int | None = (
        None  # without them: every matrix product runs in blocks of this many rows; None: as it comes
    )


FAST = Numerics("fast")


def arithmetic(numerics: Numerics, device: torch.device) -> str:
    """What computes here, in words: workers of one release that say the same get the same bits out of the same ops.

    The host kernels are known by their machine code, which holds compiler, flags and instruction set. What torch does
    depends on its own version, on the processor that its libraries choose their kernels by, and on its threads, which
    cut sums into parts.
    """
    torch_is = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, {' '.join(platform.libc_ver())}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return f"{torch_is}, {name} sm_{major}{minor}, CUDA {torch.version.cuda}, row block {numerics.row_block}"
    if numerics.native is not None:
        return f"{torch_is}, host kernels {numerics.native.digest}"
    chip = hashlib.blake2b(processor().encode(), digest_size=4).hexdigest()
    return (
        f"{torch_is}, {torch.get_num_threads()} threads, processor {chip}, "
        f"MKL_CBWR {os.environ.get('MKL_CBWR', 'unset')}, row block {numerics.row_block}"
    )


def linear_in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """`linear` of x [T, in] in products of exactly `rows` rows each; -> [T, out]."""
    num_tokens = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -num_tokens % rows))
    blocks = [F.linear(block, weight, bias) for block in padded.split(rows)]
    return torch.cat(blocks)[:num_tokens] if blocks else x.new_empty(0, weight.shape[0])


def _is_invariant(shapes: list[tuple[int, int]], row_block: int | None, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    for num_out, num_in in shapes:
        x = torch.randn(max(PROBE_ROWS), num_in, generator=generator).to(dtype)
        weight = laid_out(torch.randn(num_out, num_in, generator=generator).to(dtype))

        def product(rows: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            return F.linear(rows, weight) if row_block is None else linear_in_blocks(rows, weight, None, row_block)

        whole = product(x)
        for count in PROBE_ROWS:
            if not torch.equal(product(x[:count]), whole[:count]):
                return False
            if not torch.equal(product(x[-count:].contiguous()), whole[-count:]):
                return False
    return True


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """A weight [..., out, in] of the same values whose memory runs [..., in, out], as all products here read it."""
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def detect(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    native: HostKernels | None = None,
) -> Numerics:
    """The numerics to run with: `wanted` is auto, invariant or fast; `shapes` [out, in] are the model's products.

    auto is invariant on a CPU and fast on a GPU. Where no form of a product is invariant, the class is `fast`, and
    the caller says so: a class is declared, never pretended.
    """
    if wanted == "auto":
        wanted = "invariant" if device.type == "cpu" else "fast"
    if device.type == "cpu" and dtype == torch.float32 and native is not None:
        return Numerics("invariant" if wanted == "invariant" else "fast", native)
    if wanted == "fast":
        return FAST
    for row_block in ROW_BLOCKS:
        if _is_invariant(shapes, row_block, dtype):
            return Numerics("invariant", row_block=row_block)
    return FAST
