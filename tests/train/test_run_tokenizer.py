"""The tokenizer in a run's directory is compared with the one that its checkpoints name, before it makes any text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import STATE

from rnnlm.checkpoint.checkpoint import save
from rnnlm.config import Config, ModelConfig, RunConfig
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.load import load_model


def other_of_the_same_size(tokenizer: SentencePieceTokenizer) -> bytes:
    """A model with the same pieces, ids and number of bytes, that cuts words in another order."""
    proto = tokenizer.proto()
    proto.pieces[-1].score, proto.pieces[-2].score = proto.pieces[-2].score, proto.pieces[-1].score
    other: bytes = proto.SerializeToString()
    assert len(other) == len(tokenizer.model) and SentencePieceTokenizer(other).vocab_size == tokenizer.vocab_size
    return other


def test_another_tokenizer_of_the_same_size_in_a_runs_directory_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    config = Config(
        model=ModelConfig(embedding_size=2, hidden_size=3, layers=1), run=RunConfig(directory=str(tmp_path))
    )
    model = RecurrentLM(config.model, tokenizer.vocab_size, config.train.seed)
    state = {**STATE, "tokenizer": tokenizer.digest}
    path = save(tmp_path / "checkpoints", "step-00000007", {"model": dict(model.named_parameters())}, state)

    own = tmp_path / "tokenizer.model"
    own.write_bytes(tokenizer.model)
    _, loaded, _ = load_model(config, path, torch.device("cpu"))
    assert loaded and loaded.digest == tokenizer.digest

    own.write_bytes(other_of_the_same_size(tokenizer))
    with pytest.raises(UserError, match=f"^{own}: not the model that this was made with"):
        load_model(config, path, torch.device("cpu"))
