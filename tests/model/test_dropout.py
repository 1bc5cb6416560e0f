"""Dropout masks as a hash: pinned bits, fair and independent, one mask for each named place."""

from __future__ import annotations

import hashlib

import pytest
import torch

from rnnlm.config import ModelConfig
from rnnlm.model.dropout import dropout, place_number
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Context
from rnnlm.model.random_bits import hashed_bits, mix


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


@pytest.mark.parametrize("coordinate", ["seed", "place", "step", "step's high half", "row"])
def test_every_coordinate_changes_the_mask(coordinate: str) -> None:
    change = {name: int(name == coordinate) for name in ("seed", "place", "step", "row")}
    step = torch.tensor(change["step"] + (2**32 if coordinate == "step's high half" else 0))
    draws = [
        hashed_bits(0, 0, torch.tensor(0), torch.tensor([0]), 1, 4096),
        hashed_bits(change["seed"], change["place"], step, torch.tensor([change["row"]]), 1, 4096),
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


def test_places_have_the_numbers_of_their_names() -> None:
    """Pinned: runs are resumed by other versions."""
    names = ("embedding", "layer0.output", "layer1.output", "layer0.recurrent")
    assert [place_number(name) for name in names] == [3392394102, 1682946389, 452801009, 944059844]
    many = [f"layer{index}.{place}" for index in range(100) for place in ("output", "recurrent")]
    assert len({place_number(name) for name in many}) == 200


def test_a_place_is_called_after_its_layer_and_a_new_one_changes_no_other_mask() -> None:
    step, rows, x = torch.tensor(3), torch.arange(4), torch.ones(5, 4, 16)
    context = Context(7, step, rows)

    inner = context.within("layer1").dropout(x, "output", 0.5)
    assert torch.equal(inner, dropout(x, 0.5, False, 7, place_number("layer1.output"), step, rows))
    assert torch.equal(Context().dropout(x, "output", 0.5), x), "nothing is dropped outside of training"

    def masked(layers: int) -> torch.Tensor:
        """What the first layer gets: the embedding behind its mask."""
        model = RecurrentLM(ModelConfig(embedding_size=16, hidden_size=8, layers=layers, dropout=0.5), 11, seed=7)
        seen: list[torch.Tensor] = []
        model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        tokens = torch.ones(4, 5, dtype=torch.int64)
        model(tokens, model.zero_hidden(4), tokens, step, rows)
        return seen[0]

    assert torch.equal(masked(1), masked(3)) and (masked(1) == 0).any()
