"""Hugging Face's tokenizer.json: its own library, `tokenizers` (extra hf), does the work, so any such file serves.

Texts are encoded as the library does with add_special_tokens=False, and neither cut short nor padded, with one
difference: EOS is never made of a text, so that a document which says <|endoftext|> does not end there. EOS is the
special token that the file's own template puts behind a text, else the first of EOS_PIECES that is a special token.
The price: how tokens become bytes again is written in Python here, for the decoders that language models have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rnnlm.data.tokenizer import StreamDecoder, Tokenizer
from rnnlm.errors import UserError

EOS_PIECES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # every worker of a build would start threads for all cores


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json with a special token that ends texts."""

    file_name = "tokenizer.json"
    description = "huggingface"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """As Tokenizer: the bytes are JSON.

        Raises:
            UserError: also where the library is missing, or a decoder is not known.
        """
        super().__init__(model, name)
        with _well_formed(name):
            self._read(read_spec(model, name))

    def _read(self, spec: dict[str, Any]) -> None:
        eos = eos_piece(spec, self.name)
        self.spec = spec
        self._added = {int(token["id"]): token for token in spec["added_tokens"]}
        self.eos_id = next(token for token, entry in self._added.items() if entry["content"] == eos)

        self.library = _load(spec, eos, f"\0{self.digest}", self.name)
        self._pieces = {token: piece for piece, token in self.library.get_vocab().items()}
        self._pieces[self.eos_id] = eos
        self.vocab_size = max(self._pieces) + 1
        named = str(spec["model"].get("unk_token") or "")
        unknown = spec["model"].get("unk_id", self.library.token_to_id(named))
        self.unknown_id = -1 if unknown is None else int(unknown)
        if (named == eos or self.unknown_id == self.eos_id) and not _knows_all_bytes(spec):
            raise UserError(
                f"{self.name}: {eos} stands for unknown text and would end documents there; name another special token "
                "with tokenizer.eos_piece"
            )
        self._decoding = _Decoding(spec.get("decoder"), self.name)

    @property
    def added_tokens(self) -> Iterable[dict[str, Any]]:
        """The tokens that are found in a text before anything else; EOS is not among them."""
        return (token for number, token in self._added.items() if number != self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without EOS."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_each(self, texts: list[str], add_eos: bool = False) -> list[list[int]]:
        """The ids of several texts, in this thread."""
        end = [self.eos_id] if add_eos else []
        return [[*found.ids, *end] for found in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens vanish, broken UTF-8 becomes U+FFFD."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, map(int, ids)), decoder.finish()])

    def decoder(self, context: Iterable[int] = ()) -> StreamDecoder:
        """A decoder of ids that come one at a time after those of `context`."""
        return _Decoder(self, at_start=all(i == self.eos_id for i in context))

    def piece(self, token: int) -> str:
        """The entry of an id as the file writes it; an id without one as <no piece 17>."""
        return str(self._pieces.get(token, f"<no piece {token}>"))

    def opens_with_space(self, token: int) -> bool:
        """Whether a piece begins with a space that the decoder leaves out at the start of a text."""
        return self.first_bytes(token) != self.piece_bytes(token)

    def first_bytes(self, token: int) -> bytes:
        """As piece_bytes, of a token before which there is no text."""
        return self._decoding.at_start(self.piece_bytes(token))

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character."""
        if token not in self._pieces or self._added.get(token, {}).get("special"):
            return b""
        return self._decoding.bytes_of(self._pieces[token])


class _Decoder(StreamDecoder):
    """Leaves out the space before the first token that has a text, and no other."""

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come."""
        assert isinstance(self._tokenizer, HuggingFaceTokenizer)
        data = self._tokenizer.piece_bytes(token)
        if self._at_start and data:
            data, self._at_start = self._tokenizer.first_bytes(token), False
        return self._utf8.decode(data)


class _Decoding:
    """How pieces become bytes: what the decoders of a file do one after the other, as one rule for each piece."""

    def __init__(self, decoder: dict[str, Any] | None, name: str):
        self._strips = 0  # spaces that are left out at the start of a text
        self._byte_level = self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self._glue: str | None = (
            None if decoder else ""
        )  # pieces have a space before them unless they begin so; None: none
        for step in steps(decoder):
            self._add(step, name)

    def _add(self, step: dict[str, Any], name: str) -> None:
        kind = step["type"]
        if kind == "ByteLevel":
            self._byte_level = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Metaspace":
            self._replace.append((step["replacement"], " "))
            self._strips = 0 if step.get("prepend_scheme", "always") == "never" else 2**30
        elif kind == "Replace" and "String" in step["pattern"]:
            self._replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            self._strips = 1
        elif kind == "BPEDecoder":
            self._replace.append((step["suffix"], " "))
        elif kind == "WordPiece":
            self._glue = step["prefix"]

        # Fuse joins the pieces, which is done anyway
        elif kind != "Fuse":
            raise UserError(
                f"{name}: its decoder {kind} is not known; give a file with ByteLevel, Metaspace or WordPiece"
            )

    def at_start(self, data: bytes) -> bytes:
        """These bytes of a piece without the space before it."""
        strips = self._strips if self._glue is None else 1
        return data[min(strips, len(data) - len(data.lstrip(b" "))) :]

    def bytes_of(self, piece: str) -> bytes:
        """The bytes of a piece that is not special."""
        if self._byte_level and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        if self._byte_fallback and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
            return bytes([int(piece[3:5], 16)])
        for old, new in self._replace:
            piece = piece.replace(old, new)
        if self._glue is not None:
            piece = piece.removeprefix(self._glue) if self._glue and piece.startswith(self._glue) else f" {piece}"
        return piece.encode()


def _byte_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary: a printable one stands for itself, others for the rest."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {chr(byte) if byte in plain else chr(next(others)): byte for byte in range(256)}


BYTES = _byte_characters()


def _knows_all_bytes(spec: dict[str, Any]) -> bool:
    """Whether a model has a piece for each byte that a text can have, so that nothing is unknown to it."""
    vocab = spec["model"].get("vocab", ())
    levels = any(step["type"] == "ByteLevel" for step in steps(spec.get("pre_tokenizer")))
    fallback = spec["model"].get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return bool((levels and all(character in vocab for character in BYTES)) or fallback)


def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The simple parts of a part of a file that may be a sequence of others, or nothing."""
    if part is None:
        return
    for key in ("decoders", "processors", "normalizers", "pretokenizers"):
        if part["type"] == "Sequence" and key in part:
            for each in part[key]:
                yield from steps(each)
            return
    yield part


@contextmanager
def _well_formed(name: str) -> Iterator[None]:
    """A UserError for whatever is missing, or of another type, where a file is read."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, ValueError) as error:
        raise UserError(f"{name}: not a tokenizer.json as the library writes it: {error!r}") from error


def read_spec(model: bytes, name: str) -> dict[str, Any]:
    """The JSON of a file.

    Raises:
        UserError: it is no tokenizer.json.
    """
    try:
        spec = json.loads(model)
        kinds = {"added_tokens": list, "model": dict}
        right = isinstance(spec, dict) and all(isinstance(spec.get(key), kind) for key, kind in kinds.items())
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{name}: not a tokenizer.json; give one of Hugging Face, or train another tokenizer")
    if spec["model"].get("dropout"):
        raise UserError(f"{name}: model.dropout is {spec['model']['dropout']}: ids would be drawn; write null there")
    return dict(spec)


def eos_piece(spec: dict[str, Any], name: str) -> str:
    """The special token that ends texts.

    Raises:
        UserError: none is known to.
    """
    special = [token["content"] for token in spec["added_tokens"] if token.get("special")]
    for step in steps(spec.get("post_processor")):
        last = step["single"][-1] if step["type"] == "TemplateProcessing" and step["single"] else {}
        if "SpecialToken" in last and last["SpecialToken"]["id"] in special:
            return str(last["SpecialToken"]["id"])
    for piece in EOS_PIECES:
        if piece in special:
            return piece
    known = f"one of {', '.join(special[:8])}" if special else "a file that has special tokens"
    raise UserError(f"{name}: no special token is known to end texts; name it with tokenizer.eos_piece: {known}")


def with_eos(model: bytes, name: str, piece: str) -> bytes:
    """A file whose template puts this special token behind a text; the same bytes where texts end with it anyway.

    Raises:
        UserError: it is no special token of the file.
    """
    with _well_formed(name):
        return _with_template(model, name, piece)


def _with_template(model: bytes, name: str, piece: str) -> bytes:
    spec = read_spec(model, name)
    special = {token["content"]: token["id"] for token in spec["added_tokens"] if token.get("special")}
    if piece not in special:
        known = ", ".join(special) or "none that it has"
        raise UserError(
            f"tokenizer.eos_piece={piece}: no special token of {name}; name the one that ends a text: {known}"
        )
    try:
        if eos_piece(spec, name) == piece:
            return model
    except UserError:
        pass

    first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
    end = {"SpecialToken": {"id": piece, "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [first, end], "pair": [first, end, second, end],
        "special_tokens": {piece: {"id": piece, "ids": [special[piece]], "tokens": [piece]}},
    }  # fmt: skip
    others = [step for step in steps(spec.get("post_processor")) if step["type"] != "TemplateProcessing"]
    spec["post_processor"] = {"type": "Sequence", "processors": [*others, template]}
    return json.dumps(spec, ensure_ascii=False).encode()


def _load(spec: dict[str, Any], eos: str, hidden: str, name: str) -> Any:
    """The library's tokenizer, in which EOS is called `hidden`, as no text says, and texts stay as long as they are."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{name}: reading it needs tokenizers; pip install 'rnnlm[hf]'") from error

    model = dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {hidden if piece == eos else piece: token for piece, token in vocab.items()}
    elif isinstance(vocab, list):  # Unigram's: pieces and their scores
        model["vocab"] = [[hidden if piece == eos else piece, score] for piece, score in vocab]
    if model.get("unk_token") == eos:
        model["unk_token"] = hidden
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if eos not in (*pair, "".join(pair))]
    added = [{**token, "content": hidden} if token["content"] == eos else token for token in spec["added_tokens"]]
    plain = {"truncation": None, "padding": None, "post_processor": None}

    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, **plain, "model": model, "added_tokens": added}))
    except BaseException as error:  # the library panics over some files, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{name}: the library tokenizers cannot read it: {error}") from error
