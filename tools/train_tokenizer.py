"""Train a tokenizer on a corpus.

    python tools/train_tokenizer.py --corpus.train=my.txt --stream.directory=streams/my
    python tools/train_tokenizer.py --config configs/imdb.yaml --corpus.train='reviews/*.txt.xz'

Writes tokenizer.model (SentencePiece's own format) where tokenizer.model or stream.directory says. A model that is
already there is kept: to use one of your own, put it there or name it.
"""

from pathlib import Path

from rnnlm.cli import read_config, run_entry_point
from rnnlm.errors import UserError


def main() -> None:
    """Read the configuration, train on a sample, write the model under its final name last."""
    config = read_config(("corpus", "tokenizer", "stream"), __doc__)
    from rnnlm.data.build.build import progress_bar, tokenizer_path
    from rnnlm.data.sources import sources
    from rnnlm.data.tokenizer import Tokenizer
    from rnnlm.data.tokenizer_training import train_on_corpus

    path = Path(tokenizer_path(config))
    if path.exists():
        print(f"{path} is already there: {Tokenizer.load(path).vocab_size:,} pieces; remove it to train another")
        return
    if not config.corpus.train:
        raise UserError("corpus.train is not set; give text files, as in --corpus.train=my.txt")
    with progress_bar(sources(config.corpus.train, "corpus.train", config.corpus.document), "reading") as progress:
        tokenizer, figures = train_on_corpus(config, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(tokenizer.model)
    partial.replace(path)
    print(
        f"{path}: {tokenizer.vocab_size:,} pieces ({config.tokenizer.kind}) "
        f"from {figures['sample_bytes'] / 1e6:.1f} MB of {figures['corpus_bytes'] / 1e6:.1f} MB; "
        f"{figures['bytes_per_token']:.3f} bytes per token on {figures['held_back_bytes'] / 1e6:.1f} MB held back"
    )


if __name__ == "__main__":
    run_entry_point(main)
