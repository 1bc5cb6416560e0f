"""Turn a corpus into token streams for training and validation.

    python tools/build_stream.py --corpus.train=my.txt --stream.directory=streams/my
    python tools/build_stream.py --config configs/imdb.yaml --corpus.train=train.jsonl --corpus.document=jsonl
    python tools/build_stream.py --corpus.train=train.txt --corpus.valid=valid.txt --corpus.test=test.txt ...
    python tools/build_stream.py --config configs/mine.yaml --build.task=3/16    # one of 16 tasks; without: the rest

Needs the tokenizer that tools/train_tokenizer.py wrote. Streams appear under their names only when they are whole;
until then stream.directory/build.partial holds what is done, and the same command continues from there. When all
streams are there, it prints what they are.
"""

import itertools
import sys

try:
    from rnnlm.cli import read_config, run_entry_point
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Read the configuration, build, print what was built."""
    config = read_config(("corpus", "tokenizer", "stream", "build"), __doc__)
    from rnnlm.data.build.build import Build, progress_bar
    from rnnlm.data.encoder import prepare
    from rnnlm.data.tokenizer_choice import load_tokenizer

    build = Build(config, load_tokenizer(config))
    if len(build.finished()) == len(build.splits):
        print("already built:")
    else:
        print(prepare(build.tokenizer), flush=True)
    with progress_bar(itertools.chain(*build.inputs.values()), "building") as progress:
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
        unknown = f"{manifest.unknown_tokens:,} tokens are unknown to the tokenizer"
        if manifest.unknown_tokens and build.tokenizer.encodes == "words":
            print(f"  {unknown} ({manifest.unknown_tokens / manifest.tokens:.2%})")
        elif manifest.unknown_tokens:
            way_out = "tools/train_tokenizer.py makes one that knows every text"
            print(f"warning: {unknown}, their text is lost; {way_out}", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
