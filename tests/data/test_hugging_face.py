"""A tokenizer.json gives the library's own ids and texts, whatever it is made of; no text says EOS."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunHere, make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm.config import Config, CorpusConfig, StreamConfig, TokenizerConfig
from rnnlm.data.build.build import Build
from rnnlm.data.encoder import Encoder
from rnnlm.data.hugging_face_tokenizer import HuggingFaceTokenizer, with_eos
from rnnlm.data.hugging_face_words import PATTERNS
from rnnlm.data.stream import TokenStream
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_choice import load_tokenizer
from rnnlm.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

Edit = Callable[[dict[str, Any]], object]
TEXTS = [
    *make_text(40), "naïve café 漢字 🎉 don't I'LL they're 12345 x_y\u00a0 z\u3000", "  a\n\n  b\tc \r\n ", " ", "",
    "if (anna):\n    x = 'the cat'\n\n", "a\u0085 b", "e\u0301 \u0301x", "word" * 60, "<user>anna <user> sees",
    "'s 're'S", "\u00a0",
]  # fmt: skip


def byte_level(edit: Edit = lambda spec: None, **options: Any) -> bytes:
    """A GPT-2-like tokenizer, trained by the library itself, as its file; `edit` changes the JSON."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options}),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    spec = json.loads(made.to_str())
    edit(spec)
    return json.dumps(spec).encode()


def with_added(**flags: bool) -> Edit:
    token = {
        "id": 400,
        "content": "<user>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    return lambda spec: spec["added_tokens"].append({**token, "special": False, **flags})


def split_by(pattern: str) -> Edit:
    def edit(spec: dict[str, Any]) -> None:
        made = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, True, False)])
        spec["pre_tokenizer"] = json.loads(made.to_str())["pre_tokenizer"]

    return edit


def normalized(normalizer: Any) -> Edit:
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizer
    return lambda spec: spec.update(normalizer=json.loads(made.to_str())["normalizer"])


def as_texts(spec: dict[str, Any]) -> None:
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]


