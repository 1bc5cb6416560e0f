"""The training loop that everyone writes: the side that ours is compared with.

It is that of PyTorch's word_language_model example with an optimizer and autocast as people add them: full logits,
F.cross_entropy, Adam without special flags, the hidden state detached, the loss read at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

States = list[tuple[Tensor, Tensor]]
"""(h, c) of each layer, each (1, B, H)."""


class UsualModel(nn.Module):
    """Embedding, LSTMs with dropout between, and logits over the whole vocabulary."""

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        widths = [embedding_size, *[hidden_size] * (layers - 1)]
        self.layers = nn.ModuleList(nn.LSTM(width, hidden_size) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens: Tensor, states: States | None) -> tuple[Tensor, States]:
        """Logits (T, B, V) of tokens (T, B), and the new states."""
        x = self.dropout(self.embedding(tokens))  # (T, B, E)
        new: States = []
        for index, layer in enumerate(self.layers):
            x, state = layer(x, states[index] if states else None)  # (T, B, H)
            new.append(state)
            x = self.dropout(x)
        return self.head(x), new


class UsualLoop:
    """A step: forward, backward, clip, update, and the loss read.

    Args:
        bf16: run under torch.autocast.
    """

    def __init__(self, model: UsualModel, device: torch.device, learning_rate: float, clip_norm: float, bf16: bool):
        self.model, self.device, self.clip_norm, self.bf16 = model.to(device), device, clip_norm, bf16
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)
        self.states: States | None = None

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """The mean loss in nats of a window: tokens and targets (T, B) int64, on the CPU."""
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        if self.states:
            self.states = [(h.detach(), c.detach()) for h, c in self.states]

        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits, self.states = self.model(tokens, self.states)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()
