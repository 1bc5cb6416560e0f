"""Recurrent layers against a slow, obvious reference; hashed dropout; initialisation."""

from __future__ import annotations

import hashlib
from functools import partial

import pytest
import torch

from rnnlm.config import ModelConfig
from rnnlm.model.dropout import dropout, hashed_bits, mix
from rnnlm.model.layers import STATES, Context, RecurrentLayer, named_generator

CELLS = ("lstm", "gru", "rnn")


def layer_of(cell: str, config: ModelConfig | None = None) -> RecurrentLayer:
    layer = RecurrentLayer(cell, 5, 7)
    layer.initialise(config or ModelConfig(init="uniform", init_range=0.5), partial(named_generator, 3))
    for bias in (layer.bias_ih, layer.bias_hh):
        torch.nn.init.uniform_(bias, -1, 1, generator=torch.Generator().manual_seed(0))
    return layer.double()


def reference(layer: RecurrentLayer, x: torch.Tensor, states: list[torch.Tensor]) -> tuple[torch.Tensor, list]:
    """The equations of the docstring, one token at a time."""
    h, out = states[0], []
    c = states[1] if layer.cell == "lstm" else h
    for token in x:
        a = token @ layer.weight_ih.T + layer.bias_ih
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
    for mine, theirs in zip(
        torch.autograd.grad(found[0].sin().sum(), inputs),
        torch.autograd.grad(expected[0].sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_really_runs_in_bf16_and_hands_on_fp32_states_that_lose_nothing(cell: str) -> None:
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
    assert torch.equal(layer.weight_hh, other.weight_hh), "another part's size changes nothing"


def test_hash_is_pinned() -> None:
    """Runs are resumed by other versions: the masks of version 1 must stay what they are."""
    bits = hashed_bits(123456789012345, 2, torch.tensor(10**10), torch.arange(5, 9), 3, 11)
    assert bits.shape == (3, 4, 11)
    assert hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16] == "cacf057a76ff5be3"


def test_mix_is_the_published_hash_and_a_bijection() -> None:
    def lowbias32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    values = torch.arange(-(2**31), 2**31, 2**32 // 5003)
    expected = [lowbias32(int(value) % 2**32) for value in values]
    assert [int(value) % 2**32 for value in mix(values.to(torch.int32))] == expected
    low = torch.arange(2**16, dtype=torch.int32)
    assert len(mix(low).unique()) == 2**16


def test_masks_belong_to_substreams_not_to_ranks() -> None:
    step, rows = torch.tensor(7), torch.arange(8)
    whole = hashed_bits(1, 0, step, rows, 5, 6)
    assert torch.equal(whole[:, 4:], hashed_bits(1, 0, step, rows[4:], 5, 6))
    assert not torch.equal(whole[:, 4:], hashed_bits(1, 0, step, rows[:4], 5, 6))


@pytest.mark.parametrize("coordinate", ["seed", "site", "step", "step's high half", "row"])
def test_every_coordinate_changes_the_mask(coordinate: str) -> None:
    change = {name: int(name == coordinate) for name in ("seed", "site", "step", "row")}
    step = torch.tensor(change["step"] + (2**32 if coordinate == "step's high half" else 0))
    draws = [
        hashed_bits(0, 0, torch.tensor(0), torch.tensor([0]), 1, 4096),
        hashed_bits(change["seed"], change["site"], step, torch.tensor([change["row"]]), 1, 4096),
    ]
    agree = (draws[0] < 0) == (draws[1] < 0)
    assert abs(float(agree.float().mean()) - 0.5) < 5 * 0.5 / 64  # five standard deviations of 4096 fair coins


def test_masks_are_fair_and_independent() -> None:
    keep = (hashed_bits(1, 0, torch.tensor(3), torch.arange(64), 16, 256) >= round(0.2 * 2**32) - 2**31).double()
    kept = ((keep - 0.8) / 0.4).flatten(0, 1)  # (1024, 256), mean 0 and variance 1 if fair
    assert abs(float(kept.mean())) < 5 * kept.numel() ** -0.5
    for size, pairs in ((1024, kept.T @ kept / 1024), (256, kept @ kept.T / 256)):
        pairs.fill_diagonal_(0)
        assert 0.9 < float(pairs.std()) * size**0.5 < 1.1
        assert float(pairs.abs().max()) * size**0.5 < 6.5


def test_dropout_scales_and_locks() -> None:
    x, rows = torch.ones(10, 4, 1000), torch.arange(4)
    ordinary = dropout(x, 0.25, False, 1, 0, torch.tensor(0), rows)
    assert set(ordinary.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(ordinary.mean().item() - 1) < 0.02
    assert not torch.equal(ordinary[0], ordinary[1])
    locked = dropout(x, 0.25, True, 1, 0, torch.tensor(0), rows)
    assert all(torch.equal(locked[0], locked[t]) for t in range(10))
    assert not torch.equal(locked[0, 0], locked[0, 1])
    assert dropout(x, 0.0, False, 1, 0, torch.tensor(0), rows) is x
