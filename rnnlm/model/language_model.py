"""The recurrent language model: embedding -> layers -> head.

    B substreams, T window, E embedding, H width of the layers' output, V vocabulary

Data enters as (B, T), batch first as it lies in the stream; inside, the window comes first, (T, B, ...), as the
recurrent kernels want it. The hidden state is an argument and a result, never a buffer: DDP would overwrite every
rank's with rank 0's. Training returns a loss, not logits; the price is that logits need a call of their own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from rnnlm.config import ModelConfig
from rnnlm.errors import UserError
from rnnlm.model import adaptive  # noqa: F401 - which registers its head
from rnnlm.model.heads import LossOptions, build_head
from rnnlm.model.layers import LAYERS, Context, Hidden, Layer, State, named_generator
from rnnlm.model.precision import compute_dtype, full_precision


class RecurrentLM(nn.Module):
    """A recurrent language model over a vocabulary of `vocab_size` pieces.

    Args:
        seed: of the initial weights and of the dropout masks.
        loss_chunk_tokens, gradient_filter: as in TrainConfig.
        initialise: fill the weights; False where those of a checkpoint come into all of them, since an orthogonal
            matrix of 8,192 x 2,048 alone takes seconds.

    Raises:
        UserError: sizes that are left to the size of a text.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        seed: int,
        loss_chunk_tokens: int = 0,
        initialise: bool = True,
        gradient_filter: bool = False,
    ):
        super().__init__()
        if not (config.hidden_size and config.embedding_size):
            raise UserError("model.hidden_size, model.embedding_size: 0 has a meaning only in a run; give numbers")
        self.config, self.vocab_size, self.seed = config, vocab_size, seed
        vectors = torch.empty(vocab_size, config.embedding_size)  # not by nn.Embedding, which would fill them
        self.embedding = nn.Embedding(vocab_size, config.embedding_size, _weight=vectors)

        layers, width = list[Layer](), config.embedding_size
        for _ in range(config.layers):
            layers.append(LAYERS[config.cell](config, width))
            width = layers[-1].output_size
        self.layers = nn.ModuleList(layers)

        self.head = build_head(config, width, self.embedding, LossOptions(loss_chunk_tokens, gradient_filter))
        self.ran_in: dict[str, str] = {}  # the dtype that each part really trained in, last time
        if initialise:
            self._initialise()

    def _initialise(self) -> None:
        """Token vectors uniform in +-init_range (Zaremba et al. 2014); layers and head as they say themselves."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits of an orthogonal matrix depend on the threads that made it

        spread = self.config.init_range
        self.embedding.weight.data.uniform_(-spread, spread, generator=named_generator(self.seed, "embedding"))
        for name, layer in self.named_layers():
            layer.initialise(self.config, partial(named_generator, self.seed, prefix=f"{name}."))
        self.head.initialise(self.config, partial(named_generator, self.seed))

        torch.set_num_threads(threads)

    def named_layers(self) -> list[tuple[str, Layer]]:
        """("layer0", the first layer), ..."""
        return [(f"layer{index}", layer) for index, layer in enumerate(self.layers) if isinstance(layer, Layer)]

    def states(self) -> dict[str, State]:
        """What the hidden state is made of: "layer0.h", ... -> its declaration."""
        return {f"{name}.{state.name}": state for name, layer in self.named_layers() for state in layer.states()}

    def zero_hidden(self, batch: int) -> Hidden:
        """The state before the first token: each (B, ...), filled as it declares."""
        device = self.embedding.weight.device
        return {
            name: torch.full((batch, *state.shape), state.fill, dtype=state.dtype, device=device)
            for name, state in self.states().items()
        }

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; shared ones are counted where they first occur."""
        counts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = "".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def forward(
        self, tokens: Tensor, hidden: Hidden, targets: Tensor, step: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Hidden]:
        """Loss over one window.

        Args:
            tokens: (B, T) int64
            hidden: the state that the previous window returned; `zero_hidden` at the start
            targets: (B, T) int64, -1 where masked
            step: () int64, of the training, from which the dropout masks are hashed
            rows: (B,) int64 global numbers of the substreams, likewise

        Returns:
            () the summed loss in nats, () the number of targets, and the new state.
        """
        out, hidden = self._run(tokens, hidden, Context(self.seed, step, rows))
        self.ran_in["head"] = _name(compute_dtype(self.embedding.weight))
        wanted = targets.t().contiguous()  # (T, B)
        return self.head.loss(out, wanted), (wanted >= 0).sum(), hidden

    @torch.no_grad()
    @full_precision()
    def token_losses(self, tokens: Tensor, hidden: Hidden, targets: Tensor) -> tuple[Tensor, Hidden]:
        """Loss of every token, (B, T) in nats, 0 where masked, without dropout or gradients; and the new state."""
        out, hidden = self._run(tokens, hidden, Context())
        return self.head.token_losses(out, targets.t()).t(), hidden

    @torch.no_grad()
    @full_precision()
    def advance(self, tokens: Tensor, hidden: Hidden) -> Hidden:
        """The state after tokens (B, T), without dropout or gradients, and without what the head would say."""
        return self._run(tokens, hidden, Context())[1]

    @torch.no_grad()
    @full_precision()
    def next_logits(self, tokens: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Logits of the token after the last one, (B, V); and the new state."""
        out, hidden = self._run(tokens, hidden, Context())
        return self.head.logits(out[-1]), hidden

    def _run(self, tokens: Tensor, hidden: Hidden, context: Context) -> tuple[Tensor, Hidden]:
        """(T, B, H) what the head sees, and the new state."""
        locked, probability = self.config.dropout_kind == "locked", self.config.dropout
        x = context.dropout(self.embedding(tokens.t()), "embedding", probability, locked)  # (T, B, E)

        after: Hidden = {}
        for name, layer in self.named_layers():
            inner, states = context.within(name), [f"{name}.{state.name}" for state in layer.states()]
            x, new = layer(x, [hidden[state] for state in states], inner)  # (T, B, H)
            after.update(zip(states, new, strict=True))
            if context.step is not None:  # training; evaluation is always in fp32
                self.ran_in[name] = _name(x.dtype)
            x = inner.dropout(x, "output", probability, locked)
        return x, after


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
