"""Show what is in token streams: sizes, counts, the most frequent pieces, how long documents are.

    python tools/inspect_stream.py streams/my/train
    python tools/inspect_stream.py streams/my/train streams/my/valid --pieces 50
    python tools/inspect_stream.py streams/my/train --document 12345    # its text, its tokens, and where it is from

The report reads every token once, in blocks. Whether they are the right ones is what tools/verify_stream.py tells.
Documents are counted from 0, as the rows of documents.npy.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

try:
    from rnnlm.cli import run_entry_point
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None

if TYPE_CHECKING:
    from rnnlm.data.stream import TokenStream

BLOCK = 2**20  # tokens or documents in memory at once
BAR = 40  # characters of the longest one
SHOWN_TOKENS = 10_000  # of a document
TOKENS_PER_LINE = 8
Counts = npt.NDArray[np.int64]


def token_counts(stream: "TokenStream") -> Counts:
    """(vocab_size,) how often each id occurs."""
    size = stream.manifest.vocab_size
    counts = np.zeros(size, np.int64)
    for index, shard in enumerate(stream.manifest.shards):
        tokens = stream.shard(index)
        for first in range(0, len(tokens), BLOCK):
            block = tokens[first : first + BLOCK].astype(np.int64)  # bincount takes no uint64
            if int(block.max()) >= size:  # before bincount makes room for it
                raise UserError(f"{stream.directory}/{shard['name']}: a token outside the vocabulary of {size}")
            counts += np.bincount(block, minlength=size)
    return counts


def length_counts(stream: "TokenStream") -> tuple[Counts, Counts]:
    """The lengths that documents have, in tokens, ascending, and how many have each.

    N tokens have room for fewer than sqrt(2 N) + 1 different lengths, so this fits into memory for any stream.
    """
    lengths, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    ends, last = stream.documents[:, 0], 0  # (documents,)
    for first in range(0, len(ends), BLOCK):
        block = ends[first : first + BLOCK]
        found, often = np.unique(np.diff(block, prepend=last), return_counts=True)
        last = int(block[-1])

        # add the block's counts to those of the same length
        lengths, place = np.unique(np.concatenate([lengths, found]), return_inverse=True)
        merged = np.zeros(len(lengths), np.int64)
        np.add.at(merged, place, np.concatenate([counts, often]))
        counts = merged
    return lengths, counts


def histogram(lengths: Counts, counts: Counts) -> Iterator[str]:
    """A line with a bar for each power of two: how many lengths are at least it, and below the next."""
    powers = np.frexp(lengths)[1]  # (lengths,): 0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 to 7 -> 3, ...
    rows = {power: int(counts[powers == power].sum()) for power in range(powers.min(), powers.max() + 1)}
    for power, count in rows.items():
        low, high = 2**power // 2, max(0, 2**power - 1)
        label = f"{low:,}" if low == high else f"{low:,} - {high:,}"
        yield f"  {label:>23} {count:>13,} {'#' * -(-BAR * count // max(rows.values()))}".rstrip()


def report(stream: "TokenStream", pieces: int) -> Iterator[str]:
    """The lines about one stream."""
    manifest: Any = stream.manifest
    files = sum(path.stat().st_size for path in stream.directory.iterdir())  # links: what they lead to
    yield f"{stream.directory}: {files:,} bytes on disk, {len(manifest.shards)} shard(s) of {manifest.dtype}"
    for shard in manifest.shards:
        if (path := stream.directory / shard["name"]).is_symlink():
            yield f"  {shard['name']} is a link to {path.readlink()}"
    yield f"  {manifest.documents:,} documents, {manifest.tokens:,} tokens"
    if manifest.text_bytes:
        each = manifest.text_bytes / manifest.tokens
        yield f"  {manifest.text_bytes:,} bytes of text, {each:.3f} per token; {manifest.words:,} words"
    else:
        yield "  bytes and words of the text: unknown"
    yield "  records: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest.records.items())
    yield f"  {manifest.mended:,} documents repaired, {manifest.unknown_tokens:,} unknown tokens"

    counts = token_counts(stream)
    tokenizer = stream.tokenizer() if manifest.tokenizer else None
    yield f"{np.count_nonzero(counts):,} of {manifest.vocab_size:,} ids occur; the most frequent:"
    for token in np.argsort(-counts, kind="stable")[: min(pieces, np.count_nonzero(counts))].tolist():
        piece = repr(tokenizer.piece(token)) if tokenizer else "EOS" if token == manifest.eos_id else ""
        yield f"  {token:>9} {counts[token]:>15,} {counts[token] / manifest.tokens:>7.2%} {piece}".rstrip()

    if manifest.documents:
        lengths, often = length_counts(stream)
        median = lengths[np.searchsorted(np.cumsum(often), (manifest.documents + 1) // 2)]
        yield f"documents by length in tokens: median {median:,}, longest {lengths[-1]:,}"
        yield from histogram(lengths, often)


def show_document(stream: "TokenStream", number: int) -> Iterator[str]:
    """The lines about one document: its text, its tokens with their pieces, and where it is from.

    Raises:
        UserError: there is no such document; or, behind the text, the stream does not know where it is from.
    """
    count = stream.manifest.documents
    if not 0 <= number < count:
        raise UserError(f"--document={number}: {stream.directory} has {count:,} documents, 0 to {count - 1}")
    before = stream.documents[number - 1] if number else np.zeros(3, np.int64)  # tokens, bytes, words
    size, text_bytes, words = (stream.documents[number] - before).tolist()
    tokens = stream.windows(before[:1], min(size, SHOWN_TOKENS))[0].tolist()

    yield f"{stream.directory}: document {number:,} of {count:,}, tokens {before[0]:,} to {before[0] + size - 1:,}"
    if size > SHOWN_TOKENS:
        yield f"  of its {size:,} tokens the first {SHOWN_TOKENS:,} are shown"
    if stream.manifest.tokenizer:
        tokenizer = stream.tokenizer()
        yield f"text, {text_bytes:,} bytes and {words:,} words, as its tokens have it:"
        yield tokenizer.decode([token for token in tokens if token != stream.manifest.eos_id])
        shown = [f"{token} {tokenizer.piece(token)!r}" for token in tokens]
    else:
        shown = [str(token) for token in tokens]
    yield f"{size:,} tokens:"
    for first in range(0, len(shown), TOKENS_PER_LINE):
        yield "  " + "  ".join(shown[first : first + TOKENS_PER_LINE])
    yield origin_of(stream, number)


def origin_of(stream: "TokenStream", number: int) -> str:
    """The line about where a document is from."""
    from rnnlm.data.filetypes import is_table

    line, at = stream.origins[number].tolist()
    with (stream.directory / "sources.jsonl").open(encoding="utf-8") as file:
        source = json.loads(next(islice(file, line, None)))
    named = f", source {source['source']}" if source["source"] else ""
    kind = "row" if is_table(source["file"]) else "byte"
    name = source["file"].encode(errors="surrogateescape").decode(errors="backslashreplace")  # it need not be UTF-8
    return f"from corpus.{source['split']}{named}: {name}, {kind} {at:,}"


def main() -> None:
    """Print the report on each stream in turn, or one of its documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", type=Path, nargs="+", help="directories of streams")
    parser.add_argument("--pieces", type=int, default=20, metavar="N", help="show this many of the most frequent")
    parser.add_argument("--document", type=int, metavar="N", help="show this document instead")
    options = parser.parse_args()
    from rnnlm.data.stream import TokenStream

    for directory in options.streams:
        stream = TokenStream(directory)
        for line in (
            report(stream, options.pieces) if options.document is None else show_document(stream, options.document)
        ):
            print(line)


if __name__ == "__main__":
    run_entry_point(main)
