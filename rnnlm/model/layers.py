"""Layers: the seam through which a new kind of recurrent layer enters, and the three of PyTorch's kernels.

    B substreams, T window, E width of the input, H width of the output

A layer declares the states that it carries from window to window, takes them and returns new ones; the model, the
training step and the checkpoint handle them by that declaration alone. Nothing is ever written in place: the states of
the window before may still be needed. One class serves LSTM, GRU and tanh RNN: PyTorch's own kernels (cuDNN on GPUs)
under names that say which gates and states they have. It casts its own weights to the precision that autocast asks for,
because autocast itself would run cuDNN's LSTM in fp16 whatever it was asked; the price is that cast at every update.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rnnlm.config import CELLS, ModelConfig
from rnnlm.model.dropout import dropout, place_number
from rnnlm.model.precision import compute_dtype, made_once

Hidden = dict[str, Tensor]
"""The recurrent state of a model: "layer0.h", "layer0.c", "layer1.h", ...: each (B, ...). Row b is substream b's."""

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


@dataclass(frozen=True)
class State:
    """One state that a layer carries from window to window.

    Args:
        name: within the layer, as "h".
        shape: of one row.
        fill: the value of all its elements before the first token.
        layout: a tag that changes when the same numbers mean something else, or when another configuration of the
            kernel would give other bits; a checkpoint with another tag is refused.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    layout: str = ""


@dataclass(frozen=True)
class Context:
    """What a layer knows of the window besides its input.

    Args:
        seed: of the run's dropout masks.
        step: () int64, the step in training; None in evaluation and generation, where nothing is dropped.
        rows: (B,) int64 global numbers of the substreams; None likewise.
        resets: (T, B) bool, True where the states of a row return to their fill before that position; None: nowhere.
        place: the name of the layer, in front of the names of its dropout masks.
        shared: values that a layer of this window leaves for later ones, by a name that both know.
    """

    seed: int = 0
    step: Tensor | None = None
    rows: Tensor | None = None
    resets: Tensor | None = None
    place: str = ""
    shared: dict[str, Tensor] = field(default_factory=dict)

    def within(self, place: str) -> Context:
        """The same for the layer called `place`; shared values stay shared."""
        return replace(self, place=f"{place}.")

    def dropout(self, x: Tensor, place: str, probability: float, locked: bool = False) -> Tensor:
        """x (T, B, F) with dropout by the mask of a named place; as it is outside of training."""
        if self.step is None or self.rows is None:
            return x
        return dropout(x, probability, locked, self.seed, place_number(self.place + place), self.step, self.rows)


class Layer(nn.Module, ABC):
    """A layer of a language model: a function of a window and of the states that the window before has left.

    What must hold for every layer, and is tested for those here: two windows give what one window of both gives, and
    no row depends on another one.
    """

    output_size: int

    @abstractmethod
    def states(self) -> tuple[State, ...]:
        """The states it carries, in the order in which `forward` takes and returns them."""

    @abstractmethod
    def forward(self, x: Tensor, states: Sequence[Tensor], context: Context) -> tuple[Tensor, list[Tensor]]:
        """Run the window.

        Args:
            x: (T, B, E)
            states: each (B, *shape), in the declared dtype; never written to.

        Returns:
            (T, B, output_size) in the precision it ran in, and the states after the last position, as declared.
        """

    @abstractmethod
    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        """Fill the parameters, and nothing else: not called where those of a checkpoint follow.

        `generator(name)` is the source of randomness of the parameter of that name.
        """


LayerFactory = Callable[[ModelConfig, int], Layer]
LAYERS: dict[str, LayerFactory] = {}


def register_layer(name: str, make: LayerFactory) -> None:
    """Let `model.cell=name` stand for the layers that `make(config, input_size)` gives."""
    LAYERS[name] = make
    if name not in CELLS:
        CELLS.append(name)


class RecurrentLayer(Layer):
    """An LSTM, GRU or tanh RNN by PyTorch's kernels.

    LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), gates in the order i, f, g, o:

        i, f, o = sigmoid(W x + b + U h + d),  g = tanh(W x + b + U h + d),  c' = f * c + i * g,  h' = o * tanh(c')

    GRU (Cho et al. 2014; reset gate inside, as cuDNN has it), gates in the order r, z, n:

        r, z = sigmoid(W x + b + U h + d),  n = tanh(W x + b + r * (U h + d)),  h' = (1 - z) * n + z * h

    tanh RNN (Elman 1990):  h' = tanh(W x + b + U h + d)
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int):
        super().__init__()
        self.cell, self.output_size = cell, hidden_size
        rows = GATES[cell] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))  # W
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))  # U
        self.bias_ih = nn.Parameter(torch.empty(rows))  # b
        self.bias_hh = nn.Parameter(torch.empty(rows))  # d: redundant but for the GRU's n; the kernels want both

    def states(self) -> tuple[State, ...]:
        """h, and c for the LSTM, each (H,) in the precision of the weights: what a lower one made is held exactly."""
        return tuple(State(name, (self.output_size,), self.weight_hh.dtype) for name in STATES[self.cell])

    def forward(self, x: Tensor, states: Sequence[Tensor], context: Context) -> tuple[Tensor, list[Tensor]]:
        """One call of the kernel; where rows reset within the window, one for each stretch between."""
        dtype = compute_dtype(self.weight_hh)
        weights = made_once(self, dtype, lambda: self._weights(dtype))
        x = x.to(dtype)
        if context.resets is None:
            return self._run(x, states, weights)

        begins = context.resets.any(dim=1).nonzero().flatten().tolist()  # waits for the device: kernels need the edges
        outputs = []
        for begin, end in itertools.pairwise([0, *(place for place in begins if place), len(x)]):
            keep = ~context.resets[begin, :, None]  # (B, 1)
            states = [torch.where(keep, state, 0.0) for state in states]
            output, states = self._run(x[begin:end], states, weights)
            outputs.append(output)
        return torch.cat(outputs), list(states)

    def _run(self, x: Tensor, states: Sequence[Tensor], weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The kernel over x (T, B, E), with weights and x in the precision to run in."""
        first = [state.to(x.dtype)[None] for state in states]  # (1, B, H)
        # biases, layers, dropout, training (cuDNN keeps what the backward pass needs), bidirectional, batch first
        options = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
        with torch.autocast(x.device.type, enabled=False):
            if self.cell == "lstm":
                out, *last = torch.lstm(x, first, weights, *options)
            elif self.cell == "gru":
                out, *last = torch.gru(x, first[0], weights, *options)
            else:
                out, *last = torch.rnn_tanh(x, first[0], weights, *options)
        return out, [state[0].to(states[0].dtype) for state in last]

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        """W, U, b, d in the precision asked for; on GPUs in one block, as cuDNN wants them."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not self.weight_hh.is_cuda:
            return [weight.to(dtype) for weight in weights]
        block = torch.cat([weight.to(dtype).flatten() for weight in weights])
        sizes = [weight.numel() for weight in weights]
        return [part.view(weight.shape) for part, weight in zip(torch.split(block, sizes), weights, strict=True)]

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        """By model.init; each gate is a matrix of its own."""
        for name, weight in self.named_parameters():
            source = generator(name)
            for gate in torch.split(weight.data, self.output_size):
                if name.startswith("bias"):
                    gate.zero_()
                elif config.init == "uniform":
                    gate.uniform_(-config.init_range, config.init_range, generator=source)
                elif name == "weight_hh":
                    nn.init.orthogonal_(gate, generator=source)
                else:
                    nn.init.xavier_uniform_(gate, generator=source)

        if self.cell == "lstm":
            self.bias_ih.data[self.output_size : 2 * self.output_size] = config.forget_bias


for _cell in GATES:
    register_layer(_cell, lambda config, input_size: RecurrentLayer(config.cell, input_size, config.hidden_size))


def named_generator(seed: int, name: str, prefix: str = "") -> torch.Generator:
    """A CPU generator that depends on seed and name alone, so that weights start alike on every machine."""
    digest = hashlib.blake2b(f"{seed}:{prefix}{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
