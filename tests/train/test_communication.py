"""What processes send each other of gradients: fewer rows and fewer bytes, and the same sum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FAULTY, TRAIN, RunScript, assert_same_bits, final_state, records
from test_no_reads import Device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from rnnlm.config import Config, ModelConfig, TrainConfig
from rnnlm.faults import find_faults
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.communication import TokenVectorSum, add_rows, distinct_rows, sends_rows, sum_in_bf16

VOCABULARY, WIDTH, PROCESSES = 50, 6, 4


def local_gradients(tokens: Tensor) -> list[Tensor]:
    """Of each process, (V, E): what a lookup's backward pass gives, zero but for its tokens."""
    torch.manual_seed(0)
    found = []
    for own in tokens:
        vectors = torch.zeros(VOCABULARY, WIDTH, requires_grad=True)
        (vectors[own] * torch.randn(*own.shape, WIDTH)).sum().backward()
        assert vectors.grad is not None
        found.append(vectors.grad)
    return found


def exchanged(gradients: list[Tensor], tokens: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What each process has in the end."""
    sent = [distinct_rows(each, own, PROCESSES, dtype) for each, own in zip(gradients, tokens, strict=True)]
    ids, rows = zip(*sent, strict=True)
    ends = [each.clone() for each in gradients]
    for each in ends:
        add_rows(each, ids, rows)
    return ends


def test_the_rows_that_were_touched_sum_to_the_mean_of_the_whole_gradients_in_the_order_of_processes() -> None:
    tokens = torch.randint(0, 9, (PROCESSES, 20), generator=torch.Generator().manual_seed(1))  # many twice
    gradients = local_gradients(tokens)
    expected = torch.zeros(VOCABULARY, WIDTH)
    for each in gradients:
        expected = expected + each / PROCESSES

    for end in exchanged(gradients, tokens):
        assert torch.equal(end, expected)
    assert not expected[9:].any() and expected[:9].any()

    rounded = exchanged(gradients, tokens, torch.bfloat16)[0]
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=2**-7, atol=2**-8)


def test_what_is_not_finite_reaches_every_process_and_no_other_row() -> None:
    tokens = torch.tensor([[3, 3], [4, 5], [3, 4], [7, 7]])
    gradients = local_gradients(tokens)
    gradients[0][3] = float("nan")
    for end in exchanged(gradients, tokens):
        assert end[3].isnan().all() and end[[4, 5, 7]].isfinite().all()


def test_no_value_is_read_on_the_way() -> None:
    """As test_no_reads.py has it of all else in a step: a GPU is not waited for."""
    with FakeTensorMode(), Device():
        tokens, gradient = torch.zeros(20, dtype=torch.int64), torch.zeros(VOCABULARY, WIDTH)
        ids, rows = distinct_rows(gradient, tokens, PROCESSES, torch.bfloat16)
        add_rows(gradient, [ids, ids], [rows, rows])
    assert rows.shape == (20, WIDTH)


def test_no_row_is_sent_twice_so_the_order_of_additions_is_free() -> None:
    tokens = torch.tensor([5, 2, 5, 5, 2])
    ids, rows = distinct_rows(torch.ones(VOCABULARY, WIDTH), tokens, 1, torch.float32)
    assert ids.tolist() == [2, 2, 5, 5, 5] and rows[:, 0].tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "processes", "model", "train", "expected"),
    [
        (74, 2, {}, {}, True),  # 74 * (4 * 6 + 8) < 2 * 50 * 4 * 6
        (75, 2, {}, {}, False),
        (60, 2, {}, {"gradient_compression": "bf16"}, False),  # numbers of the tokens weigh more
        (59, 2, {}, {"gradient_compression": "bf16"}, True),
        (10, 1, {}, {}, False),
        (10, 2, {}, {"exact_slices": 2}, False),
        (10, 2, {"tied": True}, {}, False),
    ],
)
def test_rows_are_sent_where_that_is_less(
    tokens: int, processes: int, model: dict[str, bool], train: dict[str, object], expected: bool
) -> None:
    built = RecurrentLM(ModelConfig(embedding_size=WIDTH, hidden_size=WIDTH, layers=1, **model), VOCABULARY, 0)  # type: ignore[arg-type]
    config = TrainConfig(global_batch_size=1, seq_len=tokens, **train)  # type: ignore[arg-type]
    assert sends_rows(built, config, processes) == expected


def test_compression_is_refused_where_bits_must_not_depend_on_processes() -> None:
    (fault,) = find_faults(Config(train=TrainConfig(exact_slices=4, gradient_compression="bf16")))
    assert fault.startswith("train.gradient_compression=bf16: rounds sums") and "use none with" in fault
    assert find_faults(Config(train=TrainConfig(gradient_compression="bf16"))) == []


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone: its collectives are real."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_sums_in_bf16_and_leaves_the_token_vectors_to_us(group: None) -> None:
    model = RecurrentLM(ModelConfig(embedding_size=WIDTH, hidden_size=WIDTH, layers=1), VOCABULARY, 0)
    train = TrainConfig(global_batch_size=2, seq_len=5, gradient_compression="bf16")
    tokens, rows = torch.randint(0, VOCABULARY, (2, 5)), torch.arange(2)

    def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        module(tokens, model.zero_hidden(2), tokens, torch.tensor(0), rows)[0].backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    plain = gradients(model)
    ours = TokenVectorSum(model, train, 1)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, sum_in_bf16)
    found = gradients(wrapped)
    assert torch.equal(found["embedding.weight"], plain["embedding.weight"]), "as it was before it is exchanged"

    ours.finish(tokens)
    found["embedding.weight"] = model.embedding.weight.grad  # type: ignore[assignment]
    for name, each in plain.items():
        assert torch.equal(found[name], each.to(torch.bfloat16).float()), name
        assert not torch.equal(found[name], each), name


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "tolerance"), [("none", 1e-5), ("bf16", 5e-3)])
def test_two_processes_that_send_rows_train_as_one_and_resume_to_the_bit(
    run_script: RunScript, experiment: Path, tmp_path: Path, compression: str, tolerance: float
) -> None:
    options = (
        f"--config={experiment}", "--train.seq_len=16", "--run.log_every_steps=1", "--model.dropout=0",
        f"--train.gradient_compression={compression}",
    )  # fmt: skip
    config = TrainConfig(global_batch_size=16, seq_len=16, gradient_compression=compression)  # type: ignore[arg-type]
    assert sends_rows(RecurrentLM(ModelConfig(embedding_size=12, hidden_size=16), 300, 0), config, 2)

    one, two = tmp_path / "one", tmp_path / "two"
    for directory, processes in ((one, 0), (two, 2)):
        done = run_script(TRAIN, *options, f"--run.directory={directory}", processes=processes)
        assert done.returncode == 0, done.stderr
    for mine, theirs in zip(records(two, "train"), records(one, "train"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    vectors = [final_state(each, 20)[0]["model.embedding.weight"] for each in (one, two)]
    assert not torch.equal(*vectors) and (vectors[0] - vectors[1]).abs().max() < 0.1

    assert run_script(FAULTY, "kill", "13", *options, processes=2).returncode
    assert run_script(TRAIN, *options, processes=2).returncode == 0
    assert_same_bits(tmp_path / "run", two)
