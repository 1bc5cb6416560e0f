"""Every knob of the project: one frozen dataclass per section, read from YAML and the command line.

One file describes one experiment from corpus to generated text; each door reads the sections it needs and checks
the keys of all of them, so that `--config configs/imdb.yaml` fits every door. Order: defaults, then the files of
`--config`, then the other options. All faults are reported at once, each with its key, its value and the way out.
The price of one file for all doors: a run's record holds only the sections that training reads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def changeable(default: T) -> T:
    """A field that may differ when a run is resumed; the others of model, optim and train are the run's identity."""
    result: T = field(default=default, metadata={"changeable": True})
    return result


CELLS = ["lstm", "gru", "rnn"]
HEADS = ["softmax"]
OPTIMIZERS = ["adam", "adamw", "sgd"]


@dataclass(frozen=True)
class CorpusConfig:
    """The text: which files, and what a document is."""

    train: list[str] | str = ""
    """Files, globs or fsspec URLs to train on: text, JSON lines or .parquet; .gz, .xz and .zst are decompressed."""
    valid: list[str] | str = ""
    """The same for validation; empty: stream.valid_fraction of the training documents is split off."""
    test: list[str] | str = ""
    """The same for a test stream; empty: none."""
    document: Literal["line", "paragraph", "file", "jsonl"] = "line"
    """A line, lines up to an empty one, a whole file, or a field of a JSON object per line; in .parquet a row."""
    field: str = "text"
    """The field of each JSON object, or the column of a .parquet file, that holds the text."""
    on_bad_record: Literal["fail", "skip", "replace"] = "fail"
    """Invalid UTF-8, JSON, compression, a missing field, an oversized document: stop and name file and byte; or skip,
    count and list in rejected.jsonl; replace: mend invalid UTF-8 with U+FFFD, list that too, skip the rest."""
    max_document_bytes: int = 8 * 2**20
    """Longest record of JSON and document of parquet, which are held in memory; longer ones are bad."""
    max_whole_bytes: int = 2**20
    """Longest text that only SentencePiece can encode, in 60 times its memory: a document if the tokenizer is not a
    BPE, a word without white space if it is; longer ones are bad. Other documents may have any length."""
    deduplicate: bool = False
    """Keep only the first of documents with the same bytes (by a 128-bit hash), within each of train, valid, test."""
    shuffle_seed: int = -1
    """Shuffle whole documents by this seed; -1: keep the order of the files."""
    unit_bytes: int = 32 * 2**20
    """Decompressed bytes per work unit; does not change the result."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece model that turns text into tokens."""

    model: str = ""
    """Path of the .model file to write or use; empty: tokenizer.model in stream.directory."""
    kind: Literal["bpe", "unigram", "char"] = "bpe"
    """Byte-pair encoding (Sennrich et al. 2016), unigram (Kudo 2018) or characters; all fall back to bytes."""
    vocab_size: int = 16000
    """Number of pieces, the 256 bytes, <unk> and </s> included."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own; the rest is spelt in bytes."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "nmt_nfkc"
    """SentencePiece's normalisation; the _cf forms also fold case; identity changes nothing."""
    keep_whitespace: bool = False
    """Keep runs of spaces, tabs and line ends (source code, poems) instead of collapsing them."""
    user_defined_symbols: list[str] = field(default_factory=list)
    """Texts that are always one token."""
    sample_bytes: int = 64 * 2**20
    """Text to train on: a seeded sample of the corpus of at most this size, held in memory."""
    seed: int = 0
    """Chooses the sample."""


@dataclass(frozen=True)
class StreamConfig:
    """The token streams on disk."""

    directory: str = changeable("")
    """Holds train/, valid/ and test/, one stream each."""
    valid_fraction: float = 0.02
    """Share of training documents, chosen by a keyed hash of their text, that become the valid stream."""
    split_seed: int = 0
    """The key of that hash."""
    shard_tokens: int = 2**27
    """Tokens per shard file (2 or 4 bytes each)."""
    verify: bool = changeable(False)
    """Check every byte of the streams before training, not only sizes and the manifest."""


