"""Turn a corpus into token streams for training and validation.

    python tools/build_stream.py --corpus.train=my.txt --stream.directory=streams/my
    python tools/build_stream.py --config configs/imdb.yaml --corpus.train=train.jsonl --corpus.document=jsonl
    python tools/build_stream.py --corpus.train=train.txt --corpus.valid=valid.txt --corpus.test=test.txt ...
    python tools/build_stream.py --config configs/mine.yaml --build.task=3/16    # one of about 16 that share the work
    python tools/build_stream.py --config configs/mine.yaml --status             # how far all of them are

Needs the tokenizer that tools/train_tokenizer.py wrote. Streams appear under their names only when they are whole;
until then stream.directory/build holds what is done, and the same command continues from there. The same command on
any number of machines that see the directory shares the work; build.task only says where each begins, so that they
seldom meet. Any of them may start late, or die. When all streams are there, each prints what they are.
"""

import sys
from pathlib import Path

try:
    from rnnlm.cli import read_config, run_entry_point
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Read the configuration, build, print what was built."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--status"]
    config = read_config(("corpus", "tokenizer", "stream", "build"), __doc__, arguments)
    if len(arguments) < len(sys.argv) - 1:
        print_status(config.stream.directory)
        return
    from rnnlm.data.build.build import Build, progress_bar
    from rnnlm.data.encoder import prepare
    from rnnlm.data.tokenizer_choice import load_tokenizer

    build = Build(config, load_tokenizer(config))
    if len(build.finished()) == len(build.splits):
        print("already built:")
    else:
        print(prepare(build.tokenizer), flush=True)
    with progress_bar(build.inputs.all(), "building") as progress:
        manifests = build.run(progress)

    if "valid_split" in manifests["train"].source:
        print("corpus.train is one document: split by position, its end is the valid stream")
    for split, manifest in manifests.items():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in manifest.records.items())
        print(
            f"{build.context.stream_path(split)}: {manifest.tokens:,} tokens, "
            f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token, "
            f"{len(manifest.shards)} shard(s); records: {counts}"
        )
        unknown = f"{manifest.unknown_tokens:,} tokens are unknown to the tokenizer"
        if manifest.unknown_tokens and build.tokenizer.encodes == "words":
            print(f"  {unknown} ({manifest.unknown_tokens / manifest.tokens:.2%})")
        elif manifest.unknown_tokens:
            way_out = "tools/train_tokenizer.py makes one that knows every text"
            print(f"warning: {unknown}, their text is lost; {way_out}", file=sys.stderr)


def print_status(directory: str) -> None:
    """Print how far the builds in a directory are, for --status.

    Raises:
        UserError: no directory is given, or there is none.
    """
    from rnnlm.data.build.status import report

    if not directory or not Path(directory).is_dir():
        raise UserError(f"stream.directory={directory}: no such directory; give that of the streams that are built")
    for line in report(Path(directory)):
        print(line)


if __name__ == "__main__":
    run_entry_point(main)
