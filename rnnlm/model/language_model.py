"""The recurrent language model: embedding -> recurrent layers -> head.

    B substreams, T window, E embedding, H hidden, D width of the head's input, V vocabulary, L layers

Data enters as (B, T), batch first as it lies in the stream; inside, the window comes first, (T, B, ...), as the
recurrent kernels want it. The hidden state is an argument and a result, never a buffer: DDP would overwrite every
rank's with rank 0's. Training returns a loss, not logits; the price is that logits need a call of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnlm.config import ModelConfig
from rnnlm.model.dropout import dropout
from rnnlm.model.heads import linear_cross_entropy, token_losses
from rnnlm.model.layers import STATES, Hidden, RecurrentLayer, named_generator
from rnnlm.model.precision import compute_dtype, full_precision


class RecurrentLM(nn.Module):
    """A recurrent language model over a vocabulary of `vocab_size` pieces.

    The head is a matrix of its own, or with `tied` the token vectors (Press & Wolf 2017), behind a projection H -> E
    where the two sizes differ (as in Melis et al. 2018).

    Args:
        seed: of the initial weights and of the dropout masks.
        loss_chunk_tokens: tokens whose logits are in memory at once.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int, loss_chunk_tokens: int = 512):
        super().__init__()
        self.config, self.vocab_size, self.seed, self.chunk = config, vocab_size, seed, loss_chunk_tokens
        width, hidden = config.embedding_size, config.hidden_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(
            RecurrentLayer(config.cell, width if index == 0 else hidden, hidden) for index in range(config.layers)
        )
        self.projection = nn.Linear(hidden, width, bias=False) if config.tied and width != hidden else nn.Identity()
        self.head = nn.Linear(width if config.tied else hidden, vocab_size)
        self.ran_in: dict[str, str] = {}  # the dtype that each part really trained in, last time
        self._initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        """Token vectors and head uniform in +-init_range (Zaremba et al. 2014), head bias zero, layers by init."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits of an orthogonal matrix depend on the threads that made it
        spread = self.config.init_range
        for name, part in self.named_children():
            if isinstance(part, nn.Embedding | nn.Linear):
                part.weight.data.uniform_(-spread, spread, generator=named_generator(self.seed, name))
        self.head.bias.data.zero_()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, RecurrentLayer)
            layer.initialise(self.config, self.seed, f"layer{index}")
        torch.set_num_threads(threads)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; shared ones are counted where they first occur."""
        counts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = "".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def zero_hidden(self, batch: int) -> Hidden:
        """The state before the first token: each (B, H) zeros."""
        weight = self.embedding.weight
        shape = (batch, self.config.hidden_size)
        return {
            f"layer{index}.{part}": torch.zeros(shape, device=weight.device, dtype=weight.dtype)
            for index in range(self.config.layers)
            for part in STATES[self.config.cell]
        }

    def forward(
        self, tokens: Tensor, hidden: Hidden, targets: Tensor, step: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Hidden]:
        """Loss over one window.

        Args:
            tokens: (B, T) int64
            hidden: the state that the previous window returned, each (B, H); zeros at the start
            targets: (B, T) int64, -1 where masked
            step: () int64, which dropout masks
            rows: (B,) int64 global numbers of the substreams, likewise

        Returns:
            () the summed loss in nats, () the number of targets, and the new state, each (B, H) fp32.
        """
        out, hidden = self._run(tokens, hidden, step, rows)
        self.ran_in["head"] = _name(compute_dtype(self.head.weight))
        wanted = targets.t().reshape(-1)  # (T * B,)
        loss = linear_cross_entropy(out.flatten(0, 1), self.head.weight, self.head.bias, wanted, self.chunk)
        return loss, (wanted >= 0).sum(), hidden

    @torch.no_grad()
    @full_precision()
    def token_losses(self, tokens: Tensor, hidden: Hidden, targets: Tensor) -> tuple[Tensor, Hidden]:
        """Loss of every token, (B, T) in nats, 0 where masked, without dropout or gradients; and the new state."""
        out, hidden = self._run(tokens, hidden)
        losses = token_losses(out.flatten(0, 1), self.head.weight, self.head.bias, targets.t().reshape(-1))
        return losses.view(targets.shape[1], targets.shape[0]).t(), hidden

    @torch.no_grad()
    @full_precision()
    def next_logits(self, tokens: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Logits of the token after the last one, (B, V); and the new state."""
        out, hidden = self._run(tokens, hidden)
        logits: Tensor = self.head(out[-1])
        return logits, hidden

    def _run(
        self, tokens: Tensor, hidden: Hidden, step: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Hidden]:
        """(T, B, D) what the head sees, and the new state; dropout only where `step` and `rows` are given."""

        def drop(x: Tensor, site: int) -> Tensor:
            if step is None or rows is None:
                return x
            locked = self.config.dropout_kind == "locked"
            return dropout(x, self.config.dropout, locked, self.seed, site, step, rows)

        x = drop(self.embedding(tokens.t()), 0)  # (T, B, E)
        after: Hidden = {}
        for index, layer in enumerate(self.layers):
            names = [f"layer{index}.{part}" for part in STATES[self.config.cell]]
            x, states = layer(x, [hidden[name] for name in names])  # (T, B, H)
            if step is not None:  # training; evaluation is always in fp32
                self.ran_in[f"layer{index}"] = _name(x.dtype)
            after.update(zip(names, states, strict=True))
            x = drop(x, index + 1)
        x = self.projection(x)  # (T, B, D)
        return x, after


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
