"""What is wrong with a configuration: values out of bounds, and values that do not fit each other.

All of it at once, each as `section.key=value: what is expected, and the way out`. The price: what is only known at the
start of a run, as the number of processes, is checked there.
"""

from __future__ import annotations

import itertools

from rnnlm.config import ALLOWED_CHANGES, Config, as_list, knobs
from rnnlm.texts import SPLITS, faults_of_texts, named_sources


def find_faults(config: Config) -> list[str]:
    """Every value that cannot work, as `section.key=value: what is expected`."""
    declared, values = knobs(), config.flat()
    found = [fault for key, value in values.items() if (fault := declared[key].fault(key, value))]
    if None in values.values():
        return found  # what follows computes with them
    parts = (_corpus_faults, _tokenizer_faults, _head_faults, _accumulation_faults, _slice_faults, _change_faults)
    return found + [fault for part in parts for fault in part(config)]


def _tokenizer_faults(config: Config) -> list[str]:
    kept, rules = config.tokenizer.keep_whitespace, config.tokenizer.normalization
    if not kept or not rules.startswith("nmt_"):
        return []
    found = f"tokenizer.normalization={rules}: makes spaces of line ends and tabs, which"
    return [f"{found} tokenizer.keep_whitespace={kept} is to keep; use {rules.removeprefix('nmt_')} or identity"]


def _corpus_faults(config: Config) -> list[str]:
    corpus, found = config.corpus, list[str]()
    for split in SPLITS:
        found += faults_of_texts(f"corpus.{split}", getattr(corpus, split))
    if found:
        return found

    for split in ("valid", "test"):
        for name, source in named_sources(getattr(corpus, split)).items():
            if source.share != 1:
                found.append(f"corpus.{split}.{name}.share={source.share}: shares are for corpus.train; leave it out")
    if corpus.shuffle_seed < 0:
        for name, share in corpus.shares.items():
            if share > 1:
                found.append(
                    f"corpus.train.{name}.share={share}: repeats documents, and copies would stand one behind the "
                    "other; set corpus.shuffle_seed to 0 or more"
                )
    return found


def _head_faults(config: Config) -> list[str]:
    model, found = config.model, list[str]()
    if model.tied and model.head == "adaptive":
        found.append(
            "model.tied=True: the vectors of rare pieces are narrower in model.head=adaptive than those of the input; "
            "use model.tied=false or model.head=softmax"
        )
    cutoffs = model.adaptive_cutoffs
    if any(low >= high for low, high in itertools.pairwise([0, *cutoffs])):
        found.append(f"model.adaptive_cutoffs={cutoffs}: must be ids above 0 that rise, as [2000, 10000]")
    return found


def _accumulation_faults(config: Config) -> list[str]:
    size, micro_batches = config.train.global_batch_size, config.train.accumulation
    if micro_batches < 1 or size % micro_batches == 0:
        return []
    way_out = f"use {nearest(size, micro_batches)}"
    return [f"train.global_batch_size={size}: not divisible by train.accumulation={micro_batches}; {way_out}"]


def _slice_faults(config: Config) -> list[str]:
    train, found = config.train, []
    slices = f"train.exact_slices={train.exact_slices}"

    if train.exact_slices:
        if train.exact_slices < 1 or train.exact_slices & (train.exact_slices - 1):
            found.append(f"{slices}: must be a power of two, or 0")
        elif train.global_batch_size % train.exact_slices:
            found.append(
                f"train.global_batch_size={train.global_batch_size}: not divisible by {slices}; "
                f"use {nearest(train.global_batch_size, train.exact_slices)}"
            )
        if train.gradient_compression != "none":
            found.append(
                f"train.gradient_compression={train.gradient_compression}: rounds sums, and their bits then depend on "
                f"the number of processes; use none with {slices}"
            )
        if train.accumulation > 1:
            found.append(f"train.accumulation={train.accumulation}: slices are micro-batches; use 1 with {slices}")
    return found


def _change_faults(config: Config) -> list[str]:
    return [
        f"run.allow_change={name}: only {' and '.join(ALLOWED_CHANGES)} can change when a run is resumed"
        for name in as_list(config.run.allow_change)
        if name not in ALLOWED_CHANGES
    ]


def nearest(size: int, divisor: int) -> str:
    """The multiples of `divisor` around `size`, for an error's way out: nearest(100, 8) is '96 or 104'."""
    down = size - size % divisor
    return f"{down} or {down + divisor}" if down else f"{divisor}"
