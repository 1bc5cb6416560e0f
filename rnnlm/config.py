"""Every knob of the project: one frozen dataclass per section, read from YAML and the command line.

One file describes one experiment from corpus to generated text; each entry point reads the sections it needs and checks
the keys of all of them, so that `--config configs/imdb.yaml` fits every one. Order: defaults, then the files of
`--config`, then the other options. A knob's type, default, bounds and text stand in one place; all faults are reported
at once, each with its key, its value and the way out. The price of one file for all: a run's record holds only the
sections that training reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rnnlm.knob import Knob, knob
from rnnlm.texts import Texts, named_sources

# What a run is made of, by name; register_layer, register_head and register_optimizer append here.
CELLS = ["lstm", "gru", "rnn"]
HEADS = ["softmax", "adaptive"]
OPTIMIZERS = ["adam", "adamw", "sgd"]


@dataclass(frozen=True)
class CorpusConfig:
    """The text: which files, and what a document is."""

    train: Texts = ""
    """Files, globs or fsspec URLs to train on: text, JSON lines, .parquet, Arrow, or a directory that Hugging Face's
    save_to_disk wrote; .gz, .bz2, .xz and .zst are decompressed. Or named sources, as in {a: {paths: a/*.txt, share:
    2.0}}: a share below 1 takes so many of its documents, chosen by their hash, one above 1 repeats them, which needs
    corpus.shuffle_seed."""
    valid: Texts = ""
    """The same for validation; empty: stream.valid_fraction of the training documents is split off."""
    test: Texts = ""
    """The same for a test stream; empty: none."""
    document: Literal["auto", "line", "paragraph", "file", "jsonl"] = "auto"
    """A line, lines up to a blank one, a whole file, or a field of a JSON object per line; auto: jsonl in .jsonl and
    .ndjson, else line. In .parquet, .arrow and .feather always a row."""
    field: str = "text"
    """The field of each JSON object, or the column of a table, that holds the text; a.b: the field b within a."""
    on_bad_record: Literal["fail", "skip", "replace"] = "fail"
    """Invalid UTF-8, JSON, compression, a missing field, an oversized document: stop and name file and byte; or skip,
    count and list in rejected.jsonl; replace: repair invalid UTF-8 with U+FFFD, list that too, skip the rest."""
    max_document_bytes: int = knob(8 * 2**20, at_least=1)
    """Longest record of JSON and document of a table, which are held in memory; longer ones are bad."""
    max_whole_bytes: int = knob(2**20, at_least=1)
    """Documents above this are read in parts. It is also the most that SentencePiece is given at once, in 60 times its
    memory: a document if the tokenizer is not a BPE, else a word without white space; longer ones are bad."""
    deduplicate: bool = False
    """Keep only the first of documents with the same bytes (by a 128-bit hash), within each of train, valid, test."""
    shuffle_seed: int = knob(-1, at_least=-1, below=2**63)
    """Shuffle whole documents by this seed; -1: keep the order of the files."""
    unit_bytes: int = knob(32 * 2**20, at_least=1)
    """Decompressed bytes per work unit; does not change the result."""

    @property
    def shares(self) -> dict[str, float]:
        """The share of each named source of train; of paths alone {'': 1.0}."""
        return {name: source.share for name, source in named_sources(self.train).items()}


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns text into tokens."""

    model: str = ""
    """Path of the file to write or use; empty: in stream.directory, as tokenizer.model, words.txt or bytes.txt."""
    table: str = ""
    """A tokens.txt, as of a speech recogniser, whose ids the pieces of tokenizer.model are to have; without that, the
    words or characters of the table are the tokens."""
    eos_piece: str = ""
    """The piece that ends documents, as <sos/eos>; empty: the model's own, or </s>."""
    kind: Literal["bpe", "unigram", "char", "word", "byte"] = "bpe"
    """By SentencePiece byte-pair encoding (Sennrich et al. 2016), unigram (Kudo 2018) or characters, which all fall
    back to bytes; word: what stands between white space, for text that is already tokenised; byte: those of UTF-8."""
    vocab_size: int = knob(0, at_least=0, at_most=2**24)
    """Number of pieces, the 256 bytes, <unk> and </s> included; of words and characters, the most. 0: all words and
    characters; else by the size of the text, from 512 for 1 MB to 32,768 above 6 GB."""
    min_count: int = knob(1, at_least=1)
    """Of words: those that the corpus has less often are unknown."""
    character_coverage: float = knob(0.9995, at_least=0.98, at_most=1)
    """Share of the sample's characters that get a piece of their own; the rest is encoded as bytes."""
    normalization: Literal["auto", "identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "auto"
    """SentencePiece's normalisation; the _cf forms also fold case; identity changes nothing; the nmt forms make spaces
    of line ends and tabs. auto: nmt_nfkc, or nfkc with keep_whitespace."""
    keep_whitespace: bool = False
    """Keep runs of spaces, tabs and line ends (source code, poems) instead of collapsing them."""
    user_defined_symbols: list[str] = knob([])
    """Texts that are always one token."""
    sample_bytes: int = knob(64 * 2**20, at_least=1)
    """Text to train SentencePiece on: a seeded sample of the corpus of at most this size, held in memory."""
    seed: int = knob(0, at_least=0, below=2**63)
    """Chooses the sample."""


@dataclass(frozen=True)
class StreamConfig:
    """The token streams on disk."""

    directory: str = knob("", changeable=True)
    """Holds train/, valid/ and test/, one stream each."""
    valid_fraction: float = knob(0.02, at_least=0, below=1)
    """Share of training documents, chosen by a keyed hash of their text, that become the valid stream; of one document
    alone, as a novel in one file, the end."""
    split_seed: int = knob(0, at_least=0, below=2**63)
    """The key of that hash."""
    valid_max_tokens: int = knob(2**24, at_least=0)
    """Most tokens of a valid stream that is split off: a half, a quarter ... of the share is taken until it has no
    more, and the rest is trained on. 0: any number."""
    shard_tokens: int = knob(2**27, at_least=1)
    """Tokens per shard file (2 or 4 bytes each)."""
    verify: bool = knob(False, changeable=True)
    """Check every byte of the streams before training, not only sizes and the manifest."""


@dataclass(frozen=True)
class BuildConfig:
    """How the streams are built; nothing here changes a byte of them."""

    workers: int = knob(0, at_least=0, changeable=True)
    """Processes that encode; 0: one per core."""
    task: str = knob("", changeable=True)
    """'3/16': begin with every 16th piece of the work from the 3rd on, then take what others have not begun; any number
    of such processes, and those without, share a build on all machines that see the directory."""
    keep_units: bool = knob(True, changeable=True)
    """Keep what was encoded beside the streams, about their size once more, so that the next build, of one file more or
    another shuffle, encodes only what is new; the end of a build says where."""
    replace: bool = knob(False, changeable=True)
    """Put the new streams in the place of others that are there, when the new ones are whole."""
    dask: str = knob("", changeable=True)
    """Address of a Dask scheduler whose workers encode, as in tcp://host:8786; all must see the same files."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: embedding, recurrent layers, head."""

    cell: str = knob("lstm", choices=CELLS)
    """The recurrent layer: lstm (Hochreiter & Schmidhuber 1997; Gers et al. 2000), gru (Cho et al. 2014), rnn (with
    tanh, Elman 1990), or one that other code has registered."""
    head: str = knob("softmax", choices=HEADS)
    """What is predicted from the hidden state: softmax (over the vocabulary), adaptive (Grave et al. 2017: rare pieces
    in narrow clusters, many times faster for vocabularies from 100,000; needs ids that go from frequent to rare, as
    those of tokenizer.kind=word do), or one that other code has registered."""
    adaptive_cutoffs: list[int] = knob([])
    """Of the adaptive head: the first id of each cluster, rising, as [20000, 100000], which is what empty stands for
    from 160,000 pieces on; of fewer an eighth, and five times that."""
    adaptive_factor: int = knob(4, at_least=1)
    """Of the adaptive head: each cluster's vectors are narrower by this than those before."""
    embedding_size: int = knob(0, at_least=0)
    """Width of the token vectors; 0: half of hidden_size, or all of it if tied."""
    hidden_size: int = knob(0, at_least=0)
    """Width of each recurrent layer; 0: by the size of the text, from 64 to 2048 (rnnlm/train/sizes.py)."""
    layers: int = knob(2, at_least=1)
    """Number of recurrent layers."""
    dropout: float = knob(0.0, at_least=0, below=1)
    """Probability of dropping a feature of each non-recurrent connection (Zaremba et al. 2014)."""
    dropout_kind: Literal["ordinary", "locked"] = "ordinary"
    """A new mask at every position, or one mask for a whole window (variational, Gal & Ghahramani 2016)."""
    tied: bool = False
    """Share the token vectors between input and softmax (Press & Wolf 2017; Inan et al. 2017)."""
    init: Literal["orthogonal", "uniform"] = "orthogonal"
    """Recurrent weights orthogonal (Saxe et al. 2014) and others Glorot, or all uniform (Zaremba et al. 2014)."""
    init_range: float = knob(0.1, at_least=0)
    """Half-width of the uniform initialisation; token vectors use it under either scheme."""
    forget_bias: float = 1.0
    """Initial bias of the LSTM's forget gate (Gers et al. 2000; Jozefowicz et al. 2015)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = knob("adam", choices=OPTIMIZERS)
    """adam (Kingma & Ba 2015), adamw (Loshchilov & Hutter 2019), sgd, these with PyTorch's fused kernels, or one that
    other code has registered."""
    learning_rate: float = knob(0.0, at_least=0)
    """Peak learning rate; 0: by hidden_size, 1.024 / hidden_size up to 0.004 for adam and adamw, else 0.001."""
    momentum: float = knob(0.0, at_least=0, below=1)
    """Of sgd; 0: none."""
    beta1: float = knob(0.9, at_least=0, below=1)
    """Adam: decay of the first moment."""
    beta2: float = knob(0.999, at_least=0, below=1)
    """Adam: decay of the second moment."""
    eps: float = knob(1e-8, at_least=0)
    """Adam: added to the root of the second moment."""
    weight_decay: float = knob(0.0, at_least=0)
    """Applied to matrices, not to biases; decoupled in adamw, L2 in adam and sgd."""
    clip_norm: float = knob(0.25, at_least=0)
    """Largest global norm of the gradient (Pascanu et al. 2013); 0: no clipping."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """After the warm-up: constant, half a cosine (Loshchilov & Hutter 2017), or cut when validation stalls."""
    warmup_steps: int = knob(0, at_least=0)
    """Steps of linear rise from 0."""
    horizon_steps: int = knob(0, at_least=0)
    """Step at which the cosine ends; 0: the run's length when it first started."""
    final_ratio: float = knob(0.1, at_least=0, at_most=1)
    """Cosine: last learning rate over the peak."""
    plateau_factor: float = knob(0.5, at_least=0, at_most=1)
    """Plateau: the learning rate is multiplied by this."""
    plateau_patience: int = knob(0, at_least=0)
    """Plateau: evaluations without a new best that are tolerated before a cut."""
    early_stop_patience: int = knob(0, at_least=0, changeable=True)
    """Evaluations without a new best after which training ends; 0: never."""


@dataclass(frozen=True)
class TrainConfig:
    """Truncated backpropagation through time (Williams & Peng 1990) over the stream."""

    seed: int = knob(1, at_least=0, below=2**63)
    """Initial weights, dropout masks, and the rotation between epochs."""
    epochs: int = knob(0, at_least=0, changeable=True)
    """Passes over the stream; every token is a target once in each. 0: as many as max_steps takes, or else 1,500
    steps, so 1 for a text of 10 MB or more."""
    max_steps: int = knob(0, at_least=0, changeable=True)
    """Stop after this many steps even if epochs are left; 0: no limit."""
    global_batch_size: int = knob(64, at_least=1)
    """Number of substreams, over all processes together; not tokens."""
    seq_len: int = knob(32, at_least=1)
    """Tokens of each substream in one window: gradients stop at its edge, the hidden state is carried over."""
    accumulation: int = knob(1, at_least=1, changeable=True)
    """Micro-batches per step; each takes its share of the substreams."""
    exact_slices: int = knob(0, at_least=0)
    """Form gradients on this many fixed slices of the substreams and add them in one fixed order, so that any number of
    processes that divides it trains to the same bits; a power of two. 0: off, and then equal up to rounding."""
    gradient_compression: Literal["none", "bf16"] = knob("none", changeable=True)
    """bf16: processes send each other gradients in bf16, half the bytes, and sum them in it: for slow networks, and not
    with exact_slices."""
    rotate: bool = True
    """Move the window boundaries between epochs by rotating the ring."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers; weights, updates and losses stay fp32. fp16 needs a GPU."""
    tf32: bool = False
    """fp32 products on GPUs in TF32 (10-bit mantissa): faster, less exact."""
    device: Literal["auto", "cpu", "cuda"] = knob("auto", changeable=True)
    """auto: GPUs where there are any."""
    cpu_threads: int = knob(0, at_least=0, changeable=True)
    """Threads per process on a CPU; 0: cores divided by processes."""
    capture: Literal["auto", "off"] = knob("auto", changeable=True)
    """auto: on a GPU all kernels of a step are started at once, as a CUDA graph, where a trial at the start gives the
    same bits; off: one by one."""
    deterministic: bool = knob(False, changeable=True)
    """Only GPU kernels that give the same bits every time; slower."""
    prefetch_threads: int = knob(1, at_least=0, changeable=True)
    """Threads that read ahead; 0: read when a batch is wanted. Never changes the order."""
    skip_spikes_sigmas: float = knob(0.0, at_least=0)
    """Skip updates whose loss is this many standard deviations above the mean of the last 128 (PaLM skipped by hand,
    Chowdhery et al. 2022, section 5.1; OLMo-core by this rule); 0: never. Not finite ones are always skipped."""
    stop_after_skipped: int = knob(100, at_least=0, changeable=True)
    """Skipped updates in a row that end the run, at the next line of metrics; 0: never."""
    loss_chunk_tokens: int = knob(0, at_least=0, changeable=True)
    """Tokens whose logits are in memory at once; 0: as many as 256 MiB hold."""
    gradient_filter: bool = knob(False, changeable=True)
    """Leave columns of the softmax out of the gradient's products whose slopes are negligible for all tokens of a chunk
    (Wijmans et al. 2024, section 4.3): faster for large vocabularies once a model is trained, not exact."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with carried hidden state, in fp32, every token scored once."""

    split: Literal["train", "valid", "test"] = knob("valid", changeable=True)
    """Which stream of stream.directory."""
    batch_size: int = knob(64, at_least=1, changeable=True)
    """Substreams that the stream is cut into; the result depends on this and on nothing else."""
    every_steps: int = knob(-1, at_least=-1, changeable=True)
    """Steps between evaluations while training; 0: at the end of each epoch; -1: ten in a run or one each 5,000 steps,
    but for at most a tenth of the time; with plateau and early stopping, which count them, as 0."""
    count_eos: bool = knob(True, changeable=True)
    """Whether predicting the end of a document counts as a token and as a word."""


@dataclass(frozen=True)
class GenerateConfig:
    """Text from the model."""

    prompts: list[str] | str = knob("", changeable=True)
    """Texts to continue: while training, after every evaluation; launch/generate.py asks for them if none is given."""
    samples: int = knob(1, at_least=1, changeable=True)
    """Continuations of each prompt."""
    max_tokens: int = knob(100, at_least=1, changeable=True)
    """Length of a continuation, unless it ends by itself."""
    temperature: float = knob(0.8, at_least=0, changeable=True)
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = knob(0, at_least=0, changeable=True)
    """Draw among this many likeliest tokens (Fan et al. 2018); 0: all."""
    top_p: float = knob(1.0, at_least=0, at_most=1, changeable=True)
    """Draw among the fewest tokens with this probability together (nucleus, Holtzman et al. 2020)."""
    stop_at_eos: bool = knob(True, changeable=True)
    """End a continuation when the model ends the document."""
    seed: int = knob(0, at_least=0, below=2**63, changeable=True)
    """Same seed, same text."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run is and what it writes."""

    directory: str = knob("", changeable=True)
    """Holds configuration, checkpoints, metrics.jsonl, samples.md, curves.png; name it again to resume."""
    log_every_steps: int = knob(10, at_least=1, changeable=True)
    """Steps per line of metrics."""
    save_every_steps: int = knob(500, at_least=1, changeable=True)
    """Steps per checkpoint; one is also written at the end."""
    save_every_minutes: float = knob(0.0, at_least=0, changeable=True)
    """Also a checkpoint after so many minutes without one; 0: by steps alone."""
    keep_last: int = knob(2, at_least=2, changeable=True)
    """Checkpoints kept, the best one not counted; at least 2."""
    keep_every_steps: int = knob(0, at_least=0, changeable=True)
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    grace_seconds: float = knob(30.0, at_least=0, changeable=True)
    """Time between the signal that ends a run and the kill; a warning is printed when saving takes longer."""
    timeout_minutes: float = knob(10.0, at_least=0, changeable=True)
    """A process that has done nothing for so long prints its stacks and ends the run; a checkpoint that is still being
    written is waited for six times as long. 0: never."""
    allow_change: list[str] | str = knob("", changeable=True)
    """train.seq_len (at any step) or train.global_batch_size (between epochs), to change it when the run is resumed.
    A cosine's horizon stays the step it was."""
    checkpoint: Literal["best", "last"] = knob("best", changeable=True)
    """Which one eval.py and generate.py read."""
    wandb: Literal["off", "online", "offline"] = knob("off", changeable=True)
    """Also report to Weights & Biases; its failure never stops training."""
    wandb_project: str = knob("rnnlm", changeable=True)
    """Project name there."""


@dataclass(frozen=True)
class Config:
    """All sections."""

    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    stream: StreamConfig = StreamConfig()
    build: BuildConfig = BuildConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    run: RunConfig = RunConfig()

    def flat(self) -> dict[str, Any]:
        """`section.key` -> value, for every field."""
        sections = dataclasses.asdict(self)
        return {f"{section}.{name}": value for section in sections for name, value in sections[section].items()}


# What follows the size of the text, and the value that says so; a run's record holds what was chosen.
BY_SIZE: dict[str, float] = {
    "model.embedding_size": 0, "model.hidden_size": 0, "optim.learning_rate": 0.0, "train.epochs": 0,
    "eval.every_steps": -1,
}  # fmt: skip
ALLOWED_CHANGES = ("train.seq_len", "train.global_batch_size")
TRAINING_SECTIONS = ("stream", "model", "optim", "train", "eval", "generate", "run")


def as_list(value: list[str] | str) -> list[str]:
    """A knob that takes one text or several, as a list; the empty text is no text."""
    return [value] if isinstance(value, str) and value else list(value)


@cache
def types() -> dict[str, Any]:
    """`section.key` -> its type, for every field."""
    return {
        f"{section}.{name}": kind
        for section, owner in get_type_hints(Config).items()
        for name, kind in get_type_hints(owner).items()
    }


def is_list(kind: Any) -> bool:
    """Whether a knob of this type takes a list."""
    return get_origin(kind) is list or any(is_list(each) for each in get_args(kind))


def knobs() -> dict[str, Knob]:
    """`section.key` -> what it declares, for every field."""
    defaults = Config()
    return {
        f"{section.name}.{each.name}": each.metadata.get("knob", Knob())
        for section in dataclasses.fields(Config)
        for each in dataclasses.fields(getattr(defaults, section.name))
    }