def llama() -> bytes:
    """As LLaMA-2's: one text without pre-tokens, spaces as U+2581, bytes for what is unknown."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=30, show_progress=False)
    made.train_from_iterator(make_text(40), trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    return json.dumps(spec).encode()


COMPILED, BY_WORDS, WHOLE = "compiled kernels", "new words by the tokenizer's library", "encoded whole"
KINDS: dict[str, tuple[bytes, str]] = {
    "gpt2": (byte_level(), COMPILED),
    "old merges": (byte_level(as_texts), COMPILED),
    "added": (byte_level(with_added()), COMPILED),
    "prefix": (byte_level(add_prefix_space=True), BY_WORDS),
    "nfc": (byte_level(normalized(normalizers.NFC())), BY_WORDS),
    "whole words": (byte_level(lambda spec: spec["model"].update(ignore_merges=True)), BY_WORDS),
    **{f"pattern {place}": (byte_level(split_by(pattern)), BY_WORDS) for place, pattern in enumerate(PATTERNS)},
    "other pattern": (byte_level(split_by(r"\w+")), WHOLE),
    "lower": (byte_level(normalized(normalizers.Lowercase())), WHOLE),
    "takes white space": (byte_level(with_added(lstrip=True)), WHOLE),
    "llama": (llama(), WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_librarys(name: str) -> None:
    model, path = KINDS[name]
    tokenizer, plain = HuggingFaceTokenizer(model), tokenizers.Tokenizer.from_str(model.decode())
    encoder = Encoder(tokenizer, batch_bytes=128, max_words=32)
    assert path in encoder.path

    expected = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]
    ids, tokens, words = encoder.encode([text.encode() for text in TEXTS])
    assert [each.tolist() for each in np.split(ids, np.cumsum(tokens)[:-1])] == [
        [*each, tokenizer.eos_id] for each in expected
    ]
    assert words.tolist() == [len(text.split()) for text in TEXTS]

    if not encoder.why_whole:
        text = " \n".join(TEXTS)
        blocks = (text[at : at + 7].encode() for at in range(0, len(text), 7))
        found = np.concatenate([ids for ids, _ in encoder.encode_long(blocks)])
        assert found.tolist() == [*plain.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]


GPT2 = HuggingFaceTokenizer(KINDS["gpt2"][0])
LLAMA = HuggingFaceTokenizer(KINDS["llama"][0])


@given(text=st.text(st.sampled_from("ab 'tsre\n\t\u00a0é漢1½🎉\u0301\u200b\ufeff\x00\x1c_"), max_size=30) | st.text())
@settings(max_examples=50)
def test_any_text_comes_back(text: str) -> None:
    encoder = ENCODERS.setdefault("gpt2", Encoder(GPT2, batch_bytes=2**10, max_words=2**6))
    ids = GPT2.encode(text)
    assert encoder.encode([text.encode()])[0].tolist() == [*ids, GPT2.eos_id]
    assert GPT2.decode([*ids, GPT2.eos_id]) == text
    decoder = GPT2.decoder([GPT2.eos_id])
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


ENCODERS: dict[str, Encoder] = {}


@pytest.mark.parametrize(("tokenizer", "space"), [(GPT2, ""), (LLAMA, " ")], ids=["gpt2", "llama"])
def test_decoding_is_the_librarys(tokenizer: HuggingFaceTokenizer, space: str) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == tokenizer.library.decode(ids), text

    decoder = tokenizer.decoder(tokenizer.encode("the cat"))
    assert "".join(map(decoder.push, tokenizer.encode("anna"))) == f"{space}anna", "no space is left out behind a text"


def test_no_text_says_eos() -> None:
    for tokenizer, end in ((GPT2, "<|endoftext|>"), (LLAMA, "</s>")):
        ids = tokenizer.encode(f"a{end}b {end}")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a{end}b {end}"
        assert tokenizer.piece(tokenizer.eos_id) == end and tokenizer.piece_bytes(tokenizer.eos_id) == b""
    assert GPT2.encode("a<|im_end|>")[-1] == GPT2.library.token_to_id("<|im_end|>"), (
        "other special tokens are what they are"
    )
    assert (GPT2.unknown_id, LLAMA.unknown_id) == (-1, 0)


def test_a_merge_of_eos_with_more_is_left_out_as_eos_itself_is() -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"]["<|endoftext|>a"] = 400
        spec["model"]["merges"].append(["<|endoftext|>", "a"])

    tokenizer = HuggingFaceTokenizer(byte_level(edit))
    assert tokenizer.encode(TEXTS[0]) == GPT2.encode(TEXTS[0])
    assert tokenizer.encode("<|endoftext|>a") == GPT2.encode("<|endoftext|>a")


def test_an_eos_that_stands_for_unknown_text_is_refused_unless_nothing_is_unknown() -> None:
    def named(spec: dict[str, Any]) -> None:
        spec["model"]["unk_token"] = "<|endoftext|>"

    assert HuggingFaceTokenizer(byte_level(named)).encode("\0\U0001f389") == GPT2.encode("\0\U0001f389")

    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "anna": 1, "<eos>": 2}, unk_token="</s>"))
    words.add_special_tokens(["</s>", "<eos>"])
    with pytest.raises(UserError, match=r"</s> stands for unknown text and would end documents there; name another"):
        HuggingFaceTokenizer(words.to_str().encode())
    other = HuggingFaceTokenizer(with_eos(words.to_str().encode(), "tokenizer.json", "<eos>"))
    assert (other.eos_id, other.encode("otto")) == (2, [0])


def test_another_eos_is_recorded_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(GPT2.model)

    def load(eos: str) -> Tokenizer:
        return load_tokenizer(Config(tokenizer=TokenizerConfig(model=str(path), eos_piece=eos)))

    assert load("").digest == load("<|endoftext|>").digest == GPT2.digest, "texts end so anyway: the bytes stay"
    other = load("<|im_end|>")
    assert other.piece(other.eos_id) == "<|im_end|>" and other.digest != GPT2.digest
    assert HuggingFaceTokenizer(other.model).eos_id == other.eos_id
    assert tokenizers.Tokenizer.from_str(other.model.decode()).encode("anna").tokens[-1] == "<|im_end|>", (
        "as others read it"
    )
    path.write_text('{"added_tokens": [{"special": true}], "model": {}}')
    with pytest.raises(UserError, match="as the library writes it: KeyError"):
        load("</s>")
    path.write_bytes(GPT2.model)
    with pytest.raises(UserError, match=r"eos_piece=</s>: no special token of .*: <\|endoftext\|>, <\|im_end\|>"):
        load("</s>")


def test_texts_are_neither_cut_nor_padded() -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip

    tokenizer = HuggingFaceTokenizer(byte_level(edit))
    assert tokenizer.encode(TEXTS[0]) == tokenizer.encode_each([TEXTS[0]])[0] == GPT2.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: spec.update(added_tokens=[]), "no special token is known to end texts"),
        (lambda spec: spec["model"].update(dropout=0.1), "dropout is 0.1"),
        (
            lambda spec: spec.update(
                decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": False}
            ),
            "decoder CTC is not known",
        ),
        (lambda spec: spec.pop("model"), "not a tokenizer.json"),
        (lambda spec: spec["added_tokens"][0].pop("id"), "not a tokenizer.json as the library writes it: KeyError"),
        (lambda spec: spec["model"].update(vocab={"a": -1}), "cannot read it"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Mine"}), "cannot read it"),
    ],
)
def test_files_that_cannot_serve_are_refused_in_a_line(edit: Edit, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer(byte_level(edit), "x.json")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'rnnlm\[hf\]'"):
        HuggingFaceTokenizer(GPT2.model)


def test_a_stream_holds_the_file_and_its_tokens(tmp_path: Path, corpus: Path) -> None:
    config = Config(
        corpus=CorpusConfig(train=str(corpus)), stream=StreamConfig(directory=str(tmp_path / "s"), valid_fraction=0)
    )
    Build(config, GPT2).run(lambda size: None)
    stream = TokenStream(tmp_path / "s/train")
    assert (tmp_path / "s/train/tokenizer.json").read_bytes() == GPT2.model
    found = stream.tokenizer()
    assert found is not None and found.digest == GPT2.digest
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert stream.shard(0).tolist() == [token for line in lines for token in [*GPT2.encode(line), GPT2.eos_id]]


def test_random_tokenizers(run_here: RunHere) -> None:
    done = run_here("tools/fuzz_encoder.py", "--kind=huggingface", "--models=3", "--texts=40", "--seed=3")
    assert done.returncode == 0 and "3 models, 120 texts, 0 mismatches" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_many_random_tokenizers(run_here: RunHere) -> None:
    done = run_here("tools/fuzz_encoder.py", "--kind=huggingface", "--models=60", "--texts=500", "--seed=4")
    assert done.returncode == 0 and "30,000 texts, 0 mismatches" in done.stdout, done.stdout + done.stderr
