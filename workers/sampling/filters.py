"""Which tokens may be drawn: top_k, typical_p, top_p and min_p, in this order, over logits / temperature.

Each filter sees the distribution renormalised over what the filters before it kept, as transformers' chain of logits
warpers does. A token exactly as likely as the last one kept is kept too, so the set never depends on how a sort orders
equal values. At least one token remains.

Only the most likely tokens are sorted: the kept set is nearly always among the first few dozen. Its result does not
depend on how many were looked at: sums run sequentially in float64 (`cumsum`), where `sum` would split by the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

_LEVELS = (128, 1024)  # candidates looked at before the whole vocabulary is sorted
_WORTH = 4  # a level is worth looking at where it is at most this part of the vocabulary
_CHUNK_ELEMENTS = 2**15  # of one pass over rows that need more
OFF = 2.0  # top_p and typical_p that keep everything: sums of probabilities may round to a little over 1


@dataclass(frozen=True, slots=True)
class Filters:
    """Parameters of n rows, each [n, 1]; what a row does not use has its neutral value."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64; the vocabulary's size: off
    typical_p: torch.Tensor  # float64; `OFF`
    top_p: torch.Tensor  # float64; `OFF`
    log_min_p: torch.Tensor  # float32; -inf: off
    any_typical: bool

    def at(self, rows: torch.Tensor) -> Filters:
        return Filters(
            self.temperature[rows],
            self.top_k[rows],
            self.typical_p[rows],
            self.top_p[rows],
            self.log_min_p[rows],
            self.any_typical,
        )


def candidates(logits: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept tokens of `logits` [n, V], most likely first: ids [n, k] and scaled logits [n, k], -inf where dropped.

    Scaled logits are (logit - largest) / T. k is large enough for every row's kept tokens.
    """
    vocab_size = logits.shape[-1]
    # on a GPU a sort is cheaper than the wait for the answer whether a level was enough
    on_cpu = logits.device.type == "cpu"
    levels = [level for level in _LEVELS if on_cpu and level * _WORTH <= vocab_size] + [vocab_size]
    ids, kept, is_open = _look(logits, filters, levels[0])
    for level in levels[1:]:
        if not is_open.any():
            break
        pad = level - ids.shape[-1]
        ids = torch.nn.functional.pad(ids, (0, pad))
        kept = torch.nn.functional.pad(kept, (0, pad), value=-math.inf)
        for rows in is_open.nonzero()[:, 0].split(max(1, _CHUNK_ELEMENTS // level)):
            ids[rows], kept[rows], is_open[rows] = _look(logits[rows], filters.at(rows), level)
    if on_cpu:
        used = (kept != -math.inf).any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        ids, kept = ids[:, :width], kept[:, :width]
    return ids, kept


def _look(logits: torch.Tensor, filters: Filters, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filter the `level` most likely tokens: ids, kept scaled logits, and the rows [n] whose kept set may go on.

    A row is known to end here where the last token looked at is dropped for a reason that holds for every less likely
    one. top_p needs the mass that top_k kept, and typical_p all of its tokens, before they can say so.
    """
    vocab_size = logits.shape[-1]
    values, ids = _most_likely(logits, level)
    largest = values[:, :1].clamp(min=torch.finfo(values.dtype).min)  # a row may have no token left
    values = _top_k((values - largest).div_(filters.temperature), filters.top_k)
    is_open = values[:, -1:] != -math.inf
    mass = values.exp().double()
    total = mass.cumsum(-1)[:, -1:]
    if level < vocab_size and is_open.any():
        total = torch.where(is_open, _total_mass(logits, filters.temperature), total)
    if filters.any_typical:
        values = _typical(values, mass / total, filters.typical_p)
        mass = values.exp().double()
        total = torch.where(filters.typical_p == OFF, total, mass.cumsum(-1)[:, -1:])
    values = _top_p(values, mass, filters.top_p * total)
    values = _min_p(values, filters.log_min_p)
    may_end = (filters.typical_p == OFF) & (filters.top_k == vocab_size)
    is_open &= ~(may_end & (values[:, -1:] == -math.inf))
    return ids, values, is_open[:, 0]


def _total_mass(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The sum of exp((logit - largest) / T) over the vocabulary, [n, 1] float64."""
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    return scaled.softmax(-1).amax(-1, keepdim=True).double().reciprocal_()


def _order(values: torch.Tensor) -> torch.Tensor:
    """The places [n, k] of each row's values in rising order; on a CPU by numpy, whose sort is vectorised."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    return values.argsort(dim=-1)


def _most_likely(logits: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `level` largest of each row in falling order: values [n, level] and ids."""
    rest = logits.shape[-1] - level
    if rest == 0:
        ids = _order(-logits)
        return logits.gather(-1, ids), ids
    found = torch.from_numpy(np.argpartition(logits.numpy(), rest, axis=-1)[:, rest:])
    values = logits.gather(-1, found)
    order = _order(-values)
    return values.gather(-1, order), found.gather(-1, order)


def _drop(values: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(drop, -math.inf)


def _top_k(values: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k largest of sorted `values`; fewer are there where the level is below k."""
    last = values.gather(-1, top_k.clamp(max=values.shape[-1]) - 1)
    return _drop(values, values < last)


def _typical(values: torch.Tensor, share: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022): the tokens whose surprise is nearest to the entropy.

    `share` [n, k] are the probabilities of `values`.
    """
    surprise = -share.log()
    entropy = torch.where(share > 0, share * surprise, 0.0).cumsum(-1)[:, -1:]
    distance = (surprise - entropy).abs()
    order = _order(distance)
    below = (share.gather(-1, order).cumsum(-1) < typical_p).sum(-1, keepdim=True)
    cut = distance.gather(-1, order.gather(-1, below.clamp(max=values.shape[-1] - 1)))
    return _drop(values, (distance > cut) & (typical_p != OFF))


def _top_p(values: torch.Tensor, mass: torch.Tensor, kept_mass: torch.Tensor) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): the most likely tokens up to the one that crosses `kept_mass` [n, 1]."""
    above = mass.cumsum(-1) - mass
    keep = (above < kept_mass) & (values != -math.inf)
    cut = torch.where(keep, values, math.inf).amin(-1, keepdim=True)
    return _drop(values, values < cut)


def _min_p(values: torch.Tensor, log_min_p: torch.Tensor) -> torch.Tensor:
    """Nguyen et al. 2024: at least `min_p` times as likely as the most likely kept token."""
    return _drop(values, values < values.amax(-1, keepdim=True) + log_min_p)
