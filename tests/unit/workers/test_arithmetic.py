"""What a worker says of what computes its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.numerics import KERNELS_DIR
from workers.kernels.build import build_host_kernels
from workers.kernels.native import HostKernels
from workers.numerics import FAST, Numerics, arithmetic

CPU = torch.device("cpu")


def test_what_may_change_a_bit_changes_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [arithmetic(FAST, CPU), arithmetic(Numerics("invariant", row_block=16), CPU)]
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    said.append(arithmetic(FAST, CPU))
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    said.append(arithmetic(FAST, CPU))
    monkeypatch.setattr("workers.numerics.processor", lambda: "flags: another")
    said.append(arithmetic(FAST, CPU))
    assert len(set(said)) == len(said)
    assert said[-1] == arithmetic(FAST, CPU)


@pytest.mark.needs("compiler")
def test_host_kernels_are_known_by_their_machine_code(tmp_path: Path) -> None:
    library = build_host_kernels(KERNELS_DIR)
    copy = tmp_path / "elsewhere.so"
    copy.write_bytes(library.read_bytes())
    other = tmp_path / "other.so"
    other.write_bytes(library.read_bytes() + b"\0")
    here, there, another = (
        arithmetic(Numerics("invariant", HostKernels(path, num_threads)), CPU)
        for path, num_threads in ((library, 1), (copy, 2), (other, 1))
    )
    assert here == there, "neither the path nor the threads matter to them"
    assert another != here
