"""Muon for the matrices, AdamW for the rest, over stacked weights.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces a momentum matrix by the nearest
orthogonal one, found by five Newton-Schulz steps; it needs fewer tokens than AdamW, and a CPU is short of tokens.
Router, embeddings and norms stay with AdamW: an orthogonal step would move all experts' rows by the same amount.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
MUON_NAMES = ("q", "k", "v", "o", "gate_up", "down")


@dataclass(frozen=True)
class OptimizerSettings:
    """Peak learning rates and the usual constants; the schedule multiplies the rates by a factor in [0, 1]."""

    muon_rate: float = 0.02
    adam_rate: float = 0.004
    router_rate: float = 0.002
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.01
    max_norm: float = 1.0


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal matrices [..., rows, columns] with the singular vectors of the input."""
    x = matrices.to(torch.bfloat16).flatten(0, -3)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(-2, -1))
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x.transpose(-2, -1) if tall else x).float().view(matrices.shape)


class Optimizer:
    """Updates fp32 weights in place from their gradients. `state` is all it remembers (for checkpoints)."""

    def __init__(self, weights: Tensors, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.state: dict[str, Tensors] = {"first": {}, "second": {}}
        for name, weight in weights.items():
            self.state["first"][name] = torch.zeros_like(weight)
            if name not in MUON_NAMES:
                self.state["second"][name] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, weights: Tensors, grads: Tensors, step: int, factor: float) -> float:
        """One update, `step` counted from 0; returns the gradients' norm before clipping."""
        settings = self.settings
        norm = float(torch.stack([grad.float().norm() for grad in grads.values()]).norm())
        clip = min(1.0, settings.max_norm / (norm + 1e-6))
        for name, weight in weights.items():
            grad = grads[name].float() * clip
            if name in MUON_NAMES:
                self._muon(name, weight, grad, factor)
            else:
                self._adam(name, weight, grad, step, factor)
        return norm

    def _muon(self, name: str, weight: torch.Tensor, grad: torch.Tensor, factor: float) -> None:
        settings = self.settings
        momentum = self.state["first"][name].lerp_(grad, 1 - settings.momentum)
        update = grad.lerp(momentum, settings.momentum)
        if name == "gate_up":  # gate and up are two matrices
            layers, experts, rows, columns = update.shape
            update = update.view(layers * experts * 2, rows // 2, columns)
        rows, columns = update.shape[-2:]
        update = orthogonalize(update).view_as(weight)
        weight.mul_(1 - factor * settings.muon_rate * settings.weight_decay)
        weight.add_(update, alpha=-factor * settings.muon_rate * max(1.0, rows / columns) ** 0.5)

    def _adam(self, name: str, weight: torch.Tensor, grad: torch.Tensor, step: int, factor: float) -> None:
        settings = self.settings
        rate = factor * (settings.router_rate if name == "router" else settings.adam_rate)
        first, second = self.state["first"][name], self.state["second"][name]
        first.lerp_(grad, 1 - settings.betas[0])
        second.lerp_(grad.square(), 1 - settings.betas[1])
        scale = 1 - settings.betas[0] ** (step + 1)
        root = (second / (1 - settings.betas[1] ** (step + 1))).sqrt_().add_(settings.eps)
        weight.addcdiv_(first, root, value=-rate / scale)

    def load(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's `state`."""
        for role, tensors in state.items():
            for name, tensor in tensors.items():
                self.state[role][name].copy_(tensor)
