"""What an attention worker and an expert worker say over a link: a call of rows and experts, then its reply.

A call is [layer, rows, dtype], the rows' experts, the rows; a reply is [the first expert that is not here, or OK] and
the rows' outputs, unweighted. So a reply has one shape whatever it says, and both sides stay in step.

How long a wait may last is the attention worker's to say, by its `Patience` alone. An expert worker waits as long as
the link stands: what holds it up harms nobody else, a dead peer ends each wait at once, and so does one that gives up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.errors import PeerLostError
from workers.experts.exchange import PeerLink
from workers.experts.frame import TensorSpec
from workers.models.spec import ModelSpec

STOP_LAYER = -1  # in a call's place: no more calls
OK = -1
SLOWEST_FLOPS = 4e9  # of an expert worker that is shared with others and still works
WHILE_IT_STANDS_S = 30 * 24 * 3600.0  # gloo knows no wait without an end
MAX_ROWS = 1 << 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their number in a call


@dataclass(frozen=True)
class Patience:
    """How long a peer may take: for an answer at all, and for each row of a call."""

    peer_s: float
    row_s: float = 0.0

    @classmethod
    def for_model(cls, spec: ModelSpec, peer_timeout_s: float) -> Patience:
        row_flops = 6 * spec.hidden * spec.moe.intermediate if spec.moe is not None else 0
        return cls(peer_timeout_s, row_flops / SLOWEST_FLOPS)

    def of(self, num_rows: int) -> float:
        return self.peer_s + num_rows * self.row_s


@dataclass(frozen=True, slots=True)
class Call:
    """Rows of one layer, each for one expert."""

    layer: int
    expert_ids: torch.Tensor  # [n] int64
    rows: torch.Tensor  # [n, H]


def send_call(link: PeerLink, call: Call, deadline_s: float) -> None:
    """Raises `PeerLostError`."""
    header = torch.tensor([call.layer, call.rows.shape[0], DTYPES.index(call.rows.dtype)])
    link.send([header, call.expert_ids.cpu(), call.rows.cpu()], deadline_s)


def send_stop(link: PeerLink, deadline_s: float) -> None:
    """Say that no more calls come. Raises `PeerLostError`."""
    link.send([torch.tensor([STOP_LAYER, 0, 0])], deadline_s)


def recv_call(link: PeerLink, num_layers: int, hidden_size: int) -> Call | None:
    """The next call; None where no more come. Raises `PeerLostError`, also for what is no call."""
    (header,) = link.recv([TensorSpec((3,), torch.int64)], WHILE_IT_STANDS_S)
    layer, num_rows, dtype = header.tolist()
    if layer == STOP_LAYER:
        return None
    if not (0 <= layer < num_layers and 0 < num_rows <= MAX_ROWS and 0 <= dtype < len(DTYPES)):
        link.close()
        raise PeerLostError(f"the peer sent what is no call: layer {layer}, {num_rows} rows, dtype {dtype}")
    specs = [TensorSpec((num_rows,), torch.int64), TensorSpec((num_rows, hidden_size), DTYPES[dtype])]
    expert_ids, rows = link.recv(specs, WHILE_IT_STANDS_S)
    if int(expert_ids.min()) < 0:
        link.close()
        raise PeerLostError("the peer sent what is no call: a negative expert")
    return Call(layer, expert_ids, rows)


def send_reply(link: PeerLink, output: torch.Tensor, missing: int) -> None:
    """`output` [n, H] in the call's dtype; `missing` is an expert that is not here, or `OK`. Raises `PeerLostError`."""
    link.send([torch.tensor([missing]), output.cpu()], WHILE_IT_STANDS_S)


def recv_reply(link: PeerLink, call: Call, deadline_s: float) -> tuple[torch.Tensor, int]:
    """-> (output [n, H], an expert that is not there, or `OK`). Raises `PeerLostError`."""
    status, output = link.recv(
        [TensorSpec((1,), torch.int64), TensorSpec(tuple(call.rows.shape), call.rows.dtype)], deadline_s
    )
    missing = int(status)
    if missing != OK and not bool((call.expert_ids == missing).any()):
        link.close()
        raise PeerLostError(f"the peer says that it lacks expert {missing}, which it was not asked for")
    return output, missing
