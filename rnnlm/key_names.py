"""What a user may have meant by a key that is no knob, and which script reads a section.

Other programs call the same things by other names, so a table of common ones is asked before the spelling is. The
price: a name in the table wins over a knob that is spelt more like it, as lr does over eps.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rnnlm.knob import closest

# A section, and the scripts that read it: an option of another section on the command line would do nothing.
READERS = {
    "corpus": ("tools/train_tokenizer.py", "tools/build_stream.py"),
    "tokenizer": ("tools/train_tokenizer.py", "tools/build_stream.py"),
    "stream": ("tools/train_tokenizer.py", "tools/build_stream.py", "launch/train.py", "launch/eval.py"),
    "build": ("tools/train_tokenizer.py", "tools/build_stream.py"),
    "model": ("launch/train.py", "launch/eval.py", "launch/generate.py"),
    "optim": ("launch/train.py",),
    "train": ("launch/train.py", "launch/eval.py", "launch/generate.py"),
    "eval": ("launch/train.py", "launch/eval.py"),
    "generate": ("launch/train.py", "launch/generate.py"),
    "run": ("launch/train.py", "launch/eval.py", "launch/generate.py"),
}

# What other programs call a knob, by the last part of the name.
OTHER_NAMES = {
    "corpus.train": "data dataset data_dir data_path input text train_file train_data train_path corpus file files",
    "corpus.valid": "valid_file valid_data valid_path validation validation_file val_data val_file dev dev_file",
    "corpus.test": "test_file test_data test_path",
    "corpus.deduplicate": "dedup dedupe",
    "corpus.shuffle_seed": "shuffle",
    "tokenizer.vocab_size": "vocab vocabulary vocabulary_size n_vocab num_vocab",
    "tokenizer.normalization": "lower lowercase casefold",
    "stream.directory": "stream_dir streams token_dir",
    "stream.valid_fraction": "valid_split validation_split val_split valid_size",
    "build.workers": "nproc njobs n_jobs num_proc",
    "model.cell": "rnn_type cell_type arch model_type",
    "model.embedding_size": "emsize emb_size embed_size embed_dim embedding_dim emb_dim n_embd ninp d_embed",
    "model.hidden_size": "nhid nhidden n_hidden num_hidden hidden hidden_dim hidden_units d_model rnn_size num_units",
    "model.layers": "nlayers n_layers n_layer num_layers num_layer depth",
    "model.dropout": "dropout_rate dropout_prob drop p_drop",
    "model.tied": "tie tie_weights tied_weights weight_tying tie_embeddings",
    "optim.name": "optimizer opt algorithm",
    "optim.learning_rate": "lr learning_rate_max max_lr peak_lr base_lr eta",
    "optim.weight_decay": "wd wdecay l2",
    "optim.clip_norm": "clip grad_clip clip_grad clip_grad_norm max_grad_norm max_norm gradient_clip gradient_clipping",
    "optim.schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type decay",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup",
    "optim.final_ratio": "min_lr final_lr lr_min",
    "optim.early_stop_patience": "patience early_stop early_stopping early_stopping_patience",
    "train.epochs": "epoch num_epochs n_epochs max_epochs num_train_epochs nepochs",
    "train.max_steps": "steps num_steps total_steps train_steps max_iters max_iter iterations iters num_iterations",
    "train.global_batch_size": "bs bsz batch batch_size train_batch_size per_device_train_batch_size batchsize",
    "train.seq_len": "bptt tbptt seq_length sequence_length context_length context block_size unroll n_ctx",
    "train.accumulation": "grad_accum gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "train.precision": "amp fp16 bf16 dtype mixed_precision half",
    "train.prefetch_threads": "num_workers n_workers data_workers",
    "train.cpu_threads": "threads num_threads",
    "eval.every_steps": "eval_interval eval_every eval_steps val_interval validation_interval eval_freq",
    "eval.batch_size": "eval_batch_size eval_bs valid_batch_size",
    "generate.prompts": "prompt",
    "generate.samples": "num_samples n_samples",
    "generate.max_tokens": "length max_length max_new_tokens",
    "generate.temperature": "temp",
    "generate.top_k": "topk",
    "generate.top_p": "topp nucleus",
    "run.directory": "out output out_dir output_dir save save_dir save_path checkpoint_dir log_dir logdir run_dir dir",
    "run.log_every_steps": "log_interval log_every logging_steps print_every report_interval",
    "run.save_every_steps": "save_interval save_every save_steps checkpoint_every checkpoint_interval save_freq",
    "run.wandb_project": "project",
}
KEY_OF = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}
LIKENESS = 0.6  # of the last parts, from which on a spelling is worth a guess


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The knob that was most likely meant by a key, `section.name` or a bare name; None: it looks like none."""
    section, _, name = key.lower().replace("-", "_").rpartition(".")
    if name in KEY_OF:
        return KEY_OF[name]

    def likeness(other: str) -> tuple[float, float]:
        """Of the names first: a wrong section says less than a wrong name."""
        other_section, _, other_name = other.partition(".")
        of_names = difflib.SequenceMatcher(None, name, other_name).ratio()
        return of_names, difflib.SequenceMatcher(None, section, other_section).ratio()

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= LIKENESS else None


def unknown_key(key: str, where: str, known: Iterable[str]) -> str:
    """The fault of a key that no section has; of a section that is unknown and empty, the key is `section.`."""
    if key.endswith("."):
        section = key.removesuffix(".")
        return f"{section}: no such section in {where}; did you mean {closest(section, READERS)}?"
    near = nearest_key(key, known)
    way_out = f"did you mean {near}?" if near else "--help lists those that there are"
    return f"{key}: no such key in {where}; {way_out}"
