"""The training loop: the only user of Accelerate.

Accelerate launches, places, wraps in DDP, mixes precisions and reduces. It never sees the loader (it would deal
consecutive windows to different ranks), nor the schedule (it would step it once per rank), nor the hidden state: those
are arithmetic on the step, and tensors of this module. A step's gradient is that of sum(loss) / (S * seq_len), a
constant, so a token weighs the same in every step, on every rank, in every micro-batch.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list, gather_object

import rnnlm
from rnnlm import checkpoint
from rnnlm.cells import Hidden
from rnnlm.config import (
    TRAINING_SECTIONS,
    Config,
    UserError,
    as_list,
    differing,
    dump_yaml,
    identity,
    load_yaml,
    nearest,
)
from rnnlm.evaluate import Evaluation, evaluate, exp
from rnnlm.generate import continuations
from rnnlm.metrics import IntervalLoss, Metrics, Stopwatch, peak_memory_bytes
from rnnlm.model import RecurrentLM
from rnnlm.optim import (
    ValidationMemory,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from rnnlm.stream import TokenStream, write_durably
from rnnlm.substreams import Batch, SubstreamDataset, loader, open_ring, open_streams
from rnnlm.tokenizer import Tokenizer

T = TypeVar("T")
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's


class Trainer:
    """One life of a run: from its newest checkpoint, or from the beginning, to its end.

    Raises:
        UserError: a configuration, stream or run directory that cannot work, before anything is written.
    """

    def __init__(self, config: Config):
        self.config = config
        self.directory = Path(config.run.directory)
        self.train_stream, self.valid_stream = open_streams(config)
        manifest = self.train_stream.manifest
        self.tokenizer = self.train_stream.tokenizer() if manifest.tokenizer else None  # None: no text, so no samples
        self.ring = open_ring(config, self.train_stream)
        self.accelerator = start_accelerator(config)
        self.device = self.accelerator.device
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        self.first, self.last = self._share()
        planned = config.train.epochs * self.ring.windows_per_epoch
        self.total_steps = min(planned, config.train.max_steps or planned)

        raw = RecurrentLM(config.model, manifest.vocab_size, config.train.seed, config.train.loss_chunk_tokens)
        self.raw = raw.to(self.device)  # without DDP and autocast: for evaluation, generation, saving
        self.raw_optimizer = build_optimizer(self.raw, config.optim)
        self.model, self.optimizer = self.accelerator.prepare(self.raw, self.raw_optimizer)
        self.rows = torch.arange(self.first, self.last, device=self.device)
        self.hidden: Hidden = self.raw.zero_hidden(self.last - self.first)
        self.memory = ValidationMemory()
        self.step = 0  # updates done, and so the data position
        self.horizon = config.optim.horizon_steps or self.total_steps
        self.interval, self.clock = IntervalLoss(self.device), Stopwatch()
        self.gradient_norm = torch.zeros((), device=self.device)
        self.saved_step = 0
        self.metrics: Metrics | None = None  # in the main process alone
        self._settle()

    def fit(self) -> None:
        """Train to the end; the same call after any kind of death goes on where the newest checkpoint stands."""
        self.resume()
        self.open_metrics()
        with closing(self.batches()) as batches:
            for batch in batches:
                self.train_step(batch)
                if self.due(self.config.eval.every_steps or self.ring.windows_per_epoch):
                    self.validate()  # first: it may end the training
                if self.due(self.config.run.log_every_steps):
                    self.log()
                if self.due(self.config.run.save_every_steps):
                    self.save()
        self.close()

    @property
    def finished(self) -> bool:
        """Whether all steps are done or early stopping has ended the run."""
        return self.step >= self.total_steps or self.memory.should_stop(self.config.optim)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step % every == 0 or self.finished

    def batches(self) -> Generator[Batch, None, None]:
        """This process's batches from the present step on, each checked to go on where its rows ended."""
        dataset = SubstreamDataset(self.train_stream, self.ring, self.first, self.last, self.step, self.total_steps)
        source = iter(loader(dataset, self.config.train.prefetch_workers, self.device.type == "cuda"))
        expected, _ = self.ring.place(self.step, self.first, self.last)
        self.clock.reset(self.ring.targets_before(self.step))
        try:
            while not self.finished:
                asked = time.perf_counter()
                batch = next(source)
                self.clock.waited += time.perf_counter() - asked
                if self.ring.locate(self.step)[1] == 0:
                    expected, _ = self.ring.place(self.step, self.first, self.last)
                if batch.step != self.step or not (batch.positions.numpy() == expected).all():
                    raise RuntimeError(
                        f"step {self.step}: the loader gave step {batch.step} at positions {batch.positions.tolist()}, "
                        f"but the rows ended at {expected.tolist()}; hidden states would be of other text"
                    )
                expected = (expected + batch.lengths.numpy()) % self.ring.tokens
                yield batch
        finally:
            del source  # ends the workers now: at exit they would be sent a SIGTERM, which they ignore

    def train_step(self, batch: Batch) -> None:
        """Forward, backward, clip, update: one window of every substream of this process."""
        inputs, targets = batch.to(self.device)  # (B, T) each
        if self.ring.locate(self.step)[1] == 0:
            self.hidden = self.raw.zero_hidden(self.last - self.first)
        step = torch.full((), self.step, device=self.device)  # int64, filled on the device: no copy to wait for
        after: list[Hidden] = []
        size = (self.last - self.first) // self.config.train.accumulation
        for start in range(0, self.last - self.first, size):  # micro-batches of substreams, never of time
            own = slice(start, start + size)
            hidden = {name: state[own] for name, state in self.hidden.items()}
            is_last = own.stop == self.last - self.first
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss, count, hidden = self.model(inputs[own], hidden, targets[own], step, self.rows[own])
                # DDP averages over processes: times their number it is a sum
                self.accelerator.backward(loss * (self.processes / (self.ring.substreams * self.ring.seq_len)))
            self.interval.add(loss.detach(), count)
            after.append({name: state.detach() for name, state in hidden.items()})
        self.hidden = {name: torch.cat([each[name] for each in after]) for name in self.hidden}
        self.update()

    def update(self) -> None:
        """Clip, set the learning rate, apply the gradient."""
        optim = self.config.optim
        norm = self.accelerator.clip_grad_norm_(self.raw.parameters(), optim.clip_norm or float("inf"))
        assert norm is not None
        self.gradient_norm = norm.detach()
        for group in self.raw_optimizer.param_groups:
            group["lr"] = learning_rate(optim, self.step, self.horizon, self.memory)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def log(self) -> None:
        """One line: the mean loss since the last one, over all processes."""
        sums = self.accelerator.reduce(self.interval.sums, "sum").tolist()
        self.interval = IntervalLoss(self.device)
        tokens = self.ring.targets_before(self.step)
        loss = IntervalLoss.mean(sums)
        if self.metrics:
            self.metrics.write(
                "train",
                {
                    "step": self.step,
                    "tokens": tokens,
                    "epoch": self.ring.locate(self.step - 1)[0],
                    "loss": loss,
                    "ppl": None if loss is None else exp(loss),
                    "learning_rate": self.raw_optimizer.param_groups[0]["lr"],
                    "gradient_norm": float(self.gradient_norm),
                    "tokens_per_second": (tokens - self.clock.tokens) / self.clock.seconds,
                    "data_wait_share": self.clock.waited / self.clock.seconds,
                    "peak_memory_bytes": peak_memory_bytes(self.device),
                    "processes": self.processes,
                    "ran_in": self.raw.ran_in,
                },
            )
        self.clock.reset(tokens)

    def validate(self) -> None:
        """Score the validation stream; rank 0 decides for all what follows from it."""
        if self.valid_stream is None:
            return
        with self.clock.pause():
            evaluation = score(self.accelerator, self.raw, self.valid_stream, self.config)
            loss = float(broadcast(torch.tensor(evaluation.loss, dtype=torch.float64, device=self.device)))
            best = self.memory.update(loss, self.step, self.config.optim)
            if self.metrics:
                figures = {"step": self.step, "tokens": self.ring.targets_before(self.step), "best": best}
                self.metrics.write("valid", {**figures, **evaluation.to_dict()})
                self.metrics.draw(every_seconds=30)
                self.sample()
        if best:
            self.save(best=True)

    def sample(self) -> None:
        """Continue the configured prompts into samples.md."""
        if self.tokenizer is None:
            return
        prompts = as_list(self.config.generate.prompts)
        texts = continuations(self.raw, self.tokenizer, prompts, self.config.generate)
        if texts and self.metrics:
            self.metrics.sample(self.step, "\n\n".join(f"```text\n{text}\n```" for text in texts.values()))

    def save(self, best: bool = False) -> None:
        """Write a checkpoint; a full or failing disk costs this checkpoint, not the run."""
        with self.clock.pause():
            hidden = {name: self.accelerator.gather(state) for name, state in self.hidden.items()}  # (S, H) each
            sums = self.accelerator.reduce(self.interval.sums.clone(), "sum").tolist()
            if not self.metrics:
                return
            state = {
                "step": self.step,
                "horizon_steps": self.horizon,
                "memory": self.memory.to_dict(),
                "interval": sums,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "stream": self.train_stream.manifest.digest,
                "tokenizer": self.train_stream.manifest.tokenizer,
                "vocab_size": self.train_stream.manifest.vocab_size,
                "configuration": identity(self.config),
                "processes": self.processes,
                "versions": versions(self.device),
            }
            parts: dict[str, dict[str, torch.Tensor]] = {
                "model": dict(self.raw.named_parameters()),
                "optimizer": optimizer_tensors(self.raw, self.raw_optimizer),
                "hidden": hidden,
            }
            prefix = "best" if best else "step"
            root = self.directory / "checkpoints"
            try:
                self.metrics.sync()
                written = checkpoint.save(root, f"{prefix}-{self.step:08d}", parts, state)
                self.saved_step = self.saved_step if best else self.step
                checkpoint.prune(written, prefix, 1 if best else self.config.run.keep_last)
            except (OSError, UserError) as error:
                self.metrics.say(f"warning: step {self.step}: no checkpoint ({error}); training goes on")

    def resume(self) -> None:
        """Take over the run's directory, and its newest whole checkpoint if there is one."""
        path = from_main(self.accelerator, self._claim)
        if path is None:
            return
        found = checkpoint.load(Path(path))
        state, now = found.state, versions(self.device)
        if state["versions"] != now and self.accelerator.is_main_process:
            print(f"warning: saved under {state['versions']}, now {now}: bits may differ", file=sys.stderr)
        checkpoint.copy_tensors(dict(self.raw.named_parameters()), found.tensors("model"), found.path)
        load_optimizer_tensors(self.raw, self.raw_optimizer, found.tensors("optimizer"))
        own = {name: rows[self.first : self.last] for name, rows in found.tensors("hidden").items()}
        checkpoint.copy_tensors(self.hidden, own, found.path)
        self.step, self.horizon = state["step"], state["horizon_steps"]
        self.saved_step = self.step
        self.memory = ValidationMemory(**state["memory"])
        if self.accelerator.is_main_process:  # one process carries what was summed over all
            self.interval.restore(state["interval"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _claim(self) -> str | None:
        """In the main process: check that the directory is this run's, record the configuration, find a checkpoint."""
        record, root = self.directory / "config.yaml", self.directory / "checkpoints"
        fields = differing(self.config, load_yaml(record)) if record.exists() else []
        found, damaged = checkpoint.newest(root, "step")
        if found and not fields:  # the record may have been edited
            fields = differing(self.config, found.state["configuration"])
        if fields:
            raise UserError(
                f"run.directory={self.directory}: holds a run of another configuration ({'; '.join(fields)}); "
                "choose another run.directory, or give these fields the values they have there"
            )
        manifest = self.train_stream.manifest
        mine = {"stream": manifest.digest, "tokenizer": manifest.tokenizer}
        for key, digest in mine.items() if found else ():
            assert found
            if found.state[key] != digest:
                raise UserError(
                    f"run.directory={self.directory}: trained on another {key} ({found.state[key][:12]}, now "
                    f"{digest[:12]}); give it its own again, or choose another run.directory"
                )
        for error in damaged:
            print(f"warning: {error}; set aside, going on from an older one", file=sys.stderr, flush=True)
        if found:
            checkpoint.set_aside(root, "step", found)
        self.directory.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.model": self.tokenizer.model} if self.tokenizer else {}
        files["config.yaml"] = dump_yaml(self.config, TRAINING_SECTIONS).encode()
        for name, data in files.items():
            write_durably(self.directory / f"{name}.partial", data)
            (self.directory / f"{name}.partial").replace(self.directory / name)
        return str(found.path) if found else None

    def open_metrics(self) -> None:
        """Tell what starts here, and with which processes."""
        mine = {"process": self.process, "pid": os.getpid(), "substreams": [self.first, self.last]}
        ranks = gather_object([mine])
        if not self.accelerator.is_main_process:
            return
        self.metrics = Metrics(self.directory, self.config.run, self.step, self.total_steps)
        if self.finished:
            return
        counts = self.raw.parameter_counts()
        self.metrics.say(
            f"{self.directory}: {self.train_stream.tokens:,} tokens, {self.ring.windows_per_epoch:,} steps an epoch; "
            f"{self.processes} process(es) on {self.device.type}, {self.config.train.precision}; parameters: "
            + ", ".join(f"{part} {count:,}" for part, count in counts.items())
        )
        if self.step:
            self.metrics.say(f"going on from step {self.step} of {self.total_steps}")
        record = {"step": self.step, "total_steps": self.total_steps, "processes": self.processes, "ranks": ranks}
        figures = {"device": self.device.type, "threads": torch.get_num_threads(), "parameters": counts}
        self.metrics.write("start", {**record, **figures, "versions": versions(self.device)})

    def close(self) -> None:
        """Finish the reports, say where everything is, and leave the other processes in order.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        if self.metrics:
            self.metrics.close()
            self.say_finished()
        del self.model, self.optimizer
        end(self.accelerator)
        if self.metrics and self.saved_step < self.step:
            raise UserError(
                f"{self.directory}: the last checkpoint is of step {self.saved_step}, not {self.step}; "
                "make room on the disk and type the same command again"
            )

    def _settle(self) -> None:
        """Let DDP lay out its buckets, which it does after the first backward pass, before the first step.

        Otherwise the first step of every life would sum its gradients in another order than the same step of an
        uninterrupted run; from three processes on the bits would differ.
        """
        zero = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        loss, _, _ = self.model(zero, self.raw.zero_hidden(1), zero, torch.tensor(0, device=self.device), self.rows[:1])
        loss.backward()
        self.raw_optimizer.zero_grad()

    def say_finished(self) -> None:
        """One paragraph for the person at the console."""
        best = self.memory.best_loss
        valid = "" if best is None else f", best validation loss {best:.4f} at step {self.memory.best_step}"
        samples = ", samples.md" if self.tokenizer else ""
        early = self.step < self.total_steps
        longer = "optim.early_stop_patience" if early else "train.epochs or train.max_steps"
        print(
            f"{self.directory}: {'stopped early' if early else 'finished'} at step {self.step} of {self.total_steps}"
            f"{valid}\n  curves.png, metrics.jsonl{samples} and checkpoints/ are there; "
            f"to train longer, raise {longer}"
        )

    def _share(self) -> tuple[int, int]:
        """The substreams of this process: first, and one past the last."""
        size, each = self.config.train.global_batch_size, self.processes * self.config.train.accumulation
        if size % each:
            raise UserError(
                f"train.global_batch_size={size} is not divisible by {self.processes} processes times "
                f"train.accumulation={self.config.train.accumulation}; use {nearest(size, each)}"
            )
        return self.process * size // self.processes, (self.process + 1) * size // self.processes


def from_main(accelerator: accelerate.Accelerator, function: Callable[[], T]) -> T:
    """What the main process makes of `function`, in every process; its mistake is everyone's."""
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = str(error)
    broadcast_object_list(box)
    if box[1] is not None:
        end(accelerator)
        raise UserError(box[1])
    result: T = box[0]
    return result


def end(accelerator: accelerate.Accelerator) -> None:
    """Leave together, with nothing that still holds the process group: its threads outlive Python otherwise."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def start_accelerator(config: Config) -> accelerate.Accelerator:
    """Accelerate for this configuration, after checks that it is what was launched.

    Raises:
        UserError: a device or precision that is not to be had, or processes that do not see each other.
    """
    train = config.train
    cuda = torch.cuda.is_available() and train.device != "cpu"
    if train.device == "cuda" and not cuda:
        raise UserError("train.device=cuda: PyTorch sees no GPU here; use train.device=cpu or auto")
    if train.precision == "fp16" and not cuda:
        raise UserError("train.precision=fp16: needs a GPU, on a CPU nothing would run in fp16; use bf16 or fp32")
    environment = os.environ
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch was asked for several processes but started one; "
            "use --config_file launch/cpu.yaml --num_processes 2, which starts them on a CPU"
        )
    set_arithmetic(config, cuda)
    accelerator = accelerate.Accelerator(
        cpu=not cuda,
        mixed_precision=PRECISIONS[train.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says: a step scales its own loss
    launched = int(environment.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}; "
            "launch with a file of launch/, as in accelerate launch --config_file launch/cpu.yaml"
        )
    return accelerator


def set_arithmetic(config: Config, cuda: bool) -> None:
    """Threads, TF32 and determinism, before anything is computed."""
    if cuda:
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.train.cpu_threads or max(1, cores // local))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # cuBLAS and cuDNN's recurrent layers ask for it
        torch.use_deterministic_algorithms(True)


def evaluate_run(config: Config) -> Evaluation:
    """Score eval.split with the model that run.checkpoint names, on all processes.

    Raises:
        UserError: no run, no stream, or a stream of another tokenizer.
    """
    stream = TokenStream(Path(config.stream.directory) / config.eval.split)
    own = Path(config.run.directory) / "tokenizer.model"  # not there after training on a stream without one
    if stream.manifest.tokenizer != (Tokenizer.load(own).digest if own.exists() else ""):
        way_out = f"build or adopt it with {own}" if own.exists() else f"there is no {own}: adopt it without one"
        raise UserError(f"{stream.directory}: built with another tokenizer than the run's; {way_out}")
    exact = dataclasses.replace(config.train, precision="fp32", tf32=False)
    accelerator = start_accelerator(dataclasses.replace(config, train=exact))
    path = from_main(accelerator, lambda: str(checkpoint.choose(config)))
    model, _, _ = checkpoint.load_model(config, Path(path), accelerator.device)
    if model.vocab_size != stream.manifest.vocab_size:
        raise UserError(
            f"{stream.directory}: has a vocabulary of {stream.manifest.vocab_size}, the run's model one of "
            f"{model.vocab_size}; adopt the stream with --vocab-size={model.vocab_size}"
        )
    result = score(accelerator, model, stream, config)
    end(accelerator)
    return result


def score(accelerator: accelerate.Accelerator, model: RecurrentLM, stream: TokenStream, config: Config) -> Evaluation:
    """Evaluate on all processes, each with its share of the blocks; the result is everyone's."""
    return evaluate(
        model,
        stream,
        config.eval.batch_size,
        config.eval.count_eos,
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums, "sum"),
    )


def versions(device: torch.device) -> dict[str, str]:
    """What the bits of a result may depend on besides the configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    return {"rnnlm": rnnlm.__version__, "torch": torch.__version__, "machine": platform.machine(), "device": name}
