"""The input files of a build: the list of them that goes into each stream, with a digest of what is in each.

The list is a file of its own, sources.jsonl, since a corpus may be 300,000 files; the manifest holds its digest. A line
is {"split", "source", "file", "bytes", "content"}. The lines are in the order of the corpus, so that a document's
origin is the number of a line and a place in that file. What is in a file is read in samples, once: build/inputs.jsonl
remembers it for as long as size and time of the file stay. The price: a file that is edited between these samples, and
keeps its size, is taken for one that was only touched; the build says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from rnnlm import files
from rnnlm.data.sources import Source, content_digest
from rnnlm.data.stream_format import Manifest

READERS = 16  # files whose content is read at once: most of the time is waiting
NAMED = 3  # files that a message names, of all that differ


class Inputs:
    """The files of all splits, and what is in them; nothing is read before it is asked for."""

    def __init__(self, by_split: Mapping[str, Sequence[Source]], known: Path):
        """Files by split, and where their contents are remembered."""
        self.by_split, self.known = by_split, known
        self.touched: list[str] = []  # files of another time than was remembered, but of the same content
        self._contents = [""] * sum(map(len, by_split.values()))  # by line; empty: not known yet

    def all(self) -> Iterator[Source]:
        """Every file, in the order of the lines."""
        return chain.from_iterable(self.by_split.values())

    def first_line(self, split: str) -> int:
        """The line of sources.jsonl that names the first file of a split."""
        before = list(self.by_split)[: list(self.by_split).index(split)]
        return sum(len(self.by_split[each]) for each in before)

    def groups(self) -> list[str]:
        """The named source of each line."""
        return [source.group for source in self.all()]

    def learn(self, line: int, contents: Sequence[str]) -> None:
        """Take digests of consecutive files from whoever has read these."""
        self._contents[line : line + len(contents)] = contents

    def lines(self) -> Iterator[bytes]:
        """What is in sources.jsonl, a line at a time."""
        self._read_contents()
        number = 0
        for split, sources in self.by_split.items():
            for source in sources:
                line = {"split": split, "source": source.group, "file": source.name, "bytes": source.size}
                yield json.dumps({**line, "content": self._contents[number]}).encode() + b"\n"
                number += 1

    def digest(self) -> str:
        """sha256 of sources.jsonl."""
        sha256 = hashlib.sha256()
        for line in self.lines():
            sha256.update(line)
        return sha256.hexdigest()

    def remember(self) -> None:
        """Write down the contents, so that they need not be read again."""
        files.make_directory(self.known.parent)
        files.write(partial := files.temporary_path(self.known), self._write_known)
        files.rename(partial, self.known)

    def _write_known(self, path: Path) -> None:
        with path.open("wb") as file:
            for source, content in zip(self.all(), self._contents, strict=True):
                line = {"path": source.path, "bytes": source.size, "stamp": source.stamp, "content": content}
                file.write(json.dumps(line).encode() + b"\n")

    def _read_contents(self) -> None:
        """Know the contents of all files: those that were remembered, and those of the others from the files."""
        if all(self._contents):
            return

        sources, before = list(self.all()), dict[int, str]()
        lines = {source.path: line for line, source in enumerate(sources) if not self._contents[line]}
        for found in _json_lines(self.known):
            line = lines.get(found["path"], -1)
            if line >= 0 and found["bytes"] == sources[line].size:
                if sources[line].stamp and found["stamp"] == sources[line].stamp:
                    self._contents[line] = found["content"]
                else:
                    before[line] = found["content"]

        missing = [line for line, content in enumerate(self._contents) if not content]
        with ThreadPoolExecutor(READERS) as readers:
            contents = readers.map(content_digest, (sources[line] for line in missing))
            for line, content in zip(missing, contents, strict=True):
                self._contents[line] = content
                if before.get(line) == content:
                    self.touched.append(sources[line].path)

    def differing(self, stream: Path, manifest: Manifest) -> str:
        """How the files that a stream was made from differ from these, in words; nothing: they are the same."""
        if "files" in manifest.source:  # of version 2, which has names and sizes alone
            sizes = {split: [[each.name, each.size] for each in found] for split, found in self.by_split.items()}
            return "" if manifest.source["files"] == sizes else "input files"
        if manifest.source.get("sources_sha256") == self.digest():
            return ""

        theirs, mine = _json_lines(stream / "sources.jsonl"), map(json.loads, self.lines())
        pairs = list(zip_longest(theirs, mine))
        old, new = ({(each["split"], each["file"]): each for each in side if each} for side in zip(*pairs, strict=True))
        kinds = {
            "added": [name for name in new if name not in old],
            "removed": [name for name in old if name not in new],
            "edited": [name for name in new if name in old and _kept(new[name]) != _kept(old[name])],
        }
        texts = [f"{_names(names)} {kind}" for kind, names in kinds.items() if names]
        return f"input files ({'; '.join(texts) or 'their order, or the names of their sources'})"


def _kept(line: Mapping[str, Any]) -> tuple[int, str]:
    return line["bytes"], line["content"]


def _names(names: Sequence[tuple[str, str]]) -> str:
    """Some files, by split and name, in words."""
    shown = ", ".join(name for _, name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, up to the first line that is none; nothing if there is no file."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
    except (FileNotFoundError, ValueError):
        return
