"""A sample of a corpus that is bounded in memory, and the same for any order and any division of the work.

A document is cut into excerpts, so that a long one does not fill the sample alone. Each has a number, hashed from its
text and from where it stands, so that copies of a line are drawn independently of one another; those with the smallest
numbers that fit are the sample. So samples of parts of a corpus add up to the sample of all of it. The price: the whole
corpus is read to choose it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from rnnlm.hashing import fraction, fraction_of, keyed_hash

EXCERPT_CHARACTERS = 16384


class Sample:
    """The excerpts with the smallest keyed hashes that fit into `max_bytes`, whatever order they come in.

    `limit`: excerpts whose number is not below it have no chance; a limit that another sample of the same corpus has
    reached may be given to this one.
    """

    def __init__(self, max_bytes: int, seed: int, limit: float = 1.0):
        self.max_bytes, self.limit = max_bytes, limit
        self.seen_bytes = self.kept_bytes = 0
        self._seed = seed
        self._heap: list[tuple[float, str]] = []  # (-number, text): the largest number is dropped first

    def add(self, parts: Iterable[str], name: str, offset: int) -> None:
        """Offer a document that comes in parts, and stands at `offset` in the file of this name."""
        # a file's name need not be valid UTF-8
        place = keyed_hash(self._seed, f"{name}\n{offset}\n".encode(errors="surrogateescape"))
        for index, text in enumerate(excerpts(parts)):
            data = text.encode()
            self.seen_bytes += len(data)
            hashed = place.copy()
            hashed.update(f"{index}\n".encode() + data)
            self.keep(fraction(hashed), text)

    def keep(self, number: float, text: str) -> None:
        """Take an excerpt with its number, if it belongs to the sample of all that came so far."""
        if number >= self.limit:
            return
        heapq.heappush(self._heap, (-number, text))
        self.kept_bytes += len(text.encode())

        while self.kept_bytes > self.max_bytes:
            number, dropped = heapq.heappop(self._heap)
            self.limit = -number
            self.kept_bytes -= len(dropped.encode())

    def numbered(self) -> Iterator[tuple[float, str]]:
        """The excerpts with their numbers, in no order."""
        return ((-number, text) for number, text in self._heap)

    def texts(self) -> list[str]:
        """The sample, in an order that depends on nothing but its texts."""
        return sorted(
            (text for _, text in self._heap), key=lambda text: (-fraction_of(text.encode(), self._seed), text)
        )


def excerpts(parts: Iterable[str]) -> Iterator[str]:
    """A document in excerpts that do not depend on its parts: cut after white space, where there is any."""
    rest = ""
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > EXCERPT_CHARACTERS:
            end = start + EXCERPT_CHARACTERS
            space = max(rest.rfind(" ", start, end), rest.rfind("\n", start, end))
            end = space + 1 if space > start else end
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest
