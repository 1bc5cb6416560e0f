"""Check every byte of token streams: sizes, digests, ranges of ids, counts.

    python tools/verify_stream.py streams/my/train streams/my/valid
    python tools/verify_stream.py streams/my/train --show 60     # and decode both ends of each shard

Exit code 2 and the name of the file if anything is wrong.
"""

import argparse
import time
from pathlib import Path

try:
    from rnnlm.cli import run_entry_point
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Verify each stream in turn; the first fault ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", type=Path, nargs="+", help="directories of streams")
    parser.add_argument("--show", type=int, default=0, metavar="TOKENS", help="decode this many at both ends of shards")
    options = parser.parse_args()
    from rnnlm.data.stream import TokenStream

    for directory in options.streams:
        stream = TokenStream(directory)
        started = time.perf_counter()
        size = sum(size for _, size in stream.verify())
        speed = size / 1e6 / max(1e-9, time.perf_counter() - started)
        print(
            f"{directory}: right; {stream.tokens:,} tokens, {stream.manifest.documents:,} documents, "
            f"{len(stream.manifest.shards)} shard(s), {size / 1e6:.1f} MB at {speed:,.0f} MB/s"
        )
        tokenizer = stream.tokenizer() if options.show else None  # an adopted stream may have none
        for index, shard in enumerate(stream.manifest.shards if tokenizer else ()):
            tokens = stream.shard(index)
            print(f"  {shard['name']} begins {tokenizer.decode(tokens[: options.show])!r}")
            print(f"  {shard['name']} ends   {tokenizer.decode(tokens[-options.show :])!r}")


if __name__ == "__main__":
    run_entry_point(main)
