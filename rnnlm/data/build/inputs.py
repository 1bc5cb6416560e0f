"""The input files of a build: the list of them that goes into each stream, with a digest of what is in each.

The list is a file of its own, sources.jsonl, since a corpus may be 300,000 files; the manifest holds its digest. A line
is {"split", "source", "file", "bytes", "content"}. The lines are in the order of the corpus, so that a document's
origin is the number of a line and a place in that file. The price: a stream is the same wherever the corpus lies, and
so does not say where that was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from rnnlm.data.sources import Source, content_digest


class Inputs:
    """The files of all splits, and what is in them."""

    def __init__(self, files: Mapping[str, Sequence[Source]]):
        self.files = files
        self._contents: dict[tuple[str, int], str] = {}

    def first_line(self, split: str) -> int:
        """The line of sources.jsonl that names the first file of a split."""
        first = 0
        for name, files in self.files.items():
            if name == split:
                break
            first += len(files)
        return first

    def groups(self) -> list[str]:
        """The named source of each line."""
        return [source.group for source in chain.from_iterable(self.files.values())]

    def lines(self) -> Iterator[bytes]:
        """What is in sources.jsonl, a line at a time."""
        for split, files in self.files.items():
            for number, source in enumerate(files):
                if (split, number) not in self._contents:
                    self._contents[split, number] = content_digest(source)
                line = {
                    "split": split,
                    "source": source.group,
                    "file": source.name,
                    "bytes": source.size,
                    "content": self._contents[split, number],
                }
                yield json.dumps(line).encode() + b"\n"

    def digest(self) -> str:
        """sha256 of sources.jsonl."""
        sha256 = hashlib.sha256()
        for line in self.lines():
            sha256.update(line)
        return sha256.hexdigest()
