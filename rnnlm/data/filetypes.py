"""What a file is, by its name; and by its first bytes, where its name lies.

A name tells how to open a file before anything of it is read, so that units can be planned without opening a million
files. The price: a file with a wrong name is found only when it is read, and is then refused, not guessed at.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from rnnlm.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow", ".feather")  # whose rows are documents
PACK_ANEW = "decompress it, or pack it as .zst, .gz, .xz or .bz2"
MAKE_TEXT = "turn it into text first, as pandoc or pdftotext do"
UNPACK = "unpack it, and name the files that were in it"
ADOPT = "tokens go in by tools/adopt_stream.py; corpus files are text"

REFUSED = {  # what no value of corpus.document reads -> the way out
    **dict.fromkeys((".lz4", ".br", ".lzma", ".z", ".lzo", ".sz", ".snappy"), PACK_ANEW),
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), UNPACK),
    ".zip": f"{UNPACK}, or name them within it, as zip://*.txt::file.zip",
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ods"), MAKE_TEXT),
    **dict.fromkeys((".bin", ".idx", ".npy"), ADOPT),
    **dict.fromkeys((".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".h5", ".hdf5"), "it holds no text"),
    **dict.fromkeys((".sqlite", ".db", ".orc", ".avro", ".tfrecord"), "export its text as .jsonl or .parquet"),
}

UNCLEAR = {  # text, but perhaps not documents as they stand: corpus.document must say so -> the other way out
    ".json": "if each line is one object, set corpus.document=jsonl; else write its objects one a line as .jsonl",
    **dict.fromkeys((".csv", ".tsv"), "write its column of text as .jsonl or .parquet"),
    **dict.fromkeys((".html", ".htm", ".xml"), MAKE_TEXT),
}

MAGICS = (  # (offset, first bytes, what begins so, the suffix that it should have, or "")
    (0, b"\x1f\x8b", "gzip", ".gz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd", ".zst"),
    (0, b"\xfd7zXZ\0", "xz", ".xz"),
    *((0, b"BZh%c1AY&SY" % digit, "bzip2", ".bz2") for digit in b"123456789"),
    (0, b"PAR1\x15", "parquet", ".parquet"),
    (0, b"ARROW1\0\0", "an Arrow file", ".arrow"),
    (0, b"PK\3\4", "a zip archive", ".zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", ".7z"),
    (0, b"Rar!\x1a\7", "a rar archive", ".rar"),
    (257, b"ustar", "a tar archive", ".tar"),
    (0, b"\x04\x22\x4d\x18", "lz4", ".lz4"),
    (0, b"%PDF-", "PDF", ".pdf"),
    (0, b"\x93NUMPY", "an array of numpy", ".npy"),
    (0, b"SQLite format 3\0", "an SQLite database", ".sqlite"),
    (0, b"\x89HDF\r\n", "HDF5", ".h5"),
    (0, b"\xff\xfe", "UTF-16", ""),
    (0, b"\xfe\xff", "UTF-16", ""),
)


def suffix_of(path: str) -> str:
    """The end of a file's name that tells how to open it, in small letters."""
    return PurePosixPath(path).suffix.lower()


def is_table(path: str) -> bool:
    """Whether its records are the rows of a table."""
    return suffix_of(path) in TABLES


def is_streamed(path: str) -> bool:
    """Whether a file can only be read from its start, or says itself where its units begin."""
    return suffix_of(path) in (*COMPRESSED, *TABLES)


def document_of(path: str, document: str) -> str:
    """What a document is in one file: what corpus.document says; with auto, what the name says. Rows count as lines."""
    if is_table(path):
        return "line"
    return document if document != "auto" else "jsonl" if _inner_suffix(path) in JSON_LINES else "line"


def document_of_all(paths: list[str], document: str) -> str:
    """The one value of corpus.document that has the effect of auto for all these files; auto if there is none."""
    if document != "auto":
        return document
    kinds = {document_of(path, document) for path in paths if not is_table(path)} or {"line"}
    return kinds.pop() if len(kinds) == 1 else "auto"


def check_name(path: str, document: str, what: str) -> None:
    """Refuse what cannot be read, or not without corpus.document; `what` begins the error.

    Raises:
        UserError: with the way out.
    """
    suffix, inner = suffix_of(path), _inner_suffix(path)
    if inner in REFUSED:
        raise UserError(f"{what}: {path}: {inner} files cannot be read; {REFUSED[inner]}")
    if inner != suffix and inner in TABLES:
        raise UserError(f"{what}: {path}: {inner} files are read as they are, not within {suffix}; decompress it")
    if inner in UNCLEAR and document == "auto":
        as_lines = "" if inner == ".json" else ", or set corpus.document=line to take its lines as they stand"
        raise UserError(f"{what}: {path}: a {inner} file is not documents as it stands; {UNCLEAR[inner]}{as_lines}")


def disguised(path: str, data: bytes) -> tuple[str, str] | None:
    """(what it is, the way out) if a text begins as no text does; None if nothing is wrong.

    Args:
        data: its first bytes, decompressed if its name says so.
    """
    for offset, magic, kind, suffix in MAGICS:
        if not data.startswith(magic, offset):
            continue

        if not suffix:
            return kind, "convert it, as iconv -f UTF-16 -t UTF-8 does"
        if suffix_of(path) in COMPRESSED:
            return f"{kind} within {suffix_of(path)}", "decompress it"
        return kind, REFUSED.get(suffix, f"give it a name that ends in {suffix}")
    return None


def _inner_suffix(path: str) -> str:
    """The suffix before that of a compression, if there is one: .jsonl of a.jsonl.gz."""
    suffix = suffix_of(path)
    return suffix_of(path[: -len(suffix)]) if suffix in COMPRESSED else suffix
