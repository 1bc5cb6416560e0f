"""Other people's ids: a recogniser's table with its model gives the model's pieces under the table's ids."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm.config import Config, StreamConfig, TokenizerConfig
from rnnlm.data.encoder import Encoder
from rnnlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_choice import load_tokenizer
from rnnlm.errors import UserError

TEXTS = make_text(300)


def theirs(**options: Any) -> bytes:
    """A model of somebody else's, without byte fallback and, unless asked for, with SentencePiece's own ids."""
    out = io.BytesIO()
    given = {"vocab_size": 80, "model_type": "bpe", "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=out, **given)
    return out.getvalue()


ESPNET = theirs()  # <unk>, <s>, </s> first
ICEFALL = theirs(
    user_defined_symbols="<blk>,<sos/eos>", unk_id=2, bos_id=-1, eos_id=-1, model_type="unigram", vocab_size=30
)


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(token) for token in range(processor.vocab_size())]


def espnet_table() -> list[str]:
    """As ESPnet lists them: blank and unknown first, one mark for both ends last, in an order of its own."""
    return ["<blank>", "<unk>", *sorted(set(pieces_of(ESPNET)) - {"<unk>", "<s>", "</s>"}), "<sos/eos>"]


def choose(directory: Path, model: bytes | None, table: str | None, **chosen: Any) -> Tokenizer:
    """The tokenizer of a configuration with these files."""
    for key, name, data in (
        ("model", "bpe.model", model),
        ("table", "tokens.txt", table if table is None else table.encode()),
    ):
        if data is not None:
            (directory / name).write_bytes(data)
            chosen[key] = str(directory / name)
    return load_tokenizer(Config(tokenizer=TokenizerConfig(**chosen), stream=StreamConfig(directory=str(directory))))


def test_an_espnet_list_gives_the_ids(tmp_path: Path) -> None:
    table = espnet_table()
    tokenizer = choose(tmp_path, ESPNET, "\n".join(table) + "\n", eos_piece="<sos/eos>")
    assert [tokenizer.piece(token) for token in range(tokenizer.vocab_size)] == table
    assert (tokenizer.eos_id, tokenizer.unknown_id, tokenizer.vocab_size) == (len(table) - 1, 1, len(table))

    processor = sentencepiece.SentencePieceProcessor(model_proto=ESPNET)
    for text in (*TEXTS, "anna sees Q", "", "  <blank> <sos/eos>  "):
        assert [tokenizer.piece(token) for token in tokenizer.encode(text)] == [
            piece if piece in table else "<unk>" for piece in processor.encode(text, out_type=str)
        ]
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))
    again = SentencePieceTokenizer(tokenizer.model)
    assert (again.eos_id, again.encode("anna")) == (tokenizer.eos_id, tokenizer.encode("anna")), "a stream's own file"


def test_an_icefall_table_with_gaps_and_disambiguation_symbols(tmp_path: Path) -> None:
    lines = [f"{piece} {token + (100 if token > 20 else 0)}" for token, piece in enumerate(pieces_of(ICEFALL))]
    tokenizer = choose(tmp_path, ICEFALL, "\n".join([*lines, "#0 180", "#1 185"]), eos_piece="<sos/eos>")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unknown_id) == (186, 1, 2)
    processor = sentencepiece.SentencePieceProcessor(model_proto=ICEFALL)
    for text in TEXTS:
        assert tokenizer.encode(text) == [token + (100 if token > 20 else 0) for token in processor.encode(text)]
    assert tokenizer.piece(60) == "<no piece 60>"
    assert 1 in processor.encode("a <sos/eos>"), "theirs makes the mark of a text that says it"
    assert not {0, 1} & {*tokenizer.encode("a <sos/eos> <blk>")}, "here no text ends its own document"


@settings(max_examples=50)
@given(st.text() | st.sampled_from(TEXTS))
def test_the_encoder_agrees_under_theirs(text: str) -> None:
    for encoder in ENCODERS:
        ids = encoder.encode([text.encode()])[0].tolist()
        assert ids == [*encoder.tokenizer.encode(text), encoder.tokenizer.eos_id]


@pytest.fixture(scope="module", autouse=True)
def encoders(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("theirs")
    joined = choose(directory, ESPNET, "\n".join(espnet_table()), eos_piece="<sos/eos>")
    ENCODERS.append(Encoder(joined))


ENCODERS: list[Encoder] = []


def test_the_name_of_the_end_of_a_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bpe.model: has no EOS piece; name the piece .* with tokenizer.eos_piece"):
        choose(tmp_path, ICEFALL, None)
    tokenizer = choose(tmp_path, ICEFALL, None, eos_piece="<sos/eos>")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, 30)
    assert choose(tmp_path, ESPNET, None, eos_piece="</s>").model == ESPNET, "what has it already stays as it is"
    assert choose(tmp_path, ESPNET, None, eos_piece="<s>").eos_id == 1


@pytest.mark.parametrize(
    ("table", "eos_piece", "message"),
    [
        (None, "<end>", r"eos_piece=<end>: there is no such piece in .*bpe.model; name the one .* of <s>, </s>"),
        (None, "▁the", r"eos_piece=▁the: texts are made of that piece in .*bpe.model"),
        (None, "<unk>", r"eos_piece=<unk>: texts are made of that piece"),
        ("", "", r"tokens.txt: 0 bytes"),
        ("<unk> 0\n</s> 1\n", "", r"77 of the 80 pieces of .*bpe.model have no id in it \(.*, ...\)"),
        ("<unk> 0\n<unk> 1\n", "", r"line 2 is '<unk> 1', expected a piece and an id below 10,000,000, each of them"),
        ("a 0\nb 0\n", "", "line 2 is 'b 0'"),
        ("a 0\nb\n", "", "line 2 is 'b '"),
        ("a 99999999999\n", "", "line 1 is 'a 99999999999'"),
    ],
)
def test_tables_and_names_that_do_not_fit_are_refused(
    tmp_path: Path, table: str | None, eos_piece: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(tmp_path, ESPNET, table, eos_piece=eos_piece)


def test_a_table_alone_is_of_words_or_of_characters(tmp_path: Path) -> None:
    words = choose(tmp_path, None, "<eps> 0\n<s> 1\n</s> 2\n<unk> 3\nthe 5\ncat\t7\n#0 9\n")
    assert words.encode("the cat <s> dog #0 <eps>") == [5, 7, 3, 3, 3, 3]
    assert (words.eos_id, words.vocab_size, words.decode([0, 5, 7, 2])) == (2, 10, "the cat")

    characters = choose(tmp_path, None, "<blank>\n<unk>\n<space>\na\nb\n漢\n<sos/eos>\n", eos_piece="<sos/eos>")
    assert characters.encode("ab 漢x") == [3, 4, 2, 5, 1]
    assert (characters.eos_id, characters.decode([3, 4, 2, 5])) == (6, "ab 漢")

    with_bom = choose(tmp_path, None, "\ufeff<blank>\n<unk>\n<space>\na\nb\n漢\n<sos/eos>\n", eos_piece="<sos/eos>")
    assert with_bom.digest == characters.digest

    with pytest.raises(UserError, match=r"not in tokenizer.table; name the entry that ends a text, of <sos/eos>"):
        choose(tmp_path, None, "<unk> 0\na 1\n<sos/eos> 2\n")
    with pytest.raises(UserError, match=r"has none of <unk>, <UNK>, \[UNK\]"):
        choose(tmp_path, None, "a 1\n</s> 2\n")


def test_a_tokenizer_that_is_not_what_the_options_say_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    there = str(tmp_path / "tokenizer.model")
    assert choose(tmp_path, None, None, vocab_size=300).digest == tokenizer.digest
    for chosen, message in (
        (
            {"vocab_size": 4096},
            f"tokenizer.vocab_size=4096: {there} is there with 300 pieces; remove it",
        ),
        ({"kind": "word"}, f"tokenizer.kind=word: {there} is there, of kind bpe; remove it"),
        ({"kind": "unigram"}, f"tokenizer.kind=unigram: {there} is there, of kind bpe; remove it"),
    ):
        with pytest.raises(UserError, match=message):
            choose(tmp_path, None, None, **chosen)
