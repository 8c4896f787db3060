"""The experts of an expert worker: loaded as they are assigned, computed for whoever has a link."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workers.experts.exchange import PeerLink
from workers.experts.shard import ExpertIds, Shard, check_expert_ids, expert_rows
from workers.experts.wire import OK, Call, recv_call, send_reply
from workers.models.spec import ModelSpec
from workers.models.weights import ExpertWeights
from workers.numerics import Numerics

log = logging.getLogger(__name__)

Load = Callable[[ExpertIds, int], Shard]  # reads these experts, which may take so many bytes


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is held of one layer; never changed, only replaced."""

    ids: tuple[int, ...]
    places: torch.Tensor  # [E] int64: an expert's place in `weights`, -1 where it is not here
    weights: ExpertWeights | None


class ExpertHost:
    """Holds what it was last assigned, and serves any number of links, each on a thread of its caller's."""

    def __init__(self, load: Load, spec: ModelSpec, numerics: Numerics, limit_bytes: int) -> None:
        """It starts empty. `limit_bytes` bounds what it holds and what it reads, together."""
        self._load = load
        self._num_experts = spec.num_experts
        self._hidden_size = spec.hidden
        self._numerics = numerics
        self._limit_bytes = limit_bytes
        self._layers = [self._layer(index, (), None) for index in range(len(spec.layers))]
        self._assigning = threading.Lock()
        # The kernels' pool takes one call at a time, and torch's would have a set of threads for each caller.
        self._computing = threading.Lock()
        self.num_calls = self.num_rows = 0  # that were computed
        self.computing_s = 0.0

    @property
    def experts(self) -> ExpertIds:
        """What it holds now, by layer."""
        return tuple(layer.ids for layer in self._layers)

    def assign(self, experts: ExpertIds) -> None:
        """Hold exactly these, by layer, ids ascending. What is new is read while the rest is served, then each layer is
        replaced; so the peak of memory is what was held, what is new, and one layer.

        Blocks; any thread. Raises `CheckpointError` or `ConfigError`, and then nothing has changed.
        """
        check_expert_ids(experts, self._num_experts)
        with self._assigning:
            held = self.experts
            new = tuple(
                tuple(expert for expert in wanted if expert not in set(before))
                for wanted, before in zip(experts, held, strict=True)
            )
            loaded = list(self._load(new, self._limit_bytes - self._held_bytes()).weights)
            for index, wanted in enumerate(experts):
                if wanted != held[index]:
                    weights = _merge(self._layers[index], new[index], loaded[index], wanted)
                    self._layers[index] = self._layer(index, wanted, weights)
                loaded[index] = None  # what was copied is needed no more
        log.info("holds %d experts: %d are new", sum(map(len, experts)), sum(map(len, new)))

    @torch.inference_mode()
    def serve(self, link: PeerLink) -> None:
        """Compute what one attention worker asks for, until it says that no more comes. Raises `PeerLostError`.

        A call for an expert that is not here is answered so, and computed nowhere; the link goes on.
        """
        while (call := recv_call(link, len(self._layers), self._hidden_size)) is not None:
            send_reply(link, *self._answer(call))

    def _answer(self, call: Call) -> tuple[torch.Tensor, int]:
        """-> (output [n, H], an expert that is not here, or `OK`)."""
        layer, ids = self._layers[call.layer], call.expert_ids  # as it is now: it may be replaced meanwhile
        if layer.weights is None:
            return torch.zeros_like(call.rows), int(ids[0])
        if int(highest := ids.max()) >= layer.places.shape[0]:
            return torch.zeros_like(call.rows), int(highest)
        places = layer.places[ids]
        if int(places.min()) < 0:
            return torch.zeros_like(call.rows), int(ids[places < 0][0])
        device, dtype = layer.weights.down.device, layer.weights.down.dtype
        rows, places = call.rows.to(device, dtype), places.to(device)
        with self._computing:
            started = time.perf_counter()
            output = expert_rows(layer.weights, rows, places, self._numerics).to("cpu", call.rows.dtype)
            self.computing_s += time.perf_counter() - started
            self.num_rows += rows.shape[0]
            self.num_calls += 1
        return output, OK

    def _layer(self, index: int, ids: tuple[int, ...], weights: ExpertWeights | None) -> _Layer:
        places = torch.full((self._num_experts[index],), -1, dtype=torch.int64)
        places[torch.tensor(ids, dtype=torch.int64)] = torch.arange(len(ids))
        return _Layer(ids, places, weights)

    def _held_bytes(self) -> int:
        return sum(
            layer.weights.gate_up.nbytes + layer.weights.down.nbytes
            for layer in self._layers
            if layer.weights is not None
        )


def _merge(
    layer: _Layer, new: tuple[int, ...], loaded: ExpertWeights | None, wanted: tuple[int, ...]
) -> ExpertWeights | None:
    """The weights of `wanted`, each from what is held or from what was loaded for `new`."""
    if wanted == new:
        return loaded
    sources = {expert: (layer.weights, place) for place, expert in enumerate(layer.ids)}
    sources |= {expert: (loaded, place) for place, expert in enumerate(new)}
    gate_up, down = [], []
    for expert in wanted:
        weights, place = sources[expert]
        assert weights is not None
        gate_up.append(weights.gate_up[place])
        down.append(weights.down[place])
    return ExpertWeights(_stacked(gate_up), _stacked(down)) if wanted else None


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices [out, in] -> [n, out, in], laid out as each of them is."""
    if matrices[0].stride(0) == 1:
        return torch.stack([matrix.t() for matrix in matrices]).transpose(1, 2)
    return torch.stack(list(matrices))
