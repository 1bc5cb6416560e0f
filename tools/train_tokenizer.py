"""Make a tokenizer of a corpus.

    python tools/train_tokenizer.py --corpus.train=my.txt --stream.directory=streams/my
    python tools/train_tokenizer.py --config configs/imdb.yaml --corpus.train='reviews/*.txt.xz'
    python tools/train_tokenizer.py --corpus.train=ptb.train.txt --corpus.valid=ptb.valid.txt ... --tokenizer.kind=word
    python tools/train_tokenizer.py --stream.directory=streams/my --tokenizer.kind=byte

Writes tokenizer.model (SentencePiece's own format), words.txt or bytes.txt where tokenizer.model or stream.directory
says. One that is already there is kept: to use one of your own, put it there or name it. A speech recogniser's tokens
need no training; check them, and give the same options to build_stream.py:

    python tools/train_tokenizer.py --tokenizer.model=bpe.model --tokenizer.table=tokens.txt \\
        --tokenizer.eos_piece='<sos/eos>'
"""

import sys
from pathlib import Path

from rnnlm.cli import read_config, run_entry_point
from rnnlm.errors import UserError


def main() -> None:
    """Read the configuration, train on a sample, write the model under its final name last."""
    config = read_config(("corpus", "tokenizer", "stream", "build"), __doc__)
    from rnnlm.data.build.build import progress_bar
    from rnnlm.data.build.survey import train_on_corpus
    from rnnlm.data.sources import sources
    from rnnlm.data.tokenizer_choice import load_tokenizer, tokenizer_path

    if config.tokenizer.table:
        tokenizer = load_tokenizer(config)
        eos = tokenizer.piece(tokenizer.eos_id)
        print(f"{config.tokenizer.table}: {tokenizer.vocab_size:,} ids, {eos} is {tokenizer.eos_id}; nothing to train")
        return
    path = Path(tokenizer_path(config))
    if path.exists():
        there = load_tokenizer(config)
        print(f"{path} is already there: {there.vocab_size:,} pieces ({there.description}); remove it to train another")
        return
    if not config.corpus.train and config.tokenizer.kind != "byte":
        raise UserError("corpus.train is not set; give text files, as in --corpus.train=my.txt")

    inputs = sources(config.corpus.train, "corpus.train") if config.tokenizer.kind != "byte" else []
    with progress_bar(inputs, "reading") as progress:
        trained = train_on_corpus(config, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(trained.tokenizer.model)
    partial.replace(path)
    print(f"{path}: {trained.summary}")
    for warning in trained.warnings:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