@dataclass(frozen=True)
class BuildConfig:
    """How the streams are built; nothing here changes a byte of them."""

    workers: int = changeable(0)
    """Processes that encode; 0: one per core."""
    task: str = changeable("")
    """'3/16': do task 3 of 0 ... 15 of a job array and stop; without, do what is left, and commit."""
    dask: str = changeable("")
    """Address of a Dask scheduler whose workers encode, as in tcp://host:8786; all must see the same files."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: embedding, recurrent layers, softmax."""

    cell: str = "lstm"
    """LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000), GRU (Cho et al. 2014) or tanh RNN (Elman 1990)."""
    embedding_size: int = 256
    """Width of the token vectors."""
    hidden_size: int = 512
    """Width of each recurrent layer."""
    layers: int = 2
    """Number of recurrent layers."""
    dropout: float = 0.0
    """Probability of dropping a unit of each non-recurrent connection (Zaremba et al. 2014)."""
    dropout_kind: Literal["ordinary", "locked"] = "ordinary"
    """A new mask at every position, or one mask for a whole window (variational, Gal & Ghahramani 2016)."""
    head: str = "softmax"
    """What is predicted from the hidden state: softmax over the vocabulary, or a head that other code registers."""
    tied: bool = False
    """Share the token vectors between input and softmax (Press & Wolf 2017; Inan et al. 2017)."""
    init: Literal["orthogonal", "uniform"] = "orthogonal"
    """Recurrent weights orthogonal (Saxe et al. 2014) and others Glorot, or all uniform (Zaremba et al. 2014)."""
    init_range: float = 0.1
    """Half-width of the uniform initialisation; token vectors use it under either scheme."""
    forget_bias: float = 1.0
    """Initial bias of the LSTM's forget gate (Gers et al. 2000; Jozefowicz et al. 2015)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = "adam"
    """Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019) or SGD; PyTorch's fused kernels."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.0
    """SGD only."""
    beta1: float = 0.9
    """Adam: decay of the first moment."""
    beta2: float = 0.999
    """Adam: decay of the second moment."""
    eps: float = 1e-8
    """Adam: added to the root of the second moment."""
    weight_decay: float = 0.0
    """Applied to matrices, not to biases; decoupled in adamw, L2 in adam and sgd."""
    clip_norm: float = 0.25
    """Largest global norm of the gradient (Pascanu et al. 2013); 0: no clipping."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """After the warm-up: constant, half a cosine (Loshchilov & Hutter 2017), or cut when validation stalls."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    horizon_steps: int = 0
    """Step at which the cosine ends; 0: the run's length when it first started."""
    final_ratio: float = 0.1
    """Cosine: last learning rate over the peak."""
    plateau_factor: float = 0.5
    """Plateau: the learning rate is multiplied by this."""
    plateau_patience: int = 0
    """Plateau: evaluations without a new best that are tolerated before a cut."""
    early_stop_patience: int = changeable(0)
    """Evaluations without a new best after which training ends; 0: never."""


@dataclass(frozen=True)
class TrainConfig:
    """Truncated backpropagation through time (Williams & Peng 1990) over the stream."""

    seed: int = 1
    """Initial weights, dropout masks, and the rotation between epochs."""
    epochs: int = changeable(1)
    """Passes over the stream; every token is a target once in each."""
    max_steps: int = changeable(0)
    """Stop after this many steps even if epochs are left; 0: no limit."""
    global_batch_size: int = 64
    """Number of substreams, over all processes together; not tokens."""
    seq_len: int = 32
    """Tokens of each substream in one window: gradients stop at its edge, the hidden state is carried over."""
    accumulation: int = changeable(1)
    """Micro-batches per step; each takes its share of the substreams."""
    exact_slices: int = 0
    """Form gradients on this many fixed slices of the substreams and add them in one fixed order, so that any number of
    processes that divides it trains to the same bits; a power of two. 0: off, and then equal up to rounding."""
    rotate: bool = True
    """Move the window boundaries between epochs by rotating the ring."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers; weights, updates and losses stay fp32. fp16 needs a GPU."""
    tf32: bool = False
    """fp32 products on GPUs in TF32 (10-bit mantissa): faster, less exact."""
    device: Literal["auto", "cpu", "cuda"] = changeable("auto")
    """auto: GPUs where there are any."""
    cpu_threads: int = changeable(0)
    """Threads per process on a CPU; 0: cores divided by processes."""
    deterministic: bool = changeable(False)
    """Only GPU kernels that give the same bits every time; slower."""
    prefetch_workers: int = changeable(1)
    """Threads that read ahead; 0: read when a batch is wanted. Never changes the order."""
    skip_spikes_sigmas: float = 0.0
    """Skip updates whose loss is this many standard deviations above the mean of the last 128 (PaLM skipped by hand,
    Chowdhery et al. 2022, section 5.1; OLMo-core by this rule); 0: never. Not finite ones are always skipped."""
    stop_after_skipped: int = changeable(100)
    """Skipped updates in a row that end the run, at the next line of metrics; 0: never."""
    loss_chunk_tokens: int = changeable(512)
    """Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with carried hidden state, in fp32, every token scored once."""

    split: Literal["train", "valid", "test"] = changeable("valid")
    """Which stream of stream.directory."""
    batch_size: int = changeable(64)
    """Substreams that the stream is cut into; the result depends on this and on nothing else."""
    every_steps: int = changeable(0)
    """Steps between evaluations while training; 0: at the end of each epoch."""
    count_eos: bool = changeable(True)
    """Whether predicting the end of a document counts as a token and as a word."""


