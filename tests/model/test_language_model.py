"""The model: carried state, the window's edge, heads, parameter counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnnlm.config import ModelConfig
from rnnlm.model.language_model import RecurrentLM

V = 37


def model_of(cell: str = "lstm", **options: object) -> RecurrentLM:
    config = ModelConfig(cell=cell, embedding_size=6, hidden_size=8, layers=2, **options)  # type: ignore[arg-type]
    return RecurrentLM(config, V, seed=5).double()


def window(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_two_windows_with_carried_hidden_equal_one_long_window(cell: str) -> None:
    model = model_of(cell)
    tokens = window(3, 21)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole, after_whole = model.token_losses(inputs, model.zero_hidden(3), targets)
    first, hidden = model.token_losses(inputs[:, :9], model.zero_hidden(3), targets[:, :9])
    second, after_both = model.token_losses(inputs[:, 9:], hidden, targets[:, 9:])

    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-14)
    assert sorted(after_both) == sorted(after_whole)
    for name, state in after_both.items():
        torch.testing.assert_close(state, after_whole[name], rtol=1e-12, atol=1e-14)

    reset, _ = model.token_losses(inputs[:, 9:], model.zero_hidden(3), targets[:, 9:])
    assert not torch.allclose(reset, second), "without the carried state the losses are others"


def test_the_gradient_does_not_cross_a_detached_window_edge() -> None:
    model = model_of()
    step, rows = torch.tensor(0), torch.arange(2)
    tokens = window(2, 11)
    _, _, hidden = model(tokens[:, :5], model.zero_hidden(2), tokens[:, 1:6], step, rows)
    carried = {name: state.detach() for name, state in hidden.items()}

    def tokens_with_gradient(states: dict[str, torch.Tensor]) -> set[int]:
        """Whose embeddings have a gradient from the second window, where it begins with these states."""
        model.zero_grad()
        loss, _, _ = model(tokens[:, 5:10], states, tokens[:, 6:], step, rows)
        loss.backward()
        assert model.embedding.weight.grad is not None
        return set(model.embedding.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist())

    used = tokens_with_gradient(carried)
    assert used <= set(tokens[:, 5:10].flatten().tolist()), "only this window's tokens"
    assert tokens_with_gradient(hidden) > used, "control: without detaching it does cross"


@pytest.mark.parametrize(("tied", "width"), [(False, 6), (True, 6), (True, 8)])
def test_loss_is_that_of_plain_pytorch(tied: bool, width: int) -> None:
    model = RecurrentLM(ModelConfig(embedding_size=width, hidden_size=8, layers=2, tied=tied), V, seed=1).double()
    tokens = window(3, 13)
    targets = tokens[:, 1:].clone()
    targets[1, 5:] = -1

    plain = torch.nn.LSTM(width, 8, num_layers=2).double()
    for index, layer in enumerate(model.layers):
        for name, weight in layer.named_parameters():
            getattr(plain, f"{name}_l{index}").data.copy_(weight)

    # (T, B, H), and the tied head's projection to (T, B, E)
    out, (h, c) = plain(model.embedding(tokens[:, :-1].t()))
    projected = out if model.head.projection is None else out @ model.head.projection.T
    logits = projected @ model.head.weight.T + model.head.bias
    expected = F.cross_entropy(logits.flatten(0, 1), targets.t().flatten(), ignore_index=-1, reduction="sum")

    loss, count, hidden = model(tokens[:, :-1], model.zero_hidden(3), targets, torch.tensor(0), torch.arange(3))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert count.item() == 12 * 3 - 7
    torch.testing.assert_close(torch.stack([hidden["layer0.h"], hidden["layer1.h"]]), h)
    torch.testing.assert_close(torch.stack([hidden["layer0.c"], hidden["layer1.c"]]), c)

    logits_last, _ = model.next_logits(tokens[:, :-1], model.zero_hidden(3))
    torch.testing.assert_close(logits_last, logits[-1].detach())
    assert (model.head.weight is model.embedding.weight) == tied


def test_parameter_counts_by_module() -> None:
    counts = model_of(tied=True).parameter_counts()
    lstm = 4 * 8 * (6 + 8 + 2), 4 * 8 * (8 + 8 + 2)
    assert counts == {
        "embedding": V * 6, "layers0": lstm[0], "layers1": lstm[1], "head": 48 + V,
        "total": V * 6 + sum(lstm) + 48 + V,
    }  # fmt: skip
    assert counts["total"] == sum(p.numel() for p in model_of(tied=True).parameters())


def test_micro_batches_of_substreams_have_the_gradient_of_the_whole() -> None:
    model = model_of(dropout=0.4)
    tokens, step, rows = window(6, 9), torch.tensor(3), torch.arange(6)
    hidden = {name: torch.randn_like(state) for name, state in model.zero_hidden(6).items()}
    whole = model(tokens[:, :-1], hidden, tokens[:, 1:], step, rows)[0]
    expected = torch.autograd.grad(whole, list(model.parameters()))

    losses = [
        model(tokens[s, :-1], {n: h[s] for n, h in hidden.items()}, tokens[s, 1:], step, rows[s])[0]
        for s in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    found = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_weights_start_alike_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = dict(model_of().named_parameters())
    torch.manual_seed(2)
    assert all(torch.equal(first[name], weight) for name, weight in model_of().named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_a_buffer(tied: bool) -> None:
    """DDP would overwrite every rank's buffers with rank 0's at each forward."""
    assert not list(model_of(tied=tied).buffers())


def test_weights_start_alike_whatever_the_number_of_threads() -> None:
    threads, models = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        models.append(RecurrentLM(ModelConfig(embedding_size=64, hidden_size=256, layers=1), V, seed=1))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)

    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), other.parameters(), strict=True))
