"""The models and batches that a step is measured on, and their data: tokens by Zipf's law, the same for all sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rnnlm.cli import read_config
from rnnlm.config import Config
from rnnlm.data.substreams import Batch
from rnnlm.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A model, and the batch that it trains on.

    Args:
        vocab_size: V, pieces.
        embedding_size, hidden_size, layers: E, H, L of an LSTM.
        dropout: for speed; losses are compared without.
        batch, window: substreams, and tokens of each in a step.
        head: of our side; the usual loop has full logits always.
        scaled: what was made smaller than the preset is, for printing; empty: nothing.
        options: of our side, besides, as in --train.loss_chunk_tokens=1024.
    """

    vocab_size: int
    embedding_size: int
    hidden_size: int
    layers: int
    dropout: float
    batch: int
    window: int
    head: str = "softmax"
    scaled: str = ""
    options: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Targets of a step."""
        return self.batch * self.window

    def config(self, precision: str, device: str) -> Config:
        """What a user would write for it.

        Raises:
            UserError: an option that the preset gives itself, or one that is wrong.
        """
        own = {
            "model.embedding_size": self.embedding_size, "model.hidden_size": self.hidden_size,
            "model.layers": self.layers, "model.dropout": self.dropout, "model.head": self.head,
            "model.init": "uniform", "model.init_range": 0.05, "optim.learning_rate": 0.001,
            "train.global_batch_size": self.batch, "train.seq_len": self.window, "train.precision": precision,
            "train.device": device,
        }  # fmt: skip
        for option in self.options:
            key = option.removeprefix("--").partition("=")[0]
            if key in own:
                raise UserError(f"{option}: {key} is the preset's own; choose another preset, or another option")
        return read_config(("model", "optim", "train"), None, [f"--{key}={own[key]}" for key in own] + [*self.options])


PRESETS = {
    "small": Preset(10_000, 650, 650, 2, 0.5, 20, 35),  # the medium LSTM of Zaremba et al. 2014
    "imdb": Preset(16_000, 256, 512, 2, 0.2, 256, 32),  # configs/imdb.yaml
    "notebook": Preset(50_257, 512, 512, 2, 0.2, 64, 32),  # the vocabulary of GPT-2
    "large-batch": Preset(10_000, 650, 650, 2, 0.5, 512, 35),
    "wide": Preset(256, 64, 4096, 1, 0.0, 128, 256),  # bytes, as Radford et al. 2017
    "big-vocabulary": Preset(793_471, 512, 1024, 2, 0.1, 128, 20, "adaptive"),  # that of the One Billion Word benchmark
}

# What two cores do in minutes: the same vocabulary and layers, with fewer rows, a shorter window, narrower layers.
ON_CPU = {
    "wide": replace(PRESETS["wide"], batch=8, window=64, scaled="batch 8 of 128, window 64 of 256"),
    "big-vocabulary": replace(
        PRESETS["big-vocabulary"], embedding_size=128, hidden_size=128, batch=8,
        scaled="widths 128 of 512 and 1024, batch 8 of 128",
    ),
}  # fmt: skip


def preset(name: str, device: str) -> Preset:
    """The preset of this name, as it is measured on a device."""
    return ON_CPU.get(name, PRESETS[name]) if device == "cpu" else PRESETS[name]


def without_dropout(full: Preset) -> Preset:
    """For losses that can be compared: the masks of two sides are not the same."""
    return replace(full, dropout=0.0)


def reduced(full: Preset) -> Preset:
    """A size at which 50 steps take seconds on a CPU: the same layers and options."""
    return replace(
        full, vocab_size=min(full.vocab_size, 2000), embedding_size=min(full.embedding_size, 128),
        hidden_size=min(full.hidden_size, 128), batch=min(full.batch, 16),
    )  # fmt: skip


def tiny(full: Preset) -> Preset:
    """The same graph with next to no arithmetic: what is left is the host's time."""
    return replace(full, vocab_size=32, embedding_size=8, hidden_size=8, batch=2, window=2)


def make_batches(size: Preset, steps: int, seed: int = 0) -> list[Batch]:
    """Consecutive windows of `batch` substreams, tokens drawn with probability 1 / (number of the piece + 1)."""
    weights = 1 / np.arange(1, size.vocab_size + 1)
    shape = (size.batch, steps * size.window + 1)
    drawn = np.random.default_rng(seed).choice(size.vocab_size, shape, p=weights / weights.sum())
    tokens = torch.from_numpy(drawn.astype(np.uint16 if size.vocab_size <= 2**16 else np.uint32))

    lengths = torch.full((size.batch,), size.window)
    starts = torch.arange(size.batch) * shape[1]
    return [
        Batch(step, tokens[:, at : at + size.window + 1].clone(), lengths, starts + at)
        for step, at in enumerate(range(0, steps * size.window, size.window))
    ]
