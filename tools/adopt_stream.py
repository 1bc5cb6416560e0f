"""Make a stream of tokens that another program wrote, without copying them.

    python tools/adopt_stream.py data/train.bin streams/mine/train --dtype=uint16 --vocab-size=50257 --eos-id=50256
    python tools/adopt_stream.py data/corpus.idx streams/mine/train --vocab-size=32000 --eos-id=2
    python tools/adopt_stream.py data/train.bin streams/mine/train --dtype=uint16 --tokenizer=my.model

The first reads nanoGPT's raw tokens, the second a Megatron-LM dataset (corpus.bin lies beside corpus.idx). The third
takes vocabulary and EOS from the SentencePiece model that made the tokens; without one, a run has no samples. An array
that numpy saved (.npy) and llm.c's .bin tell their --dtype themselves; their headers are passed over. Do the same for
streams/mine/valid, then train:

    python launch/train.py --stream.directory=streams/mine --run.directory=runs/mine

The stream links to the .bin, which must stay where it is, as it is. Bytes and words of the text remain unknown.
"""

import argparse
import sys
from pathlib import Path

from rnnlm.cli import run_entry_point
from rnnlm.errors import UserError


def main() -> None:
    """Adopt one file of tokens, print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Megatron-LM .idx, a .npy, or a .bin of llm.c or of raw tokens")
    parser.add_argument("directory", type=Path, help="the stream to make, as streams/mine/train")
    parser.add_argument("--dtype", choices=("uint16", "uint32"), help="of raw tokens; other files tell their own")
    parser.add_argument("--vocab-size", type=int, help="ids are below it; default: the tokenizer's")
    parser.add_argument("--eos-id", type=int, help="ends a document; -1: nothing does; default: the tokenizer's")
    parser.add_argument("--tokenizer", type=Path, help="the SentencePiece model that made the tokens, if one did")
    options = parser.parse_args()
    from rnnlm.data.adopt import adopt
    from rnnlm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if tokenizer is None and (options.vocab_size is None or options.eos_id is None):
        raise UserError("--vocab-size and --eos-id: both are needed where no --tokenizer tells them")
    vocab_size = tokenizer.vocab_size if tokenizer and options.vocab_size is None else options.vocab_size
    eos_id = tokenizer.eos_id if tokenizer and options.eos_id is None else options.eos_id
    manifest = adopt(options.source, options.directory, vocab_size, eos_id, options.dtype or "", tokenizer)
    target = (options.directory / manifest.shards[0]["name"]).readlink()
    print(
        f"{options.directory}: {manifest.tokens:,} tokens of {manifest.source['dtype']} in {target}, "
        f"{manifest.documents:,} documents, {manifest.eos_tokens:,} EOS tokens"
    )
    if manifest.eos_tokens == 0 <= eos_id:
        print(f"warning: EOS, id {eos_id}, is nowhere in these tokens; is --eos-id right?", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
