"""On a GPU, where there is one: `pytest -m gpu`. Precision that is real, and resume to the bit when deterministic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import FAULTY, TRAIN, RunScript, assert_same_bits, records

from rnnlm.config import GenerateConfig, ModelConfig
from rnnlm.model.generate import draw_block
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.speed import measured_peak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_resumed_to_the_bit_in_the_precision_asked_for(
    run_script: RunScript, experiment: Path, tmp_path: Path, precision: str, dtype: str, cell: str
) -> None:
    options = (
        f"--config={experiment}", f"--train.precision={precision}", f"--model.cell={cell}",
        "--train.deterministic=true", "--train.device=cuda",
    )  # fmt: skip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    first = run_script(TRAIN, *options, f"--run.directory={tmp_path}/first", CUDA_VISIBLE_DEVICES=visible)
    assert first.returncode == 0, first.stderr

    assert run_script(FAULTY, "kill", "13", *options, CUDA_VISIBLE_DEVICES=visible).returncode == -9
    resumed = run_script(TRAIN, *options, CUDA_VISIBLE_DEVICES=visible)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(tmp_path / "run", tmp_path / "first")
    assert records(tmp_path / "run", "train")[-1]["ran_in"] == {"layer0": dtype, "layer1": dtype, "head": dtype}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [(), ("--train.accumulation=2", "--train.skip_spikes_sigmas=6"), ("--train.exact_slices=4", "--optim.name=sgd")],
)
def test_a_captured_run_has_the_bits_of_a_plain_one_and_resumes(
    run_script: RunScript, experiment: Path, tmp_path: Path, precision: str, options: tuple[str, ...]
) -> None:
    options = (
        f"--config={experiment}", f"--train.precision={precision}", "--train.deterministic=true", *options,
        "--train.device=cuda", "--model.dropout=0.3",
    )  # fmt: skip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    plain = run_script(
        TRAIN, *options, "--train.capture=off", f"--run.directory={tmp_path}/plain", CUDA_VISIBLE_DEVICES=visible
    )
    assert plain.returncode == 0, plain.stderr

    assert run_script(FAULTY, "kill", "13", *options, CUDA_VISIBLE_DEVICES=visible).returncode == -9
    resumed = run_script(TRAIN, *options, CUDA_VISIBLE_DEVICES=visible)
    assert resumed.returncode == 0, resumed.stderr
    assert "train.capture" not in resumed.stderr, "the graph is used"
    assert_same_bits(tmp_path / "run", tmp_path / "plain")


def test_a_block_of_tokens_is_drawn_without_waiting_and_is_that_of_single_ones() -> None:
    config = ModelConfig(embedding_size=32, hidden_size=64, layers=2, init_range=1.0)
    model, options = RecurrentLM(config, 500, seed=1).to("cuda"), GenerateConfig(top_k=50, top_p=0.9)
    rows, start = torch.arange(4, device="cuda"), torch.zeros(4, 1, dtype=torch.int64, device="cuda")
    first, hidden = model.next_logits(start, model.zero_hidden(4))
    single, logits, state = list[torch.Tensor](), first, hidden
    for place in range(16):
        tokens, _ = draw_block(model, logits, state, options, range(place, place + 1), rows)
        logits, state = model.next_logits(tokens, state)
        single.append(tokens)

    torch.cuda.set_sync_debug_mode("error")
    try:
        block, _ = draw_block(model, first, hidden, options, range(16), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(block, torch.cat(single, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_measured_peak_is_that_of_a_gpu(dtype: torch.dtype) -> None:
    assert measured_peak(dtype, torch.device("cuda", 0)) > 1e12
