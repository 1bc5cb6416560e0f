"""Compare the encoder with the tokenizer's own library on random texts under random models, id by id.

    python tools/fuzz_encoder.py                                   # 20 models, 1,000 texts each
    python tools/fuzz_encoder.py --models 1000 --workers 2         # a million texts
    python tools/fuzz_encoder.py --kind huggingface                # byte-level BPE of tokenizer.json
    python tools/fuzz_encoder.py --seed 7 --models 1 --first 12    # one model again: seed 7-12 of a mismatch

Models are trained by SentencePiece on texts made up for each: all kinds, normalisations (random rules among them),
white space settings, vocabularies; then many are edited as others edit theirs: equal scores, other orders, runs of
spaces and line ends as pieces, user-defined and unused ones. Texts are made of the corpus' words, of the model's own
pieces, and of what is odd in Unicode. Each text is encoded at once with others, and some also as long documents that
come in blocks. Prints what the models were, and exits with 1 after a mismatch, which it prints with the seed.
"""

import argparse
import io
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import sentencepiece

    from rnnlm.cli import run_entry_point
    from rnnlm.data.encoder import Encoder
    from rnnlm.data.hugging_face_tokenizer import HuggingFaceTokenizer
    from rnnlm.data.hugging_face_words import PATTERNS
    from rnnlm.data.sentencepiece_tokenizer import META, SentencePieceTokenizer, parse
    from rnnlm.data.tokenizer import Tokenizer
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None

SPACES = " \t\n\r\x0b\x0c\x00\x1c\x1f\x85\xa0\u1680\u2000\u200a\u200b\u200d\u2028\u2029\u202f\u205f\u3000\ufeff\u2581"
MARKS = "\u0300\u0301\u0308\u0345\u3099\u20dd\ufe0f\u0e33"
ODD = SPACES + MARKS + "¨´¯ﷺﹰ゛‗ﬀİıſKÅẞ<>anebdox.'é漢字🎉Ⅷｆ½"
ENDS = [" ", " ", " ", " ", "  ", "\n", "\n\n", " \n", "\n  ", "\t", "\r\n", ".\n", ";\r\n", ")\n"]
SYMBOLS = ["<user>", "[INST]", "the", "x", "é", "\n", "}\n", "\n\n", "<", "e", "1.", "ab", "bc"]
EDITS = ["none", "equal", "classes", "shuffled", "spaces", "line ends", "symbols", "unused", "fewer"]
OFTEN = [6, 4, 4, 2, 3, 4, 2, 1, 2]  # how often each of them, of 28


def make_words(draw: random.Random) -> list[str]:
    """The words of a made-up language, in some scripts."""
    letters = draw.choice(
        ["abcde", "abcdefghijklmnopqrstuvwxyz", "etaoinшжñé", "aeioübcdf漢字仮名かな", "01ab._-{}();"]
    )
    return [
        "".join(draw.choices(letters, k=draw.randint(1, draw.choice([3, 6, 12]))))
        for _ in range(draw.choice([30, 800]))
    ]


def make_line(draw: random.Random, words: list[str], ends: list[str]) -> str:
    """Some words with white space between them."""
    return "".join(draw.choice(words) + draw.choice(ends) for _ in range(draw.randint(1, 12)))


def random_rules(draw: random.Random) -> list[tuple[str, str]]:
    """Normalisation rules: some texts, and what is written instead."""
    texts = [
        "a",
        "b",
        "ab",
        "e",
        "é",
        "o",
        "\n",
        "\t",
        "  ",
        "a b",
        " ",
        "",
        "\u2581",
        "e\u0301",
        "\r\n",
        "x",
        "漢",
        "ß",
    ]

    found = [(draw.choice(texts[:11] + texts[13:]), draw.choice(texts)) for _ in range(draw.randint(2, 7))]
    return [(source, target) for source, target in found if source != target]


def make_options(draw: random.Random) -> dict[str, Any]:
    """Options of SentencePiece's trainer; a rare one is drawn rarely, so that most models are encoded by words."""
    rarely, often = (lambda share: draw.random() < share), draw.choice([True, False])
    options: dict[str, Any] = {
        "model_type": draw.choices(["bpe", "char", "unigram"], [20, 2, 1])[0],
        "vocab_size": draw.choice([260, 300, 420, 700, 1500, 4000]),
        "normalization_rule_name": draw.choice(["identity", "identity", "nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"]),
        "remove_extra_whitespaces": often,
        "allow_whitespace_only_pieces": not often or rarely(0.2),
        "add_dummy_prefix": draw.choice([True, False]),
        "byte_fallback": not rarely(0.3),
        "split_by_unicode_script": draw.choice([True, False]),
        "split_by_number": draw.choice([True, False]),
        "split_digits": draw.choice([True, False]),
        "split_by_whitespace": not rarely(0.03),
        "treat_whitespace_as_suffix": rarely(0.03),
        "character_coverage": draw.choice([1.0, 0.9995, 0.98]),
    }

    if rarely(0.3):
        options["user_defined_symbols"] = draw.sample(SYMBOLS, draw.randint(1, 4))
    if rarely(0.03):
        options["user_defined_symbols"] = draw.choice(["▁a", "a▁b", "a b"])
    if rarely(0.2):
        options["control_symbols"] = ["<ctrl>", "[PAD]"]
    return options


