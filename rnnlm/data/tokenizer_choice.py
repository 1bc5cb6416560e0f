"""The tokenizer that a configuration names: where its file lies, and whether it is what the other options say.

The price of refusing what differs: a model of somebody else's needs a configuration without their opposite.
"""

from __future__ import annotations

from pathlib import Path

from rnnlm.config import Config, TokenizerConfig
from rnnlm.data.byte_tokenizer import ByteTokenizer
from rnnlm.data.hugging_face_tokenizer import HuggingFaceTokenizer, with_eos
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.token_table import read_table, rewrite_model, table_alone
from rnnlm.data.tokenizer import Tokenizer, class_of, find, find_all, read_bounded
from rnnlm.data.word_tokenizer import WordTokenizer
from rnnlm.errors import UserError


def tokenizer_path(config: Config) -> Path:
    """Where the tokenizer lies, or is to lie: tokenizer.model, or in stream.directory under the name of its kind.

    Raises:
        UserError: neither is set, or several are there.
    """
    if config.tokenizer.model:
        return Path(config.tokenizer.model)
    if not config.stream.directory:
        raise UserError("stream.directory is not set; give the directory for tokenizer and streams")
    if any(find_all(config.stream.directory)):
        return find(config.stream.directory)
    names = {"word": WordTokenizer.file_name, "byte": ByteTokenizer.file_name}
    return Path(config.stream.directory) / names.get(config.tokenizer.kind, SentencePieceTokenizer.file_name)


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a configuration, with the ids and the EOS that it asks for.

    Raises:
        UserError: none is there, or one that is not what the options say.
    """
    chosen = config.tokenizer
    if chosen.table and not chosen.model:
        return table_alone(read_table(Path(chosen.table)), chosen.eos_piece)

    path = tokenizer_path(config)
    if path.is_dir():
        path = find(path)
    model = read_bounded(path)
    kind = class_of(model, path.name)
    if kind is SentencePieceTokenizer and (chosen.table or chosen.eos_piece):
        table = read_table(Path(chosen.table)) if chosen.table else None
        model = rewrite_model(model, str(path), chosen.eos_piece, table)
    if kind is HuggingFaceTokenizer and chosen.eos_piece:
        model = with_eos(model, str(path), chosen.eos_piece)
    tokenizer = kind(model, str(path))
    _check(tokenizer, chosen, path)
    return tokenizer


def _check(tokenizer: Tokenizer, chosen: TokenizerConfig, path: Path) -> None:
    """Refuse a tokenizer of another kind or size than the options name; bpe is what they say without being asked."""
    eos = tokenizer.piece(tokenizer.eos_id)
    if chosen.eos_piece not in ("", eos):
        raise UserError(f"tokenizer.eos_piece={chosen.eos_piece}: that of {path} is {eos}; leave the option away")
    if chosen.table and not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(f"tokenizer.table={chosen.table}: {path} is no SentencePiece model; leave one of both away")

    way_out = "remove it to train another with tools/train_tokenizer.py, or leave the option away"
    if chosen.kind not in ("bpe", tokenizer.description):
        raise UserError(f"tokenizer.kind={chosen.kind}: {path} is there, of kind {tokenizer.description}; {way_out}")
    limit = tokenizer.description in ("char", "word", "byte")  # of these it is the most, not the number
    size, other = tokenizer.vocab_size, chosen.vocab_size
    if other and not chosen.table and (size > other if limit else size != other):
        raise UserError(
            f"tokenizer.vocab_size={chosen.vocab_size}: {path} is there with {tokenizer.vocab_size} pieces; {way_out}"
        )
