"""The training loop: one attempt of a run, which resumes, steps, logs, evaluates, saves, and ends.

What a run does next is a pure function of what a checkpoint holds: data, masks and learning rate are arithmetic on the
step, and all else that a step changes is in `step.py`. The price: the loop waits at every step for the slowest process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from contextlib import closing

import torch

from rnnlm.config import Config, as_list
from rnnlm.data.substreams import Batch, ContinuityCheck, SubstreamDataset, loader
from rnnlm.model.evaluate import exp
from rnnlm.model.generate import continuations
from rnnlm.model.layers import GATES
from rnnlm.model.precision import cudnn_version, slow_recurrence
from rnnlm.train.distributed import (
    Accelerator,
    AnyRank,
    all_gather_object,
    errors_are_shared,
    errors_may_be_local,
    launched,
    run_on_main,
)
from rnnlm.train.ending import check_loss, print_finished, print_preempted
from rnnlm.train.evaluation import evaluate_on_all_ranks
from rnnlm.train.identity import other_versions, versions
from rnnlm.train.inputs import Streams, open_streams
from rnnlm.train.metrics import Metrics, SilentMetrics
from rnnlm.train.run import Run, open_run, record_attempt, record_of
from rnnlm.train.saving import Saving
from rnnlm.train.schedule import ValidationMemory, learning_rate
from rnnlm.train.signals import Interrupts, command_of, short_shutdown
from rnnlm.train.speed import Peak, Stopwatch, WaitCheck, peak_memory_bytes
from rnnlm.train.step import TrainStep
from rnnlm.train.watchdog import Watchdog

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"


def train(config: Config, interrupts: Interrupts | None = None) -> int:
    """Train to the end; the same call after any kind of death resumes where the newest checkpoint stands.

    Returns:
        The exit code: 0 at the end, 75 when a signal ended it before.

    Raises:
        UserError: a configuration, stream or run directory that cannot work, before anything is written.
        RunError: a run that cannot continue, as one that another process holds.
    """
    streams = open_streams(config)
    with launched(config) as accelerator, open_run(config, accelerator, streams) as run:
        return Trainer(run.config, accelerator, streams, run, interrupts or Interrupts()).fit()


class Trainer:
    """One attempt of a run: from its newest checkpoint, or from the beginning, to its end."""

    def __init__(self, config: Config, accelerator: Accelerator, streams: Streams, run: Run, interrupts: Interrupts):
        self.config, self.accelerator, self.streams, self.run = config, accelerator, streams, run
        self.interrupts, self.ring = interrupts, run.ring

        state = run.state  # of the checkpoint to resume from; None at the beginning
        self.step = self.first_step = state.step if state else 0  # updates done, and so the data position
        self.horizon = state.horizon_steps if state else config.optim.horizon_steps or self.total_steps
        self.memory = ValidationMemory(**state.memory.model_dump()) if state else ValidationMemory()
        vocab_size, begins = streams.train.manifest.vocab_size, state is None
        self.train_step = TrainStep(config, vocab_size, accelerator, run.first, run.last, initialise=begins)
        self.continuity = ContinuityCheck(streams.train, run.ring, run.first, run.last, self.step)
        self._restore()
        run_on_main(accelerator, lambda: record_attempt(config, run))

        self.metrics = self._open_metrics()
        stacks = run.directory / f"hang-rank-{accelerator.process_index}.txt"
        self.watchdog = Watchdog(60 * config.run.timeout_minutes, stacks)
        self.saving = Saving(run.directory, config.run, accelerator, self.metrics, self.watchdog, self.step)
        self.any_rank, self.clock = AnyRank(accelerator.device), Stopwatch()
        self.wait_check = WaitCheck(config.train.prefetch_threads)
        model, processes = self.train_step.raw, accelerator.num_processes
        self.peak = Peak(model, accelerator.device, config.train.precision, processes)

    def fit(self) -> int:
        """Train to the end, or until a signal asks to stop; the exit code."""
        preempted = False
        with closing(self.metrics), self.saving, closing(self.watchdog), closing(self._batches()) as batches:
            self.watchdog.start()
            while not self.finished and not preempted:
                self.take_step(next(batches))
                self.metrics.advance(self.step)
                best = self.validate() if self.validation_due else False  # before logging: it may end the training
                if self.due(self.config.run.log_every_steps):
                    self.log()

                preempted, wanted = self.sync_flags()
                resumable = wanted or self.due(self.config.run.save_every_steps)
                if resumable or best:
                    self.save(resumable, best, is_last=preempted or self.finished)

            self.saving.finish()
        return self._end(preempted)

    @property
    def limits(self) -> dict[str, int]:
        """Steps from the beginning of the run to where each knob that ends it does."""
        train = self.config.train
        limits = {"train.epochs": self.ring.steps_before(train.epochs), "train.max_steps": train.max_steps}
        return {name: steps for name, steps in limits.items() if steps}

    @property
    def total_steps(self) -> int:
        """Steps from the beginning of the run to its end."""
        return min(self.limits.values())

    @property
    def finished(self) -> bool:
        """Whether all steps are done or early stopping has ended the run."""
        return self.step >= self.total_steps or self.memory.should_stop(self.config.optim)

    @property
    def validation_due(self) -> bool:
        """Whether the model is evaluated now: every so many steps, or where an epoch ends; and at the end."""
        every = self.config.eval.every_steps
        return self.due(every) if every else self.ring.is_epoch_start(self.step) or self.finished

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step % every == 0 or self.finished

    def sync_flags(self) -> tuple[bool, bool]:
        """(whether to stop, whether to save), the same on all processes: a signal to any one, the main one's clock."""
        self.watchdog.beat()
        stop, late = self.any_rank.any(bool(self.interrupts.first_signal), self.saving.is_late())
        preempted = stop and not self.finished
        # on GPUs the answer is a step old: it may ask for the save that was just made
        return preempted, preempted or (late and self.step > self.saving.submitted_step + 1)

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's batches from the present step on, each checked to continue where its rows ended."""
        run, train = self.run, self.config.train
        dataset = SubstreamDataset(self.streams.train, self.ring, run.first, run.last, self.step, self.total_steps)
        source = iter(loader(dataset, train.prefetch_threads, self.accelerator.device.type == "cuda"))
        self.clock.reset(self.ring.targets_before(self.step))
        try:
            while True:
                asked = time.perf_counter()
                batch = next(source)
                self.clock.waited += time.perf_counter() - asked
                self.continuity.check(batch, self.step)
                yield batch
        finally:
            del source  # ends its threads, or the workers of a loader put in its place

    def take_step(self, batch: Batch) -> None:
        """One window of every substream of this process, and one update."""
        rate = learning_rate(self.config.optim, self.step, self.horizon, self.memory)
        self.train_step.run(batch, self.ring.is_epoch_start(self.step), rate)
        self.step += 1

    def log(self) -> None:
        """One line: the mean loss since the last one, over all processes.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        report, tokens = self.train_step.report(), self.ring.targets_before(self.step)
        self.saving.report()
        if not self.accelerator.is_main_process:
            return

        seconds, waited = self.clock.seconds, self.clock.waited
        line = {
            "step": self.step,
            "tokens": tokens,
            "epoch": self.ring.locate(self.step - 1)[0],
            **report,
            "ppl": None if report["loss"] is None else exp(report["loss"]),
            **self._speed((tokens - self.clock.tokens) / seconds),
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "ran_in": self.train_step.raw.ran_in,
        }
        self.metrics.write("train", line)
        if warning := self.wait_check.warning(seconds, waited):
            self.metrics.print_line(warning)
        self.clock.reset(tokens)

    def _speed(self, tokens_per_second: float) -> dict[str, float | None]:
        """The figures of a line that follow from how fast the interval, and the attempt, were."""
        done, left = self.step - self.first_step, self.total_steps - self.step
        seconds_left, whole = (self.clock.seconds_for(steps, done) for steps in (left, done + left))
        share = self.peak.share(tokens_per_second, whole)
        return {"tokens_per_second": tokens_per_second, "peak_share": share, "seconds_left": seconds_left}

    def validate(self) -> bool:
        """Evaluate on the validation stream; whether it is the best so far."""
        if self.streams.valid is None:
            return False
        with self.clock.pause():
            model = self.train_step.raw
            found = evaluate_on_all_ranks(self.accelerator, model, self.streams.valid, self.config, self.watchdog.beat)
            loss = run_on_main(self.accelerator, lambda: found.loss)
            best = self.memory.update(loss, self.step, self.config.optim)

            figures = {"step": self.step, "tokens": self.ring.targets_before(self.step), "best": best}
            self.metrics.write("valid", {**figures, **found.to_dict()})
            self.metrics.draw(every_seconds=30)
            if self.accelerator.is_main_process:
                self._sample()
        return best

    def _sample(self) -> None:
        """Continue the configured prompts into samples.md."""
        model, prompts = self.train_step.raw, as_list(self.config.generate.prompts)
        if self.run.tokenizer is None or not prompts or not model.head.predicts_tokens:
            return
        texts = continuations(model, self.run.tokenizer, prompts, self.config.generate)
        self.metrics.sample(self.step, "\n\n".join(f"```text\n{text}\n```" for text in texts.values()))

    def save(self, resumable: bool, best: bool, is_last: bool) -> None:
        """Copy what a checkpoint holds, and leave the writing to a thread."""
        with self.clock.pause():
            before = "waiting until the checkpoint before is written"
            self.saving.wait_for_disk(before if is_last else f"warning: {before}; save less often, or on a faster disk")

            tensors, counts = self.train_step.tensors(), self.train_step.counts()
            ended = torch.from_numpy(self.continuity.ended).to(self.accelerator.device)
            tensors["hidden"]["ended"] = self.accelerator.gather(ended)
            state = {
                "step": self.step,
                "horizon_steps": self.horizon,
                "memory": self.memory.to_dict(),
                "processes": self.accelerator.num_processes,
                **counts,
                **record_of(self.config, self.streams.train, self.ring, self.accelerator.device),
            }
            self.saving.submit(self.step, tensors, state, resumable, best)

    def _restore(self) -> None:
        """Load parameters, optimizer, counts, and this process's rows of the hidden states."""
        found, state = self.run.checkpoint, self.run.state
        if found is None or state is None:
            return
        others = other_versions(state.versions, versions(self.config, self.accelerator.device))
        if others and self.accelerator.is_main_process:
            print(f"warning: {found.path}: {'; '.join(others)}: bits may differ", file=sys.stderr)

        with errors_are_shared():
            ended = self.train_step.restore(found, state, self.run.same_substreams)
        if ended is not None:
            with errors_may_be_local():
                self.continuity.resume_at(ended.numpy(), state.step, found.path)

    def _open_metrics(self) -> SilentMetrics:
        """Report what starts here, and with which processes."""
        substreams = [self.run.first, self.run.last]
        process = {"process": self.accelerator.process_index, "pid": os.getpid(), "substreams": substreams}
        ranks = all_gather_object(process)
        if not self.accelerator.is_main_process:
            return SilentMetrics()
        metrics = Metrics(self.run.directory, self.config.run, self.step, self.total_steps)
        if self.finished:
            return metrics

        counts = self.train_step.raw.parameter_counts()
        self._print_start(metrics, counts)

        processes, device = self.accelerator.num_processes, self.accelerator.device
        record = {"step": self.step, "total_steps": self.total_steps, "processes": processes, "ranks": ranks}
        software = {"threads": torch.get_num_threads(), "cudnn": cudnn_version()}
        figures = {"device": device.type, **software, "parameters": counts}
        metrics.write("start", {**record, **figures, "versions": versions(self.config, device)})
        return metrics

    def _print_start(self, metrics: Metrics, counts: dict[str, int]) -> None:
        """What the person at the console should know before the first step.

        Args:
            counts: parameters by part.
        """
        processes, device, config = self.accelerator.num_processes, self.accelerator.device, self.config
        metrics.print_line(
            f"{self.run.directory}: {self.streams.train.tokens:,} tokens, {self.ring.windows_per_epoch:,} steps an "
            f"epoch; {processes} process(es) on {device.type}, {config.train.precision}; parameters: "
            + ", ".join(f"{part} {count:,}" for part, count in counts.items())
        )
        if self.streams.valid is None:
            metrics.print_line(
                f"no stream {config.stream.directory}/{config.eval.split}: nothing is evaluated, so there is neither a "
                "best checkpoint nor samples.md; eval.py and generate.py read the last checkpoint"
            )

        launcher = command_of(os.getppid())
        if warning := short_shutdown(config.run.grace_seconds, torch.__version__, os.environ, launcher):
            metrics.print_line(warning)
        if device.type == "cuda" and config.model.cell in GATES:
            capability = torch.cuda.get_device_capability(device)
            if warning := slow_recurrence(config.train.precision, cudnn_version(), capability):
                metrics.print_line(warning)
        if self.step:
            metrics.print_line(f"resuming from step {self.step} of {self.total_steps}")

    def _end(self, preempted: bool) -> int:
        """Print where everything is; the exit code.

        Raises:
            RunError: the last checkpoint could not be written, or the run has diverged.
        """
        if self.accelerator.is_main_process:
            directory, saved = self.run.directory, self.saving.saved_step
            if preempted:
                name = self.interrupts.first_signal or "a signal to another process"
                print_preempted(directory, name, self.step, self.total_steps, saved)
            else:
                limits = [name for name, steps in self.limits.items() if steps == self.total_steps]
                print_finished(directory, self.step, self.total_steps, limits, self.memory)

            self.saving.check(self.step)
            if not preempted:
                check_loss(directory, self.streams.train.manifest.vocab_size)
        return PREEMPTED if preempted else 0
