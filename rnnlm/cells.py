"""Recurrent layers, dropout as a hash, initialisation.

    B substreams, T window, E width of the input, H hidden size

One class serves LSTM, GRU and tanh RNN: PyTorch's own kernels (cuDNN on GPUs) under names that say which gates and
states they have. Each layer casts its own weights to the precision that autocast asks for, because autocast itself
would run cuDNN's LSTM in fp16 whatever it was asked. Dropout masks are a hash of where they apply, so they have no
history to save and no dependence on ranks; the price is a few integer passes over the activations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rnnlm.config import ModelConfig

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


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The precision that products with `weight` run in: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, not in TF32: what is scored or generated does not depend on how training was sped up."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on seed and name alone, so that weights start alike on every machine."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# Multipliers and shifts of "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018): bias 0.17 against 0.5.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
SHIFTS = (16, 15, 16)


def mix(x: Tensor) -> Tensor:
    """A bijective hash of int32 values, elementwise; the same bits on CPU and GPU."""
    x = _fold(x, SHIFTS[0]) * MULTIPLIERS[0]
    x = _fold(x, SHIFTS[1]) * MULTIPLIERS[1]
    return _fold(x, SHIFTS[2])


def _fold(x: Tensor, shift: int) -> Tensor:
    return torch.bitwise_xor(x, (x >> shift) & (2 ** (32 - shift) - 1))  # int32 shifts copy the sign: mask it off


def hashed_bits(seed: int, site: int, step: Tensor, rows: Tensor, places: int, features: int) -> Tensor:
    """Random int32 values, uniform over all 2^32, that are a function of their coordinates alone.

    Args:
        seed, site: which run, and which place in the network.
        step: () int64; a tensor, so that a captured CUDA graph can be replayed with another step.
        rows: (B,) int64 global row numbers.
        places, features: sizes T and F of the other two coordinates.

    Returns:
        (T, B, F) int32
    """
    device = rows.device
    parts = [_mix_number(part) for part in (seed % 2**32, seed >> 32, site)]
    start = _mix_number(_mix_number(_mix_number(parts[0]) ^ parts[1]) ^ parts[2])
    key = mix(mix(_int32(step ^ start)) ^ _int32(step >> 32)).reshape(1)
    row = mix(mix(key ^ _int32(rows)))  # (B,)
    cell = mix(row[None, :] ^ mix(_int32(torch.arange(places, device=device)))[:, None])  # (T, B)
    feature = mix(_int32(torch.arange(features, device=device)) ^ key)  # (F,)
    # both sides are well mixed: one multiplication and one fold between them, and one to spread into the high bits
    bits = cell[:, :, None] + feature  # (T, B, F)
    bits *= MULTIPLIERS[0]
    bits ^= (bits >> SHIFTS[1]).bitwise_and_(2 ** (32 - SHIFTS[1]) - 1)
    bits *= MULTIPLIERS[1]
    return bits


def _mix_number(x: int) -> int:
    """`mix` of one number, 0 <= x < 2^32."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * multiplier % 2**32
    return x


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values."""
    return ((x + 2**31) % 2**32 - 2**31).to(torch.int32)


def dropout(x: Tensor, probability: float, locked: bool, seed: int, site: int, step: Tensor, rows: Tensor) -> Tensor:
    """Zero units with this probability and scale the others by 1 / (1 - probability) (Srivastava et al. 2014).

    Args:
        x: (T, B, F)
        locked: one mask for the whole window instead of one for each position (Gal & Ghahramani 2016).
        rows: (B,) int64 global numbers of the substreams; other arguments as in `hashed_bits`.
    """
    if probability == 0:
        return x
    bits = hashed_bits(seed, site, step, rows, 1 if locked else x.shape[0], x.shape[2])
    keep = bits >= math.floor(probability * 2**32) - 2**31  # (T, B, F) or (1, B, F)
    return x * keep.to(x.dtype).mul_(1 / (1 - probability))
