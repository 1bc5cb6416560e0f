"""Optimizers, learning-rate schedules, and what training remembers of its validation losses.

The learning rate is a pure function of the step and of that memory, set before every update: nothing is stepped, so
nothing can be stepped twice. The price: a schedule that reacts to validation keeps its memory in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rnnlm.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters; weight decay applies to matrices, not to biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
        if config.momentum:  # else a first step that is skipped would leave it as it found its memory
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        return sgd
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter.key` -> tensor, named like the model's parameters."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # SGD without momentum keeps None
    }


def expected_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Names, shapes and dtypes (as `meta` tensors) of what `optimizer_tensors` gives after a step."""
    moments = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    keys = ("exp_avg", "exp_avg_sq") if moments else ("momentum_buffer",) * bool(optimizer.defaults["momentum"])
    expected: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        expected |= {f"{name}.{key}": torch.empty_like(parameter, device="meta") for key in keys}
        if moments:
            expected[f"{name}.step"] = torch.empty((), dtype=torch.float32, device="meta")
    return expected


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; scalars stay where the fused kernels keep them."""
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in found.items()}