def train(draw: random.Random, words: list[str]) -> tuple[Any, str]:
    """A trained model as a protocol buffer, and its options as text."""
    options, rules = make_options(draw), random_rules(draw) if draw.random() < 0.15 else []
    ends = draw.choice([[" "], ENDS, ["\n", " "]])
    texts, model = [make_line(draw, words, ends) for _ in range(120)], io.BytesIO()

    with tempfile.TemporaryDirectory() as directory:
        if rules:
            path = Path(directory) / "rules.tsv"
            in_hex = {
                " ".join(f"{ord(c):x}" for c in source): " ".join(f"{ord(c):x}" for c in to) for source, to in rules
            }
            path.write_text("".join(f"{source}\t{to}\n" for source, to in in_hex.items()))
            del options["normalization_rule_name"]
            options["normalization_rule_tsv"] = str(path)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, hard_vocab_limit=False, minloglevel=5, **options
        )
    return parse(model.getvalue()), f"{options} {rules or ''}"


def edit(model: Any, draw: random.Random) -> str:
    """Change a model as people change theirs; returns how."""
    kind = draw.choices(EDITS, OFTEN)[0]
    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    longer = [piece for piece in normal if len(piece.piece) > 1]
    if kind == "equal":
        for piece in draw.sample(normal, len(normal) // draw.choice([1, 2, 10])):
            piece.score = -5.0
    elif kind == "classes":
        for piece in normal:
            piece.score = -float(draw.randint(0, draw.choice([2, 50])))
    elif kind == "shuffled":
        scores = [piece.score for piece in longer]
        draw.shuffle(scores)
        for piece, score in zip(longer, scores, strict=True):
            piece.score = score
    elif kind in ("symbols", "unused"):
        for piece in draw.sample(normal, min(len(normal), draw.choice([1, 5]))):
            piece.type = piece.USER_DEFINED if kind == "symbols" else piece.UNUSED
    elif kind == "fewer":
        for piece in draw.sample(longer, len(longer) // 3):
            model.pieces.remove(piece)

    there = {piece.piece for piece in model.pieces}
    added = {
        "spaces": [META * n for n in (2, 3, 4, 8, 16)],
        "line ends": ["{\r", ")\n", "\n\n", "\n", "\r", "\t\t", "\n" + META],
    }
    for text in added.get(kind, ()):
        if text not in there:
            score = draw.choice([-1e9, -1e9, -1.0, -50.5])
            model.pieces.add(piece=text, score=score)
    return kind


def shown_pieces(tokenizer: Tokenizer) -> list[str]:
    """What the pieces of a tokenizer say, where that is text."""
    data = map(tokenizer.piece_bytes, range(tokenizer.vocab_size))
    return [text for text in (each.decode(errors="ignore") for each in data) if text]


def make_texts(draw: random.Random, words: list[str], pieces: list[str], count: int) -> list[str]:
    """Texts of words, pieces and odd characters."""
    shown = [piece.replace(" ", draw.choice([" ", " ", META])) for piece in pieces]

    def fragment() -> str:
        chosen = draw.random()
        if chosen < 0.35:
            return draw.choice(words) + draw.choice(ENDS)
        if chosen < 0.65:
            return draw.choice(shown)
        if chosen < 0.8:
            return "".join(draw.choices(ODD, k=draw.randint(1, 5)))
        if chosen < 0.9:
            return draw.choice(SYMBOLS)
        if chosen < 0.93:
            return draw.choice(["ab", "x", " ", "漢", "\n", "é "]) * draw.choice([2, 5, 17, 40, 90])
        return "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0xD800)])) for _ in range(3))

    return ["".join(fragment() for _ in range(draw.choice([1, 2, 4, 8, 16]))) for _ in range(count)]


def differing(encoder: Encoder, texts: list[str]) -> str | None:
    """The first text that the encoder encodes otherwise than the tokenizer, or None."""
    tokenizer = encoder.tokenizer
    expected = tokenizer.encode_each(texts, add_eos=True)
    ids, tokens, words = encoder.encode([text.encode() for text in texts])
    flat = np.fromiter(chain.from_iterable(expected), np.int64)
    if [len(each) for each in expected] == tokens.tolist() and np.array_equal(ids, flat):
        return next((text for text, count in zip(texts, words, strict=True) if len(text.split()) != count), None)

    ends = np.cumsum(tokens)
    for text, each, begin, end in zip(texts, expected, ends - tokens, ends, strict=True):
        if ids[begin:end].tolist() != each:
            return text
    raise AssertionError("the ids differ, and none of their texts does")


def differs_in_blocks(encoder: Encoder, text: str, draw: random.Random) -> bool:
    """Whether a text has other ids if it comes in blocks."""
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 8)))
    blocks = [text[begin:end].encode() for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = list(encoder.encode_long(iter(blocks)))
    expected = encoder.tokenizer.encode_each([text], add_eos=True)[0]
    ids = np.concatenate([ids for ids, _ in found]).tolist()
    return ids != expected or sum(words for _, words in found) != len(text.split())


def make_sentencepiece(draw: random.Random, words: list[str]) -> tuple[Tokenizer, str]:
    """A model of SentencePiece, trained and edited, and how."""
    while True:
        try:
            model, options = train(draw, words)
            how = edit(model, draw)
            return SentencePieceTokenizer(model.SerializeToString()), f"{options}, edited: {how}"
        except (RuntimeError, ValueError, UserError):
            continue  # options that SentencePiece does not take together, or a model that makes nothing of "a"


def make_hugging_face(draw: random.Random, words: list[str]) -> tuple[Tokenizer, str]:
    """A byte-level BPE of Hugging Face's library, trained on made-up lines, with a pre-tokenizer that others have."""
    import tokenizers
    from tokenizers import Regex, normalizers, pre_tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=draw.random() < 0.1))
    pattern, prefix = draw.choice([""] * 8 + [*PATTERNS]), draw.random() < 0.1
    if pattern:
        split, bytewise = pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, True, False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(prefix)
    if draw.random() < 0.1:
        made.normalizer = normalizers.NFC()

    made.train_from_iterator(
        [make_line(draw, words, ENDS) for _ in range(120)],
        tokenizers.trainers.BpeTrainer(
            vocab_size=draw.choice([260, 300, 420, 700, 1500, 4000]), special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    added = draw.sample(["<user>", "[INST]", "é", "x", "<|im|>", "漢"], draw.choice([0, 0, 0, 1, 3]))
    made.add_tokens(added)
    return HuggingFaceTokenizer(made.to_str().encode()), f"{pattern!r}, prefix {prefix}, {made.normalizer}, {added}"


MAKE = {"sentencepiece": make_sentencepiece, "huggingface": make_hugging_face}


def try_model(seed: str, count: int, kind: str) -> tuple[str, int, str]:
    """Train one model and compare; returns the encoder's path, how many texts were compared, and a mismatch or ''."""
    draw = random.Random(seed)
    words = make_words(draw)
    tokenizer, how = MAKE[kind](draw, words)

    encoder = Encoder(tokenizer, batch_bytes=draw.choice([64, 2**10, 2**17]), max_words=draw.choice([2**5, 2**12]))
    texts = make_texts(draw, words, shown_pieces(tokenizer), count)
    wrong = differing(encoder, texts)
    if not wrong and not encoder.why_whole:
        joined = ["".join(texts[at : at + 10]) for at in range(0, count, 50)]
        wrong = next((text for text in joined if differs_in_blocks(encoder, text, draw)), None)
    said = f"seed {seed}, {how}\n  {encoder.path}\n  text {wrong!r}" if wrong is not None else ""
    return encoder.path.partition(":")[0], len(texts), said


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(MAKE), default="sentencepiece")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--texts", type=int, default=1000, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first model")
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Try all models and print what was found."""
    options = parse_options()
    started, paths, texts, mismatches = time.perf_counter(), Counter[str](), 0, 0
    seeds = [f"{options.seed}-{number}" for number in range(options.first, options.first + options.models)]
    with ProcessPoolExecutor(options.workers) as pool:
        tried = (map if options.workers == 1 else pool.map)(
            try_model, seeds, [options.texts] * len(seeds), [options.kind] * len(seeds)
        )
        for number, (path, count, wrong) in enumerate(tried, 1):
            paths[path] += 1
            texts += count
            if wrong:
                mismatches += 1
                print(wrong, flush=True)
            if sys.stderr.isatty() or number % 100 == 0:
                print(f"{number:,} models, {texts:,} texts, {mismatches} mismatches", file=sys.stderr, flush=True)

    for path, count in paths.most_common():
        print(f"{count:6,} models: {path}")
    seconds = time.perf_counter() - started
    print(f"seed {options.seed}: {len(seeds):,} models, {texts:,} texts, {mismatches} mismatches, {seconds:.0f} s")
    sys.exit(mismatches > 0)


if __name__ == "__main__":
    run_entry_point(main)
