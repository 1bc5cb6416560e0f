"""The learning rate of a step, and what training remembers of its validation losses.

The learning rate is a pure function of the step and of that memory, set before every update: nothing is stepped, so
nothing can be stepped twice. The price: a schedule that reacts to validation keeps its memory in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rnnlm.config import OptimConfig


@dataclass
class ValidationMemory:
    """What decides on plateaus, early stopping and the best checkpoint; saved with every checkpoint."""

    best_loss: float | None = None  # nats per token
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluations_since_cut: int = 0  # without a new best, since the last cut or best
    learning_rate_scale: float = 1.0  # product of the plateau schedule's cuts

    def update(self, loss: float, step: int, config: OptimConfig) -> bool:
        """Add a validation loss; whether it is a new best. One that is not finite never is."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, step
            self.evaluations_since_best = self.evaluations_since_cut = 0
            return True

        self.evaluations_since_best += 1
        self.evaluations_since_cut += 1
        if config.schedule == "plateau" and self.evaluations_since_cut > config.plateau_patience:
            self.learning_rate_scale *= config.plateau_factor
            self.evaluations_since_cut = 0
        return False

    def should_stop(self, config: OptimConfig) -> bool:
        """Whether the patience of early stopping (Prechelt 1998) is used up."""
        return 0 < config.early_stop_patience <= self.evaluations_since_best

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint; Python's JSON keeps every bit of a float."""
        return asdict(self)


def learning_rate(config: OptimConfig, step: int, horizon: int, memory: ValidationMemory) -> float:
    """The learning rate of a step.

    A linear warm-up, lr * (step + 1) / warmup_steps; then constant times the plateau cuts, or the cosine of Loshchilov
    & Hutter 2017, from the peak after the warm-up to final_ratio of it at `horizon` and from there on:

        lr * (final + (1 - final) * (1 + cos(pi * (step - warmup) / (horizon - warmup))) / 2)
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / max(1, horizon - config.warmup_steps))
        return peak * (config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * memory.learning_rate_scale
