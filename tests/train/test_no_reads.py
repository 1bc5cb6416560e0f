"""A step reads no value: on a GPU it would wait for the device, and could not be recorded.

Its tensors have shapes and no values (FakeTensorMode), so that item(), bool(), tolist(), nonzero() and their like
raise. They say that they are on a GPU, so that the code for GPUs runs; what is copied to the host, or made from numbers
of the host other than by filling, raises here. They are not of the type cuda: a build of PyTorch without CUDA has no
backward pass for it, even of tensors without values. So the rate that is a tensor is seen by tests on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import small_config
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from rnnlm.config import HEADS, GenerateConfig, ModelConfig
from rnnlm.data.substreams import Batch
from rnnlm.model.generate import draw_block
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.distributed import start_accelerator
from rnnlm.train.step import TrainStep

READS = (RuntimeError, DataDependentOutputException, DynamicOutputShapeException)


class Device(TorchFunctionMode):
    """Tensors that are on a GPU as far as anyone can tell who asks them; what waits for it raises."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if name == "backward":  # what it calls would otherwise run without this mode
            with self:
                return _engine_run_backward(
                    args, (kwargs["gradient"],), False, False, (), allow_unreachable=True, accumulate_grad=True
                )

        to_host = name == "to" and any(
            isinstance(each, str) and each == "cpu" for each in [*args[1:], *kwargs.values()]
        )
        if to_host or name in ("cpu", "numpy", "tolist", "tensor", "as_tensor", "from_numpy", "pin_memory"):
            raise RuntimeError(f"{name}() waits for the device")
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def take_steps(directory: Path, change: Callable[[TrainStep], None] = lambda step: None, **sections: Any) -> TrainStep:
    """The first step of an epoch, and another one."""
    scaled = sections.get("train", {}).pop("precision", "fp32") if "fp16" in str(sections) else ""
    config = small_config(directory / "run", directory, **sections)
    accelerator: Accelerator = start_accelerator(config)
    if scaled:  # as Accelerate on a GPU
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu")

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurrentLM, "to", lambda model, device: model)  # is there, and cannot be moved
        step = TrainStep(config, 11, accelerator, 0, 4)
        change(step)
        tokens, lengths = torch.zeros((4, 9), dtype=torch.uint16), torch.full((4,), 8)
        batches = [Batch(number, tokens, lengths, torch.zeros(4)) for number in (0, 1)]
        execute, step._take = step._execute, lambda: None
        for batch in batches:
            step.run(batch, batch.step == 0, 0.1)
            with Device():
                execute()
    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_no_value_is_read_in_any_precision_by_any_layer(tmp_path: Path, precision: str, cell: str) -> None:
    take_steps(tmp_path, model={"cell": cell, "dropout": 0.5}, train={"precision": precision})


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("train", [{}, {"accumulation": 2, "skip_spikes_sigmas": 6.0}, {"exact_slices": 4}])
def test_no_value_is_read_by_any_optimizer_and_with_micro_batches(
    tmp_path: Path, name: str, train: dict[str, Any]
) -> None:
    optim = {"name": name, "weight_decay": 0.1, "momentum": 0.9 * (name == "sgd")}
    take_steps(tmp_path, optim=optim, train=train)


@pytest.mark.parametrize("name", HEADS)
def test_no_value_is_read_by_any_head_that_does_not_say_so(tmp_path: Path, name: str) -> None:
    head = RecurrentLM(ModelConfig(head=name, embedding_size=8, hidden_size=8), 300, seed=0).head
    found: Any = nullcontext() if head.static_shapes else pytest.raises(READS)
    with found:
        take_steps(tmp_path, model={"head": name})


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("name", HEADS)
def test_no_value_is_read_while_a_block_of_tokens_is_drawn(name: str, options: dict[str, Any]) -> None:
    with FakeTensorMode():
        model = RecurrentLM(ModelConfig(head=name, embedding_size=8, hidden_size=8), 300, seed=0)
        logits, hidden, rows = torch.zeros(3, 300), model.zero_hidden(3), torch.zeros(3, dtype=torch.int64)
        with Device():
            block, _ = draw_block(model, logits, hidden, GenerateConfig(**options), range(4, 8), rows)
    assert block.shape == (3, 4)


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item, bool, float, int, Tensor.tolist, Tensor.nonzero, Tensor.cpu, Tensor.numpy, lambda x: x.to("cpu"),
        lambda x: x[x > 0], lambda x: torch.equal(x, x), lambda x: x + torch.tensor([1.0]),
    ],
)  # fmt: skip
def test_every_way_to_read_a_value_raises(tmp_path: Path, read: Callable[[Tensor], Any]) -> None:
    """What the other tests rest on: a read in any place, here where the gradient of a bias is formed."""

    def change(step: TrainStep) -> None:
        step.parameters[-1].register_hook(lambda gradient: (read(gradient[0]), gradient)[1])

    with pytest.raises(READS):
        take_steps(tmp_path, change)


def test_code_for_gpus_runs(tmp_path: Path) -> None:
    """A layer gives cuDNN its weights in one block, there alone."""
    blocks = list[int]()

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.lstm:
                blocks.append(len({weight.untyped_storage()._cdata for weight in args[2]}))
            return function(*args, **(kwargs or {}))

    with Watched():
        take_steps(tmp_path)
    assert blocks[-1] == 1 < blocks[0], "the first is of the wrapping of the model, before it seems to be on a GPU"
