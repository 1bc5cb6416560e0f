"""Which of the corpus's named sources each token of a stream is from.

A document's line in sources.jsonl names its source, and neighbours of one source are one stretch:

    documents    a a a | b b | a | c c c c         stretches end at the tokens behind documents 3, 5, 6, 10

The price: the lines of all documents are read when the map is made, eight bytes for each.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from rnnlm.data.stream import TokenStream

BLOCK = 2**20  # documents looked at together


class SourceMap:
    """The source of every position of a stream; `names` are those of the manifest's `sources`, in its order."""

    def __init__(self, stream: TokenStream):
        self.names = list(stream.manifest.sources)
        with (stream.directory / "sources.jsonl").open(encoding="utf-8") as file:
            of_line = np.array([self.names.index(json.loads(line)["source"]) for line in file])  # (files,)

        ends, sources = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for first in range(0, stream.manifest.documents, BLOCK):
            of_document = of_line[stream.origins[first : first + BLOCK, 0]]  # (documents,)
            last = np.append(np.flatnonzero(np.diff(of_document)), len(of_document) - 1)  # of each stretch
            ends.append(stream.documents[first : first + BLOCK, 0][last])
            sources.append(of_document[last])
        self._ends, self._sources = np.concatenate(ends), np.concatenate(sources)  # (stretches,) each

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The numbers of the sources of the tokens at these positions of the ring, of any shape."""
        found = np.searchsorted(self._ends, positions % self._ends[-1], side="right")
        return np.asarray(self._sources[found])
