"""Turn a corpus into token streams for training and validation.

    python tools/build_stream.py --corpus.train=my.txt --stream.directory=streams/my
    python tools/build_stream.py --config configs/imdb.yaml --corpus.train=train.jsonl --corpus.document=jsonl
    python tools/build_stream.py --corpus.train=train.txt --corpus.valid=valid.txt --corpus.test=test.txt ...
    python tools/build_stream.py --config configs/mine.yaml --build.task=3/16    # one of 16 tasks; without: the rest

Needs the tokenizer that tools/train_tokenizer.py wrote. Streams appear under their names only when they are whole;
until then stream.directory/build holds what is done, and the same command continues from there. When all
streams are there, it prints what they are.
"""

import sys

from rnnlm.cli import read_config, run_entry_point


def main() -> None:
    """Read the configuration, build, print what was built."""
    config = read_config(("corpus", "tokenizer", "stream", "build"), __doc__)
    from rnnlm.data.build.build import Build, progress_bar, tokenizer_path
    from rnnlm.data.tokenizer import Tokenizer

    build = Build(config, Tokenizer.load(tokenizer_path(config)))
    if len(build.finished()) == len(build.splits):
        print("already built:")
    with progress_bar(build.inputs.all(), "building") as progress:
        manifests = build.run(progress)

    if not manifests:
        print(
            f"task {config.build.task} is done; when all are, the same command without build.task commits the streams"
        )
    for split, manifest in manifests.items():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in manifest.records.items())
        print(
            f"{build.context.stream_path(split)}: {manifest.tokens:,} tokens, "
            f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token, "
            f"{len(manifest.shards)} shard(s); records: {counts}"
        )
        if manifest.unknown_tokens:
            lost = f"warning: {manifest.unknown_tokens:,} tokens are unknown to the tokenizer, their text is lost"
            print(f"{lost}; tools/train_tokenizer.py makes one that knows every text", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
