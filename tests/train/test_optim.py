"""Schedules worked by hand, the validation memory, and an optimizer state that comes back to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rnnlm.checkpoint.checkpoint import copy_tensors
from rnnlm.config import OptimConfig
from rnnlm.errors import UserError
from rnnlm.train.optim import OptimizerKind, build_optimizer, optimizer_tensors, register_optimizer
from rnnlm.train.schedule import ValidationMemory, learning_rate

OPTIMIZERS_AND_MOMENTA = (("adam", 0.0), ("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.9))


def rates(config: OptimConfig, steps: list[int], horizon: int = 100) -> list[float]:
    return [learning_rate(config, step, horizon, ValidationMemory()) for step in steps]


def test_warm_up_then_constant() -> None:
    config = OptimConfig(learning_rate=0.4, warmup_steps=4)
    assert rates(config, [0, 1, 2, 3, 4, 99, 1000]) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])


def test_warm_up_then_cosine() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=20, schedule="cosine", final_ratio=0.2)
    # 20 -> peak; 60 is half way: 0.2 + 0.8 / 2; 40 is a quarter: 0.2 + 0.8 * (1 + cos 45 degrees) / 2
    expected = [0.05, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2, 0.2]
    assert rates(config, [0, 20, 40, 60, 100, 10_000]) == pytest.approx(expected)


def test_plateau_cuts_after_patience_and_a_new_best_starts_over() -> None:
    config = OptimConfig(learning_rate=1.0, schedule="plateau", plateau_patience=1, plateau_factor=0.5)
    memory = ValidationMemory()
    seen = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.0, 1.0]):
        memory.update(loss, step, config)
        seen.append(learning_rate(config, step, 100, memory))
    assert seen == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert (memory.best_loss, memory.best_step) == (1.0, 6)


def test_early_stopping_and_nan() -> None:
    config = OptimConfig(early_stop_patience=2)
    memory = ValidationMemory()
    assert [memory.update(loss, step, config) for step, loss in enumerate([2.0, math.nan, 1.5])] == [True, False, True]
    assert not memory.should_stop(config)

    memory.update(1.6, 3, config)
    assert not memory.should_stop(config)
    memory.update(1.5, 4, config)
    assert memory.should_stop(config)
    assert not memory.should_stop(OptimConfig())
    assert ValidationMemory(**memory.to_dict()) == memory


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_comes_back_to_the_bit(name: str, momentum: float) -> None:
    config = OptimConfig(name=name, learning_rate=1e-3, momentum=momentum, weight_decay=0.1)  # type: ignore[arg-type]

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, build_optimizer(model, config)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(10))

    first, first_optimizer = made()
    train(first, first_optimizer, range(5))
    second, second_optimizer = made()
    second.load_state_dict(first.state_dict())
    saved = {key: value.clone() for key, value in optimizer_tensors(first, first_optimizer, config).items()}
    copy_tensors(optimizer_tensors(second, second_optimizer, config), saved, Path("optimizer.safetensors"))
    train(second, second_optimizer, range(5, 10))

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))
    whole, resumed = optimizer_tensors(model, optimizer, config), optimizer_tensors(second, second_optimizer, config)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert bool(whole) == (name != "sgd" or momentum > 0)


def test_weight_decay_spares_biases() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", learning_rate=0.5, weight_decay=0.1))
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.5 * 0.1))
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize(
    "config",
    [OptimConfig(name=name, learning_rate=1e-3, momentum=momentum) for name, momentum in OPTIMIZERS_AND_MOMENTA],
)
def test_what_a_checkpoint_must_hold_of_an_optimizer(config: OptimConfig) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    expected = {name: (each.shape, each.dtype) for name, each in optimizer_tensors(model, optimizer, config).items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = optimizer_tensors(model, optimizer, config)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == expected


@pytest.mark.parametrize(
    "config",
    [OptimConfig(name=name, learning_rate=1e-3, momentum=momentum) for name, momentum in OPTIMIZERS_AND_MOMENTA],
)
def test_state_that_is_there_from_the_start_changes_no_step(config: OptimConfig) -> None:
    """PyTorch creates it at the first step; the updates are the same bits."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, config) for model in models]
    optimizers[1].state.clear()

    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)


def test_an_optimizer_that_cannot_skip_a_step_is_refused() -> None:
    kind = OptimizerKind(lambda groups, config: torch.optim.Rprop(groups), lambda parameter, config: {})
    register_optimizer("rprop", kind)
    with pytest.raises(UserError, match="optim.name=rprop: Rprop cannot skip a step"):
        build_optimizer(torch.nn.Linear(3, 2), OptimConfig(name="rprop"))


def test_momentum_begins_at_zero_even_where_the_first_step_is_skipped() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", learning_rate=1e-3, momentum=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_an_optimizer_that_keeps_more_than_it_declares_is_refused() -> None:
    """It would train on, and a run that is resumed would not be the same one."""
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.state[model.weight]["average"] = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="keeps step, exp_avg, exp_avg_sq, average for weight, but declares step"):
        optimizer_tensors(model, optimizer, OptimConfig())
