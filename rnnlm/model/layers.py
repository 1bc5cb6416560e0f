"""Recurrent layers, dropout as a hash, initialisation.

    B substreams, T window, E width of the input, H hidden size

One class serves LSTM, GRU and tanh RNN: PyTorch's own kernels (cuDNN on GPUs) under names that say which gates and
states they have. Each layer casts its own weights to the precision that autocast asks for, because autocast itself
would run cuDNN's LSTM in fp16 whatever it was asked. Dropout masks are a hash of where they apply, so they have no
history to save and no dependence on ranks; the price is a few integer passes over the activations.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from rnnlm.config import ModelConfig
from rnnlm.model.precision import compute_dtype

Hidden = dict[str, Tensor]
"""The recurrent state: "layer0.h", "layer0.c", "layer1.h", ...: each (B, H), fp32. Row b belongs to substream b."""
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


class RecurrentLayer(nn.Module):
    """One recurrent layer over a window.

    LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), gates in the order i, f, g, o:

        i, f, o = sigmoid(W x + b + U h + d),  g = tanh(W x + b + U h + d),  c' = f * c + i * g,  h' = o * tanh(c')

    GRU (Cho et al. 2014; reset gate inside, as cuDNN has it), gates in the order r, z, n:

        r, z = sigmoid(W x + b + U h + d),  n = tanh(W x + b + r * (U h + d)),  h' = (1 - z) * n + z * h

    tanh RNN (Elman 1990):  h' = tanh(W x + b + U h + d)
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int):
        super().__init__()
        self.cell, self.hidden_size = cell, hidden_size
        rows = GATES[cell] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))  # W
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))  # U
        self.bias_ih = nn.Parameter(torch.empty(rows))  # b
        self.bias_hh = nn.Parameter(torch.empty(rows))  # d: redundant but for the GRU's n; the kernels want both

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the window.

        Args:
            x: (T, B, E)
            states: h, and c for the LSTM, each (B, H)

        Returns:
            (T, B, H) in the precision it ran in, and the states after the last token, each (B, H) fp32.
        """
        dtype = compute_dtype(self.weight_hh)
        weights = self._weights(dtype)
        first = [state.to(dtype)[None] for state in states]  # (1, B, H); what `dtype` made comes back exactly
        # biases, layers, dropout, training (cuDNN keeps what the backward pass needs), bidirectional, batch first
        options = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
        with torch.autocast(x.device.type, enabled=False):
            if self.cell == "lstm":
                out, *last = torch.lstm(x.to(dtype), first, weights, *options)
            elif self.cell == "gru":
                out, *last = torch.gru(x.to(dtype), first[0], weights, *options)
            else:
                out, *last = torch.rnn_tanh(x.to(dtype), first[0], weights, *options)
        return out, [state[0].to(states[0].dtype) for state in last]

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        """W, U, b, d in the precision asked for; on GPUs in one block, as cuDNN wants them at every call."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if not self.weight_hh.is_cuda:
            return [weight.to(dtype) for weight in weights]
        block = torch.cat([weight.to(dtype).flatten() for weight in weights])
        sizes = [weight.numel() for weight in weights]
        return [part.view(weight.shape) for part, weight in zip(torch.split(block, sizes), weights, strict=True)]

    def initialise(self, config: ModelConfig, seed: int, name: str) -> None:
        """Fill the weights, each from its own (seed, name), so that no other part's size changes them."""
        for part, weight in self.named_parameters():
            generator = named_generator(seed, f"{name}.{part}")
            for gate in torch.split(weight.data, self.hidden_size):  # each gate is a matrix of its own
                if part.startswith("bias"):
                    gate.zero_()
                elif config.init == "uniform":
                    gate.uniform_(-config.init_range, config.init_range, generator=generator)
                elif part == "weight_hh":
                    nn.init.orthogonal_(gate, generator=generator)
                else:
                    nn.init.xavier_uniform_(gate, generator=generator)
        if self.cell == "lstm":
            self.bias_ih.data[self.hidden_size : 2 * self.hidden_size] = config.forget_bias


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on seed and name alone, so that weights start alike on every machine."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
