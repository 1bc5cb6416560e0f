"""Recurrent layers against a slow, obvious reference; resets within a window; initialisation."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from rnnlm.config import ModelConfig
from rnnlm.model.layers import STATES, Context, RecurrentLayer, named_generator

CELLS = ("lstm", "gru", "rnn")


def layer_of(cell: str, config: ModelConfig | None = None) -> RecurrentLayer:
    layer = RecurrentLayer(cell, 5, 7)
    layer.initialise(config or ModelConfig(init="uniform", init_range=0.5), partial(named_generator, 3))
    for bias in (layer.bias_ih, layer.bias_hh):
        torch.nn.init.uniform_(bias, -1, 1, generator=torch.Generator().manual_seed(0))
    return layer.double()


def reference(layer: RecurrentLayer, x: torch.Tensor, states: list[torch.Tensor]) -> tuple[torch.Tensor, list]:
    """The equations of the docstring, one token at a time.

    x is (T, B, 5), the output (T, B, 7), each state before and after (B, 7).
    """
    h, out = states[0], []
    c = states[1] if layer.cell == "lstm" else h
    for token in x:
        a = token @ layer.weight_ih.T + layer.bias_ih  # (B, gates * 7)
        b = h @ layer.weight_hh.T + layer.bias_hh

        if layer.cell == "lstm":
            i, f, g, o = (a + b).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif layer.cell == "gru":
            (ar, az, an), (br, bz, bn) = a.chunk(3, dim=1), b.chunk(3, dim=1)
            r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
            h = (1 - z) * (an + r * bn).tanh() + z * h
        else:
            h = (a + b).tanh()
        out.append(h)

    return torch.stack(out), [h, c][: len(states)]


@pytest.mark.parametrize("cell", CELLS)
def test_equations_values_and_gradients(cell: str) -> None:
    layer = layer_of(cell)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(4, 7, generator=draw, dtype=torch.float64) for _ in STATES[cell]]
    found, expected = layer(x, states, Context()), reference(layer, x, states)

    for mine, theirs in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)

    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(out.sin().sum(), inputs) for out, _ in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_really_runs_in_bf16_and_returns_fp32_states_that_lose_nothing(cell: str) -> None:
    layer = layer_of(cell).float()
    x, states = torch.randn(6, 3, 5), [torch.zeros(3, 7) for _ in STATES[cell]]
    with torch.autocast("cpu", torch.bfloat16):
        out, after = layer(x, states, Context())

    assert out.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in after)
    assert torch.equal(after[0], out[-1].float())
    assert torch.equal(after[0].to(torch.bfloat16).float(), after[0])

    out.float().sum().backward()
    assert layer.weight_hh.grad is not None
    assert layer.weight_hh.grad.dtype == torch.float32


def test_initialisation_by_name() -> None:
    layer = RecurrentLayer("lstm", 5, 7)
    layer.initialise(ModelConfig(init="orthogonal", forget_bias=1.5), partial(named_generator, 3))
    for gate in layer.weight_hh.detach().split(7):
        torch.testing.assert_close(gate @ gate.T, torch.eye(7), rtol=0, atol=1e-5)
    assert layer.bias_ih.tolist() == [0.0] * 7 + [1.5] * 7 + [0.0] * 14
    assert not layer.bias_hh.any()
    limit = (6 / (5 + 7)) ** 0.5  # Glorot & Bengio 2010, equation 16
    assert 0.8 * limit < layer.weight_ih.abs().max().item() <= limit

    other = RecurrentLayer("lstm", 9, 7)
    other.initialise(ModelConfig(init="orthogonal"), partial(named_generator, 3))
    assert torch.equal(layer.weight_hh, other.weight_hh), "the size of another weight changes nothing"


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_that_resets_within_the_window_restarts_from_zero_alone(cell: str) -> None:
    layer = layer_of(cell)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, 5, generator=draw, dtype=torch.float64)
    states = [torch.randn(4, 7, generator=draw, dtype=torch.float64) for _ in STATES[cell]]
    resets = torch.zeros(9, 4, dtype=torch.bool)
    resets[0, 0] = resets[3, 1] = resets[3, 2] = resets[8, 1] = True
    found, after = layer(x, states, Context(resets=resets))

    for row in range(4):
        own = slice(row, row + 1)
        begins = resets[:, row].nonzero().flatten().tolist()
        edges = sorted({0, *begins, 9})
        carried = [state[own] for state in states]
        for begin, end in itertools.pairwise(edges):
            if begin in begins:
                carried = [torch.zeros_like(state) for state in carried]
            expected, carried = reference(layer, x[begin:end, own], carried)
            torch.testing.assert_close(found[begin:end, own], expected, rtol=1e-12, atol=1e-14)
        for mine, theirs in zip(after, carried, strict=True):
            torch.testing.assert_close(mine[own], theirs, rtol=1e-12, atol=1e-14)


def test_nothing_is_written_in_place() -> None:
    """The states of the window before may still be needed."""
    for cell in CELLS:
        layer = layer_of(cell)
        states = [torch.ones(3, 7, dtype=torch.float64) for _ in STATES[cell]]
        layer(torch.ones(4, 3, 5, dtype=torch.float64), states, Context())
        assert all(torch.equal(state, torch.ones_like(state)) for state in states)
