"""Words as tokens, for text that is already tokenised: one id for each word between white space.

The file is a table that other programs read too, a line for each entry with its id behind it, under a line that says
what is special in it:

    # rnnlm words 1 {"eos": "</s>", "unknown": "<unk>"}
    <unk> 0
    </s> 1
    the 2

A word is what str.split makes of a text. A word without an id, and one that is called like EOS, is the unknown token,
as is a literal <unk>: each occurrence is a token of its own. A table of characters (a speech recogniser's) cuts words
into these, and writes its own sign for a space between them if it has one. The price: white space itself is lost, which
`decode` writes as single spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError

BEGIN = "# rnnlm words 1 "


class WordTokenizer(Tokenizer):
    """A table of words, or of characters, and their ids; ids without an entry are allowed, and never used."""

    file_name = "words.txt"
    encodes = "words"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """As Tokenizer: the bytes are a table as in the module's docstring."""
        super().__init__(model, name)
        head, _, table = _decoded(model, name).partition("\n")
        special = _special(head, name)
        self._ids = _entries(table, name)
        self._pieces = {token: piece for piece, token in self._ids.items()}
        self.vocab_size = max(self._pieces, default=-1) + 1

        for role in ("eos", "unknown"):
            if special.get(role) not in self._ids:
                raise UserError(f"{name}: its {role} piece {special.get(role)!r} has no id; add a line for it")
        self.eos_id, self.unknown_id = self._ids[special["eos"]], self._ids[special["unknown"]]
        self._space = special.get("space", "")
        self.by_characters = bool(special.get("characters"))
        # these have an id, but are nothing that a text can say
        self._silent = {special["eos"], self._space, *special.get("silent", [])} - {""}
        self.known = {piece: token for piece, token in self._ids.items() if piece not in self._silent}

    @property
    def description(self) -> str:
        """What its entries are."""
        return "characters of a table" if self.by_characters else "word"

    @classmethod
    def of(cls, entries: Mapping[str, int], **special: Any) -> WordTokenizer:
        """A tokenizer of entries and their ids; special: eos, unknown, and perhaps characters, space, silent."""
        head = BEGIN + json.dumps(special, ensure_ascii=False)
        lines = [f"{piece} {token}" for piece, token in sorted(entries.items(), key=lambda entry: entry[1])]
        return cls(("\n".join([head, *lines]) + "\n").encode())

    def encode(self, text: str) -> list[int]:
        """The id of each word, or of each character of each."""
        return self.word_ids([text], first=True)[0]

    def word_ids(self, words: Sequence[str], first: bool) -> list[list[int]]:
        """The ids of each; a text that str.split cuts further has those of its parts."""
        known, unknown = self.known, self.unknown_id
        if not self.by_characters:
            return [[known.get(part, unknown) for part in word.split()] for word in words]

        space = [self._ids[self._space]] if self._space else []
        found = [
            [token for part in word.split() for token in (*space, *(known.get(each, unknown) for each in part))]
            for word in words
        ]
        return [ids[len(space) :] for ids in found] if first else found

    def decode(self, ids: Iterable[int]) -> str:
        """The words with a space between each two, or the characters as they are; EOS vanishes."""
        text = b"".join(map(self.piece_bytes, ids)).decode()
        return text if self.by_characters else text.removeprefix(" ")

    def piece(self, token: int) -> str:
        """The entry of an id; an id without one as <no piece 17>."""
        return self._pieces.get(token, f"<no piece {token}>")

    def piece_bytes(self, token: int) -> bytes:
        """A word with a space before it, or a character; nothing for EOS and what has no text."""
        piece = self._pieces.get(token, "")
        if self._space and piece == self._space:
            return b" "
        if not piece or piece in self._silent:
            return b""
        return piece.encode() if self.by_characters else b" " + piece.encode()

    def opens_with_space(self, token: int) -> bool:
        """Words do."""
        return not self.by_characters


def _decoded(model: bytes, name: str) -> str:
    try:
        return model.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not a table of words ({error}); write it with --tokenizer.kind=word") from error


def _special(head: str, name: str) -> dict[str, Any]:
    """What the first line says."""
    try:
        special = json.loads(head.removeprefix(BEGIN))
    except (ValueError, RecursionError):
        special = None
    texts = ("eos", "unknown", "space")
    if not isinstance(special, dict) or not all(isinstance(special.get(key, ""), str) for key in texts):
        raise UserError(f"{name}: its first line is {head[:80]!r}, expected {BEGIN}and a JSON object with eos, unknown")
    silent = special.get("silent", [])
    if not isinstance(silent, list) or not all(isinstance(piece, str) for piece in silent):
        raise UserError(f"{name}: silent in its first line is no list of pieces; write the table again")
    return special


def _entries(table: str, name: str) -> dict[str, int]:
    """Entry -> id."""
    ids: dict[str, int] = {}
    seen = set[int]()
    for number, line in enumerate(table.removesuffix("\n").split("\n"), 2):
        piece, _, digits = line.rpartition(" ")
        token = int(digits) if re.fullmatch(r"[0-9]{1,7}", digits) else -1
        if not piece or token < 0 or piece in ids or token in seen:
            expected = "expected an entry and an id below 10,000,000, each of them once"
            raise UserError(f"{name}: line {number} is {line[:80]!r}, {expected}")
        ids[piece] = token
        seen.add(token)
    return ids
