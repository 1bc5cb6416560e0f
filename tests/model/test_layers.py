"""Recurrent layers against a slow, obvious reference; resets within a window; initialisation."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from rnnlm.config import ModelConfig
from rnnlm.model.layers import STATES, Context, RecurrentLayer, named_generator
from rnnlm.model.precision import cast, cast_once, slow_recurrence

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


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_cast_once_for_all_micro_batches_of_an_update_with_the_same_gradients(cell: str) -> None:
    layer, draw = layer_of(cell).float(), torch.Generator().manual_seed(1)
    windows = torch.randn(3, 6, 2, 5, generator=draw)
    states = [torch.zeros(2, 7) for _ in STATES[cell]]

    def gradients() -> list[torch.Tensor]:
        """Of three micro-batches, summed in fp32."""
        layer.zero_grad()
        for x in windows:
            with torch.autocast("cpu", torch.bfloat16):
                layer(x, states, Context())[0].float().square().sum().backward()
        return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]

    each = gradients()

    with cast_once():
        narrow = [cast(weight, torch.bfloat16) for weight in layer.parameters()]
        assert all(
            cast(weight, torch.bfloat16) is found for weight, found in zip(layer.parameters(), narrow, strict=True)
        )
        once = gradients()
    assert len(once) == len(each) == 4 and all(map(torch.equal, once, each))

    with torch.no_grad():
        layer.weight_hh += 1
    with cast_once():
        assert torch.equal(cast(layer.weight_hh, torch.bfloat16), layer.weight_hh.bfloat16())
        assert cast(layer.weight_hh, torch.float32) is layer.weight_hh


def test_a_layer_keeps_its_copies_until_the_update_is_over() -> None:
    layer, x, states = layer_of("gru").float(), torch.ones(2, 3, 5), [torch.zeros(3, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        with cast_once():
            before = layer(x, states, Context())[0]
            layer.weight_ih.data.zero_()
            assert torch.equal(layer(x, states, Context())[0], before)
        assert not torch.equal(layer(x, states, Context())[0], before)


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


@pytest.mark.parametrize(
    ("precision", "cudnn", "capability", "found"),
    [
        ("bf16", 91300, (8, 0), ""),
        ("bf16", 91402, (12, 0), ""),
        ("fp16", 8902, (7, 0), ""),
        ("fp32", 91002, (9, 0), ""),
        ("bf16", 91299, (9, 0), "cuDNN 9.12.99 with compute capability 9.0"),
        ("bf16", 91002, (10, 3), "fp16 or fp32, or a newer cuDNN"),
        ("bf16", 8902, (9, 0), "cuDNN 8.9.2 with"),
        ("bf16", 91400, (7, 5), "fp16 or fp32, which this GPU has kernels for"),
        ("fp32", None, (9, 0), "PyTorch has no cuDNN here"),
    ],
)
def test_a_precision_that_leaves_cudnn_is_told_with_the_way_out(
    precision: str, cudnn: int | None, capability: tuple[int, int], found: str
) -> None:
    text = slow_recurrence(precision, cudnn, capability)
    assert found in text if found else not text
