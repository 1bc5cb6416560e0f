"""The token stream on disk: its files, its manifest, its headers.

    stream.json          the manifest, written last: without it there is no stream
    tokenizer.model      the model that made the tokens
    shard-00000.npy ...  tokens, all documents in order, each ended by EOS; uint16, or uint32 above 65,536 pieces
    documents.npy        int64 (documents, 3): running totals of tokens, UTF-8 bytes of the text, words
    sources.jsonl        the input files in the order of the corpus, one a line
    origins.npy          int64 (documents, 2): line of sources.jsonl, byte or row where the document starts in that file
    rejected.jsonl       if any record was rejected or repaired: {"file", "at", "reason"} a line; `at` is a byte or row

An adopted stream (adopt.py) has links to another program's raw tokens instead, shard-00000.bin, behind a header of
that program or none, unsigned of any width; tokenizer.model only if one was given; 0, unknown, for all bytes and words;
and no origins. A stream of version 2 has none either: it lists its input files in the manifest.

Everything is plain `.npy`, so ten lines of numpy read it. A file's digest is over the bytes behind its header, since
the header holds the final count; the header is compared with the only one that dtype and count allow. The price of
running totals: a document's own size is a difference of two rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnnlm.errors import UserError
from rnnlm.hashing import json_digest

FORMAT = "rnnlm-stream"
VERSION = 3
LATER_FIELDS = ("sources", "repeated", "origins_sha256")  # of the manifest, since version 3
HEADER_BYTES = 128  # numpy pads headers to 64; ours always fit into 128
MANIFEST_BYTES = 2**26  # no manifest is larger: 10,000 shards take 2 MB


class StreamError(UserError):
    """A stream that is missing, damaged, or not what its manifest says."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stream.json holds; `digest` is the sha256 of the rest and stands for the whole stream."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer: str  # sha256 of tokenizer.model; empty: adopted without one
    tokens: int
    documents: int
    text_bytes: int  # 0: unknown, as are the words, in an adopted stream
    words: int
    unknown_tokens: int  # always 0 with byte fallback; a foreign tokenizer may lose text
    records: Mapping[str, int]  # read = kept + empty + duplicate + rejected, each rejection under its reason
    repeated: int = 0  # documents that are there once more, as shares above 1 ask for; not among the records
    mended: int  # documents repaired: kept with U+FFFD in place of invalid UTF-8
    source: Mapping[str, Any]  # what it was built from: same source, same stream
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # name -> documents, text_bytes, tokens
    shards: list[dict[str, Any]]  # name, tokens, sha256
    documents_sha256: str
    origins_sha256: str = ""  # empty: adopted, or of version 2
    rejected_sha256: str  # of rejected.jsonl; empty if there is none
    version: int = VERSION
    digest: str = ""

    @property
    def eos_tokens(self) -> int:
        """EOS tokens in the stream: one per document, except where an adopted stream says how many it found."""
        return int(self.source.get("eos_tokens", self.documents))

    def header_bytes(self, name: str) -> int:
        """Bytes before the first number of a file: ours, or those of the other program."""
        return int(self.source.get("header_bytes", 0)) if is_raw(name) else HEADER_BYTES

    def to_json(self) -> str:
        """The manifest as text, its digest in it."""
        body = {"format": FORMAT, "version": self.version, **self.__dict__}
        for name in ("digest", *(LATER_FIELDS if self.version < VERSION else ())):
            del body[name]
        return json.dumps({**body, "digest": json_digest(body)}, indent=1)

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """The manifest of a stream.

        Raises:
            StreamError: no stream there, an unknown format, or a manifest whose own digest differs.
        """
        path = Path(directory) / "stream.json"
        try:
            # opening a pipe would wait for its writer
            usable = path.stat().st_size <= MANIFEST_BYTES and path.is_file()
            text = path.read_text(encoding="utf-8") if usable else "{}"
            body = json.loads(text)
            if not isinstance(body, dict):
                raise ValueError("no object")
            computed = json_digest({key: value for key, value in body.items() if key != "digest"})
        except OSError as error:
            raise StreamError(f"{path}: {error.strerror}; build the stream with tools/build_stream.py") from error
        except (ValueError, RecursionError) as error:
            raise StreamError(f"{path}: not JSON ({error}); build the stream again") from error

        if not usable:
            raise StreamError(f"{path}: larger than any manifest, or no file; build the stream again")
        version = body.pop("version", None)
        if body.pop("format", None) != FORMAT or version not in (2, VERSION):
            raise StreamError(f"{path}: not a stream of format {FORMAT} version {VERSION}; build it again")
        digest = body.pop("digest", None)
        if digest != computed:
            raise StreamError(f"{path}: was changed since it was written (its digest differs); build the stream again")
        if wrong := _wrong_field(body, version):
            raise StreamError(f"{path}: its {wrong} is not what a stream has; build the stream again")

        # the digest is over values alone: other white space or order of keys, or a key given twice, would not show
        manifest = cls(**body, version=version, digest=digest)
        if manifest.to_json() != text:
            raise StreamError(f"{path}: was changed since it was written (its layout differs); build the stream again")
        return manifest


def _wrong_field(body: Mapping[str, Any], version: int) -> str:
    """The first field of a manifest that is missing, unknown, or of a type or size that no stream has; or nothing."""
    counts = ("vocab_size", "tokens", "documents", "text_bytes", "words", "unknown_tokens", "repeated", "mended")
    digests = ("tokenizer", "documents_sha256", "origins_sha256", "rejected_sha256")
    rules: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(counts, _is_count),
        **dict.fromkeys(digests, lambda value: isinstance(value, str)),
        "dtype": lambda value: value in ("|u1", "<u2", "<u4", "<u8"),
        "eos_id": lambda value: value == -1 or _is_count(value),
        "records": lambda value: isinstance(value, dict) and "read" in value and all(map(_is_count, value.values())),
        "source": lambda value: (
            isinstance(value, dict) and all(_is_count(value.get(name, 0)) for name in ("eos_tokens", "header_bytes"))
        ),
        "sources": lambda value: isinstance(value, dict) and all(map(_is_source, value.values())),
        "shards": lambda value: isinstance(value, list) and len(value) > 0 and all(map(_is_shard, value)),
    }

    if version < VERSION:
        rules = {name: rule for name, rule in rules.items() if name not in LATER_FIELDS}
    for name in {**body, **rules}:
        if name not in body or name not in rules or not rules[name](body[name]):
            return repr(name)[:100]  # an unknown one may be of any length
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**60  # sizes in bytes fit into 64 bits


def _is_source(value: object) -> bool:
    counts = {"documents", "text_bytes", "tokens"}
    return isinstance(value, dict) and {*value} == counts and all(map(_is_count, value.values()))


def _is_shard(value: object) -> bool:
    return (
        isinstance(value, dict)
        and {*value} == {"name", "tokens", "sha256"}
        and isinstance(value["name"], str)
        and isinstance(value["sha256"], str)
        and _is_count(value["tokens"])
        and value["tokens"] > 0
    )


def is_raw(name: str) -> bool:
    """Whether a shard is another program's file of tokens, without a header or with one of that program."""
    return name.endswith(".bin")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 `.npy` header of exactly HEADER_BYTES bytes."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode("latin1")
    text = text.ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text
