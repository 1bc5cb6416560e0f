"""Optimizers: the seam through which a new one enters, and PyTorch's fused Adam, AdamW and SGD.

What training asks of an optimizer: its state tensors declared by name and shape, so that they exist from the first step
on, are saved by name, and are compared with the declaration before a checkpoint's are used; and a step that changes
nothing where a flag on the device says so, since nobody waits for the device to find out. PyTorch's fused optimizers
skip so (`_step_supports_amp_scaling`, made for gradient scaling in fp16); one that cannot is refused, not run wrong.
The price: a foreign optimizer must be taught to read `found_inf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnnlm.config import OPTIMIZERS, OptimConfig
from rnnlm.errors import UserError

Groups = list[dict[str, Any]]


def decay_groups(model: nn.Module, config: OptimConfig) -> Groups:
    """PyTorch's parameter groups: weight decay applies to matrices, not to biases; without it one group is faster."""
    parameters = list(model.parameters())
    if not config.weight_decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class OptimizerKind:
    """What `optim.name` stands for.

    Args:
        build: the optimizer over groups of the model's parameters.
        state: name -> zeros of the shape, dtype and device that the optimizer keeps under it for one parameter, as in
            its `state[parameter]`; it must begin from them as if it had made them itself.
    """

    build: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    state: Callable[[Tensor, OptimConfig], dict[str, Tensor]]
    groups: Callable[[nn.Module, OptimConfig], Groups] = decay_groups


_KINDS: dict[str, OptimizerKind] = {}


def register_optimizer(name: str, kind: OptimizerKind) -> None:
    """Let `optim.name=name` stand for this kind."""
    _KINDS[name] = kind
    if name not in OPTIMIZERS:
        OPTIMIZERS.append(name)


def _rate(groups: Groups, config: OptimConfig) -> float | Tensor:
    """The learning rate; on a GPU a tensor, () fp32, since a CUDA graph keeps a number for ever."""
    device = groups[0]["params"][0].device
    return torch.tensor(config.learning_rate, device=device) if device.type == "cuda" else config.learning_rate


def _adam_state(parameter: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where the fused kernels keep it
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _build_adam(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    rate, betas = _rate(groups, config), (config.beta1, config.beta2)
    return kind(groups, lr=rate, betas=betas, eps=config.eps, fused=True, capturable=isinstance(rate, Tensor))


def _sgd_state(parameter: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}


def _build_sgd(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=_rate(groups, config), momentum=config.momentum, fused=True)


register_optimizer("adam", OptimizerKind(_build_adam, _adam_state))
register_optimizer("adamw", OptimizerKind(_build_adam, _adam_state))
register_optimizer("sgd", OptimizerKind(_build_sgd, _sgd_state))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, with its declared state in place.

    Raises:
        UserError: it cannot skip a step exactly.
    """
    kind = _KINDS[config.name]
    optimizer = kind.build(kind.groups(model, config), config)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"optim.name={config.name}: {type(optimizer).__name__} cannot skip a step whose gradient is not finite "
            "without waiting for the device; make its step() do nothing where its attribute found_inf is 1, and set "
            "_step_supports_amp_scaling = True on it"
        )

    # before the first step: if that one is skipped, fused SGD would leave its momentum uninitialised
    for parameter in model.parameters():
        optimizer.state[parameter] = kind.state(parameter.detach(), config)
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig) -> dict[str, Tensor]:
    """The optimizer's state, in its own memory, as `parameter.key` -> tensor, named like the model's parameters.

    Raises:
        RuntimeError: the optimizer keeps what its kind does not declare, which no checkpoint would hold.
    """
    kind, tensors = _KINDS[config.name], dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        declared = kind.state(parameter.detach().to("meta"), config)
        kept = {key: value for key, value in optimizer.state[parameter].items() if value is not None}
        if kept.keys() != declared.keys():
            raise RuntimeError(
                f"optim.name={config.name}: keeps {', '.join(map(str, kept))} for {name}, but declares "
                f"{', '.join(declared) or 'nothing'}; complete the state of its OptimizerKind"
            )
        tensors |= {f"{name}.{key}": value for key, value in kept.items()}
    return tensors


def clip(gradients: list[Tensor], largest: float) -> Tensor:
    """Scale the gradients down to this norm over all of them (Pascanu et al. 2013), in place; 0: leave them alone.

    The bits are those of torch.nn.utils.clip_grad_norm_, which looks at every tensor in Python.

    Returns:
        () their norm before; where it is not finite, so are they now.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp_(max=1.0))
    return norm


def skip_next_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Let the next step change nothing where `skip`, () bool on the device, is true."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, in all groups; a tensor stays where it is, since a CUDA graph reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
