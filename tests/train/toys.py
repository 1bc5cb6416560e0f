"""Toys that enter by the four seams, as a user's own file would hold them; as a script: launch/train.py with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnlm.config import ModelConfig, OptimConfig
from rnnlm.model.heads import Head, LossOptions, register_head
from rnnlm.model.layers import Context, Layer, State, register_layer
from rnnlm.train.optim import Groups, OptimizerKind, register_optimizer
from rnnlm.train.trackers import Tracker


class TwoDecays(Layer):
    """Two traces of the input that fade at different rates, weighed by how long ago the row began.

    Its states are a matrix in fp64, a count in int64, a number in fp32 and a vector in bf16; it adds what the layer
    below has left in `shared`.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float):
        super().__init__()
        self.output_size, self.rate = hidden_size, dropout
        self.weight = nn.Parameter(torch.empty(hidden_size, input_size))

    def states(self) -> tuple[State, ...]:
        return (
            State("traces", (2, self.output_size), torch.float64, layout="fast, slow"),
            State("seen", (), torch.int64, fill=3),
            State("energy", ()),
            State("last", (self.output_size,), torch.bfloat16),
        )

    def forward(self, x: Tensor, states: Sequence[Tensor], context: Context) -> tuple[Tensor, list[Tensor]]:
        traces, seen, energy, last = states  # (B, 2, H), (B,), (B,), (B, H)
        assert [state.dtype for state in states] == [state.dtype for state in self.states()]
        decay, out = torch.tensor([0.5, 0.9], dtype=torch.float64)[:, None], []
        new = context.dropout(x @ self.weight.T, "recurrent", self.rate, locked=True).double()  # (T, B, H)
        for token in new:
            traces, seen = traces * decay + token[:, None] + 0.1 * last[:, None].double(), seen + 1
            out.append((traces.sum(dim=1) / (seen + energy.sigmoid())[:, None].double().sqrt()).tanh().float())
            energy, last = 0.9 * energy + out[-1].square().mean(dim=1), token.to(torch.bfloat16)

        result = torch.stack(out)
        below = context.shared.get("two decays")
        context.shared["two decays"] = result
        return (result if below is None else result + below), [traces, seen, energy, last]

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        self.weight.data.normal_(0, 0.3, generator=generator("weight"))


class Parity(Head):
    """Whether the next id is odd."""

    predicts_tokens = False

    def __init__(self, config: ModelConfig, input_size: int, embedding: nn.Embedding, options: LossOptions):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, input_size))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.token_losses(x, targets).sum()

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        classes = torch.where(targets < 0, -1, targets % 2)
        losses = F.cross_entropy(
            (x @ self.weight.T).flatten(0, 1), classes.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view(targets.shape)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        self.weight.data.normal_(0, 0.1, generator=generator("parity"))


class SignOfMomentum(torch.optim.Optimizer):
    """Signum (Bernstein et al. 2018), which reads the flag on the device that skips a step."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        skip = getattr(self, "found_inf", torch.zeros(())) > 0
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum, steps = self.state[parameter]["momentum"], self.state[parameter]["steps"]
                assert steps.dtype == torch.int64
                new = 0.9 * momentum + 0.1 * parameter.grad
                momentum.copy_(torch.where(skip, momentum, new))
                steps.add_(~skip)
                parameter.sub_(torch.where(skip, 0.0, group["lr"] * momentum.sign()))


def build_signum(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return SignOfMomentum(groups, {"lr": config.learning_rate})


def signum_state(parameter: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    steps = torch.zeros((), dtype=torch.int64, device=parameter.device)
    return {"momentum": torch.zeros_like(parameter), "steps": steps}


class Collector(Tracker):
    """Keeps what it is given."""

    name = "collector"

    def __init__(self, step: int):
        self.started, self.lines = step, list[tuple[str, Any]]()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        self.lines.append((kind, record["step"]))

    def picture(self, path: Path) -> None:
        self.lines.append(("picture", path.read_bytes()[1:4]))

    def text(self, step: int, text: str) -> None:
        self.lines.append(("text", step))

    def close(self) -> None:
        self.lines.append(("close", None))


def register() -> None:
    """Layer, head and optimizer under names that a configuration can give."""
    register_layer("decays", lambda model, width: TwoDecays(width, model.hidden_size, model.dropout))
    register_head("parity", Parity)
    register_optimizer("signum", OptimizerKind(build_signum, signum_state))


OPTIONS = ("--model.cell=decays", "--model.head=parity", "--optim.name=signum", "--optim.horizon_steps=20")

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
    import train

    from rnnlm.cli import run_entry_point

    register()
    run_entry_point(train.main)
