"""The two sides of the comparison, with the same weights and the same batches: the usual loop, and our step."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Context
from rnnlm.train.distributed import Accelerator
from rnnlm.train.step import TrainStep
from step_speed.parts import Place
from step_speed.presets import Preset, make_batches
from step_speed.usual_loop import UsualLoop, UsualModel


class Sides:
    """Both sides at a size, and batches that they go through again and again.

    Args:
        precision: fp32 or bf16.
        batches: how many, one after the other in the streams.
    """

    def __init__(self, size: Preset, precision: str, accelerator: Accelerator, batches: int):
        self.size, self.device = size, accelerator.device
        config = size.config(precision, self.device.type)
        self.rate = config.optim.learning_rate
        self.ours = TrainStep(config, size.vocab_size, accelerator, 0, size.batch)
        model = UsualModel(size.vocab_size, size.embedding_size, size.hidden_size, size.layers, size.dropout)
        copy_weights(self.ours.raw, model)
        self.loop = UsualLoop(model, self.device, self.rate, config.optim.clip_norm, precision == "bf16")

        made = make_batches(size, batches)
        tokens = [batch.tokens.to(torch.int64).t().contiguous() for batch in made]  # (T + 1, B), as a loader gives them
        self._ours = cycle(made)
        self._loops = cycle([(each[:-1], each[1:]) for each in tokens])
        self.inputs = tokens[0][:-1].to(self.device)  # (T, B)

    def run_loop(self) -> float:
        """One step of the usual loop; its loss."""
        return self.loop.step(*next(self._loops))

    def run_ours(self) -> None:
        """One step of ours, as the trainer makes it."""
        self.ours.run(next(self._ours), False, self.rate)

    def loss_difference(self, steps: int) -> float:
        """The largest difference of their losses in nats over so many steps, none of which is finite: infinity."""
        differences = []
        for _ in range(steps):
            self.run_ours()
            ours, theirs = self.ours.report()["loss"], self.run_loop()
            difference = abs(ours - theirs) if ours is not None else float("inf")
            differences.append(difference if difference == difference else float("inf"))
        return max(differences)

    def parameters(self) -> list[Tensor]:
        """Of our model."""
        return list(self.ours.raw.parameters())

    def loop_places(self) -> list[Place]:
        """What belongs to which part of the usual loop."""
        model, optimizer = self.loop.model, self.loop.optimizer
        return [
            (model.embedding, "forward", "embedding"),
            *[(layer, "forward", "recurrence") for layer in model.layers],
            (model.dropout, "forward", "dropout"),
            (model.head, "forward", "head"),
            (nn.functional, "cross_entropy", "head"),
            (nn.utils, "clip_grad_norm_", "update"),
            (optimizer, "zero_grad", "update"),
            (optimizer, "step", "update"),
        ]

    def our_places(self) -> list[Place]:
        """What belongs to which part of our step."""
        model = self.ours.raw
        return [
            (model.embedding, "forward", "embedding"),
            *[(layer, "forward", "recurrence") for layer in model.layers],
            (Context, "dropout", "dropout"),
            (model.head, "loss", "head"),
            (self.ours, "_update", "update"),
        ]


def copy_weights(model: RecurrentLM, usual: UsualModel) -> None:
    """Give the usual model the weights of ours; with a head of another kind, its own stays."""
    pairs: list[tuple[Any, Tensor]] = [(usual.embedding.weight, model.embedding.weight)]
    for theirs, ours in zip(usual.layers, model.layers, strict=True):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        pairs += [(getattr(theirs, f"{name}_l0"), getattr(ours, name)) for name in names]
    if model.config.head == "softmax":
        pairs += [(usual.head.weight, model.head.weight), (usual.head.bias, model.head.bias)]

    with torch.no_grad():
        for copy, weight in pairs:
            copy.copy_(weight)