@dataclass(frozen=True)
class GenerateConfig:
    """Text from the model."""

    prompts: list[str] | str = changeable("")
    """What to continue; while training, after every evaluation; at generate.py, none means interactive."""
    samples: int = changeable(1)
    """Continuations of each prompt."""
    max_tokens: int = changeable(100)
    """Length of a continuation, unless it ends by itself."""
    temperature: float = changeable(0.8)
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = changeable(0)
    """Draw among this many likeliest tokens (Fan et al. 2018); 0: all."""
    top_p: float = changeable(1.0)
    """Draw among the fewest tokens with this probability together (nucleus, Holtzman et al. 2020)."""
    stop_at_eos: bool = changeable(True)
    """End a continuation when the model ends the document."""
    seed: int = changeable(0)
    """Same seed, same text."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it writes."""

    directory: str = changeable("")
    """Holds configuration, checkpoints, metrics.jsonl, samples.md, curves.png; name it again to resume."""
    log_every_steps: int = changeable(10)
    """Steps per line of metrics."""
    save_every_steps: int = changeable(500)
    """Steps per checkpoint; one is also written at the end."""
    save_every_minutes: float = changeable(0.0)
    """Also a checkpoint after so many minutes without one; 0: by steps alone."""
    keep_last: int = changeable(2)
    """Checkpoints kept, the best one not counted; at least 2."""
    keep_every_steps: int = changeable(0)
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    grace_seconds: float = changeable(30.0)
    """Time between the signal that ends a run and the kill; a warning tells when saving takes longer."""
    timeout_minutes: float = changeable(10.0)
    """A process that has done nothing for so long prints its stacks and ends the run; a checkpoint that is still being
    written is waited for six times as long. 0: never."""
    allow_change: list[str] | str = changeable("")
    """train.seq_len (at any step) or train.global_batch_size (between epochs), to change it when the run goes on.
    A cosine's horizon stays the step it was."""
    checkpoint: Literal["best", "last"] = changeable("best")
    """Which one eval.py and generate.py read."""
    wandb: Literal["off", "online", "offline"] = changeable("off")
    """Also report to Weights & Biases; its failure never stops training."""
    wandb_project: str = changeable("rnnlm")
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

    def faults(self) -> list[str]:
        """Every value that cannot work, as `section.key=value: what is expected`."""
        low = {  # inclusive lower bounds
            "corpus.unit_bytes": 1, "corpus.max_document_bytes": 1, "corpus.max_whole_bytes": 1,
            "corpus.shuffle_seed": -1, "build.workers": 0,
            "tokenizer.vocab_size": 1, "tokenizer.character_coverage": 0.98, "train.seed": 0,
            "generate.seed": 0, "tokenizer.seed": 0, "stream.split_seed": 0, "tokenizer.sample_bytes": 1,
            "stream.shard_tokens": 1, "stream.valid_fraction": 0, "model.embedding_size": 1, "model.hidden_size": 1,
            "model.layers": 1, "model.dropout": 0, "model.init_range": 0, "optim.learning_rate": 0,
            "optim.momentum": 0, "optim.beta1": 0, "optim.beta2": 0, "optim.eps": 0, "optim.weight_decay": 0,
            "optim.clip_norm": 0, "optim.warmup_steps": 0, "optim.horizon_steps": 0, "optim.final_ratio": 0,
            "optim.plateau_factor": 0, "optim.plateau_patience": 0, "optim.early_stop_patience": 0,
            "train.epochs": 1, "train.max_steps": 0, "train.global_batch_size": 1, "train.seq_len": 1,
            "train.accumulation": 1, "train.cpu_threads": 0, "train.prefetch_workers": 0,
            "train.loss_chunk_tokens": 1, "eval.batch_size": 1, "eval.every_steps": 0, "generate.samples": 1,
            "generate.max_tokens": 1, "generate.temperature": 0, "generate.top_k": 0, "generate.top_p": 0,
            "run.log_every_steps": 1, "run.save_every_steps": 1, "run.keep_last": 2,
            "run.keep_every_steps": 0, "run.save_every_minutes": 0, "run.grace_seconds": 0, "run.timeout_minutes": 0,
            "train.exact_slices": 0, "train.skip_spikes_sigmas": 0, "train.stop_after_skipped": 0,
        }  # fmt: skip
        below = {
            "stream.valid_fraction": 1, "model.dropout": 1, "optim.momentum": 1, "optim.beta1": 1, "optim.beta2": 1,
            "corpus.shuffle_seed": 2**63,
            "tokenizer.seed": 2**63, "stream.split_seed": 2**63, "train.seed": 2**63, "generate.seed": 2**63,
        }  # fmt: skip
        high = {
            "tokenizer.character_coverage": 1,
            "optim.plateau_factor": 1,
            "optim.final_ratio": 1,
            "generate.top_p": 1,
        }
        found = []
        for key, value in self.flat().items():
            if value is None:
                found.append(f"{key}: has no value; give one or leave the line out")
            elif isinstance(value, float) and not math.isfinite(value):
                found.append(f"{key}={value}: must be a finite number")
            elif key in low and value < low[key]:
                found.append(f"{key}={value}: must be at least {low[key]}")
            elif key in below and value >= below[key]:
                found.append(f"{key}={value}: must be below {below[key]}")
            elif key in high and value > high[key]:
                found.append(f"{key}={value}: must be at most {high[key]}")
        size, parts = self.train.global_batch_size, self.train.accumulation
        if parts >= 1 and size % parts:
            way_out = f"use {nearest(size, parts)}"
            found.append(f"train.global_batch_size={size}: not divisible by train.accumulation={parts}; {way_out}")
        return found + self._slice_faults() + self._change_faults()

    def _slice_faults(self) -> list[str]:
        train, found = self.train, []
        if train.exact_slices:
            slices = f"train.exact_slices={train.exact_slices}"
            if train.exact_slices < 1 or train.exact_slices & (train.exact_slices - 1):
                found.append(f"{slices}: must be a power of two, or 0")
            elif train.global_batch_size % train.exact_slices:
                found.append(
                    f"train.global_batch_size={train.global_batch_size}: not divisible by {slices}; "
                    f"use {nearest(train.global_batch_size, train.exact_slices)}"
                )
            if train.accumulation > 1:
                found.append(f"train.accumulation={train.accumulation}: slices are micro-batches; use 1 with {slices}")
        if train.skip_spikes_sigmas and train.precision == "fp16":
            found.append("train.skip_spikes_sigmas: not in fp16, whose own scaling skips; use bf16 or fp32")
        return found

    def _change_faults(self) -> list[str]:
        return [
            f"run.allow_change={name}: only {' and '.join(ALLOWED_CHANGES)} can change when a run goes on"
            for name in as_list(self.run.allow_change)
            if name not in ALLOWED_CHANGES
        ]

    def flat(self) -> dict[str, Any]:
        """`section.key` -> value, for every field."""
        return {f"{s}.{k}": v for s, part in dataclasses.asdict(self).items() for k, v in part.items()}


ALLOWED_CHANGES = ("train.seq_len", "train.global_batch_size")
TRAINING_SECTIONS = ("stream", "model", "optim", "train", "eval", "generate", "run")


def nearest(size: int, divisor: int) -> str:
    """The multiples of `divisor` around `size`, for an error's way out: nearest(100, 8) is '96 or 104'."""
    down = size - size % divisor
    return f"{down} or {down + divisor}" if down else f"{divisor}"


def as_list(value: list[str] | str) -> list[str]:
    """A knob that takes one text or several, as a list; the empty text is no text."""
    return [value] if isinstance(value, str) and value else list(value)


def field_kinds() -> dict[str, bool]:
    """`section.key` -> whether it may change on resume."""
    defaults = Config()
    return {
        f"{section.name}.{knob.name}": bool(knob.metadata.get("changeable"))
        for section in dataclasses.fields(Config)
        for knob in dataclasses.fields(getattr(defaults, section.name))
    }
