"""The training loop: one life of a run, which resumes, steps, logs, scores, saves, and ends.

What a run does next is a pure function of what a checkpoint holds: data, masks and learning rate are arithmetic on the
step, and all else that a step changes is in `learner.py`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from traceback import clear_frames
from types import TracebackType

import torch

from rnnlm.checkpoint import checkpoint
from rnnlm.checkpoint.saver import Saved, Saver
from rnnlm.config import Config, as_list
from rnnlm.data.substreams import Batch, Reading, SubstreamDataset, loader
from rnnlm.errors import RunError, UserError
from rnnlm.files import locked
from rnnlm.model.evaluate import exp
from rnnlm.model.generate import continuations
from rnnlm.train.distributed import Wishes, end, everyones, from_main, start_accelerator
from rnnlm.train.evaluation import score
from rnnlm.train.metrics import Metrics, Stopwatch, peak_memory_bytes
from rnnlm.train.run import (
    Claim,
    check_alike,
    claim,
    fingerprint,
    mark,
    open_ring,
    open_streams,
    share,
    state_of,
    versions,
)
from rnnlm.train.schedule import ValidationMemory, learning_rate
from rnnlm.train.signals import Interrupts
from rnnlm.train.step import Learner
from rnnlm.train.watchdog import Watchdog

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
DISK_PATIENCE = 6  # times run.timeout_minutes, so an hour: a disk may be slow where a process may not
LOCK_PATIENCE_SECONDS = 5.0  # a life that was killed a moment ago may not have ended yet


class Trainer:
    """One life of a run: from its newest checkpoint, or from the beginning, to its end.

    Raises:
        UserError: a configuration, stream or run directory that cannot work, before anything is written.
    """

    def __init__(self, config: Config, interrupts: Interrupts | None = None):
        self.config = config
        self.interrupts = interrupts or Interrupts()  # it counts from when its context was entered
        self.directory = Path(config.run.directory)
        self.train_stream, self.valid_stream = open_streams(config)
        manifest = self.train_stream.manifest
        self.tokenizer = self.train_stream.tokenizer() if manifest.tokenizer else None  # None: no text, so no samples
        self.ring = open_ring(config, self.train_stream)
        self.accelerator = start_accelerator(config)
        self.device = self.accelerator.device
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        self.first, self.last = self._share()
        self.learner = Learner(config, manifest.vocab_size, self.accelerator, self.first, self.last)
        self.reading = Reading(self.train_stream, self.ring, self.first, self.last)
        self.memory = ValidationMemory()
        self.step = 0  # updates done, and so the data position
        self.horizon = config.optim.horizon_steps or self.total_steps
        self.clock = Stopwatch()
        self.save_error = ""  # of the last save that failed
        self.saver = Saver(self.directory / "checkpoints", config.run.keep_last, config.run.keep_every_steps)
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.wishes = Wishes(self.device)
        stacks = self.directory / f"hang-rank-{self.process}.txt"
        self.watchdog = Watchdog(60 * config.run.timeout_minutes, stacks)
        self.disk_patience = DISK_PATIENCE * self.watchdog.timeout_seconds  # seconds; 0: for ever
        self.preempted = self.wants_save = False
        self.submitted_step = -1  # of the last checkpoint that a run goes on from
        self.stack = ExitStack()  # what is held until the end: processes, and in the main one the lock
        self.stack.push(self.leave)
        self.metrics: Metrics | None = None  # in the main process alone

    def fit(self) -> int:
        """Train to the end; the same call after any kind of death goes on where the newest checkpoint stands.

        Returns:
            The exit code: 0 at the end, 75 when a signal ended it before.
        """
        with self.stack, closing(self.watchdog):
            self.resume()
            self.open_metrics()
            self.watchdog.start()
            with closing(self.batches()) as batches:
                for batch in batches:
                    self.train_step(batch)
                    best = self.validation_due() and self.validate()  # first: it may end the training
                    if self.due(self.config.run.log_every_steps):
                        self.log()
                    self.heed()
                    if best or self.wants_save or self.due(self.config.run.save_every_steps):
                        self.save(best)
            return self.close()

    @property
    def total_steps(self) -> int:
        """Steps from the beginning of the run to its end."""
        planned = self.ring.steps_before(self.config.train.epochs)
        return min(planned, self.config.train.max_steps or planned)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or early stopping has ended the run."""
        return self.step >= self.total_steps or self.memory.should_stop(self.config.optim)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step % every == 0 or self.finished

    def validation_due(self) -> bool:
        """Whether the model is scored now: every so many steps, or where an epoch ends; and at the end."""
        every = self.config.eval.every_steps
        return self.due(every) if every else self.ring.is_epoch_start(self.step) or self.finished

    def heed(self) -> None:
        """Signals to any process, and the clock of the main one, are heeded by all at the same step."""
        self.watchdog.beat()
        minutes = self.config.run.save_every_minutes
        late = bool(self.metrics and minutes and time.monotonic() - self.saved_at > 60 * minutes)
        stop, save = self.wishes.agree(bool(self.interrupts.name), late)
        self.preempted = stop and not self.finished
        # on GPUs the answer is a step old: it may be the wish that has just been granted
        self.wants_save = self.preempted or (save and self.step > self.submitted_step + 1)

    def batches(self) -> Generator[Batch, None, None]:
        """This process's batches from the present step on, each checked to go on where its rows ended."""
        dataset = SubstreamDataset(self.train_stream, self.ring, self.first, self.last, self.step, self.total_steps)
        source = iter(loader(dataset, self.config.train.prefetch_workers, self.device.type == "cuda"))
        self.clock.reset(self.ring.targets_before(self.step))
        try:
            while not self.finished and not self.preempted:
                asked = time.perf_counter()
                batch = next(source)
                self.clock.waited += time.perf_counter() - asked
                self.reading.check(batch, self.step)
                yield batch
        finally:
            del source  # ends its threads, or the workers of a loader put in its place

    def train_step(self, batch: Batch) -> None:
        """One window of every substream of this process, and one update."""
        rate = learning_rate(self.config.optim, self.step, self.horizon, self.memory)
        self.learner.learn(batch, self.ring.is_epoch_start(self.step), rate)
        self.step += 1

    def log(self) -> None:
        """One line: the mean loss since the last one, over all processes.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        report, tokens = self.learner.report(), self.ring.targets_before(self.step)
        if self.metrics:
            self.report_saves(self.saver.poll())
            line = {
                "step": self.step,
                "tokens": tokens,
                "epoch": self.ring.locate(self.step - 1)[0],
                **report,
                "ppl": None if report["loss"] is None else exp(report["loss"]),
                "tokens_per_second": (tokens - self.clock.tokens) / self.clock.seconds,
                "data_wait_share": self.clock.waited / self.clock.seconds,
                "peak_memory_bytes": peak_memory_bytes(self.device),
                "processes": self.processes,
                "ran_in": self.learner.raw.ran_in,
            }
            self.metrics.write("train", line)
        self.clock.reset(tokens)

    def validate(self) -> bool:
        """Score the validation stream; whether it is the best so far."""
        if self.valid_stream is None:
            return False
        with self.clock.pause():
            evaluation = score(self.accelerator, self.learner.raw, self.valid_stream, self.config, self.watchdog.beat)
            loss = from_main(self.accelerator, lambda: evaluation.loss)
            best = self.memory.update(loss, self.step, self.config.optim)
            if self.metrics:
                figures = {"step": self.step, "tokens": self.ring.targets_before(self.step), "best": best}
                self.metrics.write("valid", {**figures, **evaluation.to_dict()})
                self.metrics.draw(every_seconds=30)
                self.sample()
        return best

    def sample(self) -> None:
        """Continue the configured prompts into samples.md."""
        if self.tokenizer is None:
            return
        prompts = as_list(self.config.generate.prompts)
        texts = continuations(self.learner.raw, self.tokenizer, prompts, self.config.generate)
        if texts and self.metrics:
            self.metrics.sample(self.step, "\n\n".join(f"```text\n{text}\n```" for text in texts.values()))

    def save(self, best: bool = False) -> None:
        """Copy what a checkpoint holds, leave the writing to a thread; a failing disk costs no more than this one."""
        with self.clock.pause():
            self.wait_for_disk()
            parts, counts = self.learner.tensors(), self.learner.counts()
            parts["hidden"]["ended"] = self.accelerator.gather(torch.from_numpy(self.reading.ended).to(self.device))
            resumable = self.wants_save or self.due(self.config.run.save_every_steps)
            if resumable:
                self.submitted_step = self.step
            if not self.metrics:
                return
            state = {
                "step": self.step,
                "horizon_steps": self.horizon,
                "memory": self.memory.to_dict(),
                "processes": self.processes,
                **counts,
                **state_of(self.config, self.train_stream, self.ring, self.device),
            }
            with self.metrics.forgiven("metrics.jsonl"):
                self.metrics.sync()
            if resumable:
                self.saved_at = time.monotonic()
            names = [f"{prefix}-{self.step:08d}" for prefix, due in (("step", resumable), ("best", best)) if due]
            self.report_saves(self.saver.submit(names, parts, state))

    def wait_for_disk(self) -> None:
        """Until the save before is written: all processes together, so that no watchdog takes the wait for a hang."""
        begin, told = time.perf_counter(), False
        while from_main(self.accelerator, lambda: self.saver.busy(patience_seconds=1.0)):
            self.watchdog.beat()
            if self.metrics and not told:
                advice = "" if self.finished or self.preempted else "; save less often, or on a faster disk"
                self.metrics.say(f"warning: waiting until the checkpoint before is written{advice}")
                told = True
            if self.metrics and self.disk_patience and time.perf_counter() - begin > self.disk_patience:
                self.give_up_disk()

    def end_saving(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        """In the main process, before another life may take the lock: nothing is written any more."""
        if self.saver.busy(self.disk_patience or None):
            self.give_up_disk(f"; it was about to end: {error}" if error else "")

    def give_up_disk(self, also: str = "") -> None:
        """Python itself would wait for a thread that hangs on the disk."""
        self.watchdog.abort(
            f"has waited {self.disk_patience:.0f} seconds for a checkpoint to be written ({DISK_PATIENCE} times "
            f"run.timeout_minutes): the disk hangs, or is too slow{also}"
        )

    def report_saves(self, finished: list[Saved]) -> None:
        """Tell what became of saves that ended; what failed is tried again at the next one's time."""
        assert self.metrics
        for saved in finished:
            prefix, _, step = saved.name.partition("-")
            if saved.path and prefix == "step":
                self.saved_step = max(self.saved_step, int(step))
            if saved.error and saved.path:
                self.metrics.say(f"warning: {saved.name}: older checkpoints are still there ({saved.error})")
            elif saved.error:
                self.save_error = f"{saved.error}"
                self.metrics.say(f"warning: step {int(step)}: no checkpoint ({saved.error}); training goes on")
            grace = self.config.run.grace_seconds
            if saved.path and saved.seconds > grace:
                self.metrics.say(
                    f"warning: {saved.name} took {saved.seconds:.0f} seconds to write, more than run.grace_seconds="
                    f"{grace:g}: after a signal it may be too late; ask for a longer grace, or save more often"
                )

    def resume(self) -> None:
        """Take over the run's directory, and its newest whole checkpoint if there is one."""
        start = from_main(self.accelerator, self._claim)
        self.ring = self.reading.ring = dataclasses.replace(self.ring, origin=start.origin)
        if start.checkpoint is None:
            return
        try:
            self._load(Path(start.checkpoint), "train.global_batch_size" in start.changed)
        except UserError as error:  # a disk that this machine alone sees so
            error.is_alone = True
            raise

    def _load(self, path: Path, rows_changed: bool) -> None:
        found = checkpoint.load(path, every_byte=False)  # the tensors are checked as they are read
        state, now = found.state, versions(self.device)
        if state["versions"] != now and self.accelerator.is_main_process:
            print(f"warning: saved under {state['versions']}, now {now}: bits may differ", file=sys.stderr)
        ended = self.learner.restore(found, same_rows=not rows_changed)
        if ended is not None:
            self.reading.go_on(ended.numpy(), state["step"], found.path)
        self.step, self.horizon = state["step"], state["horizon_steps"]
        self.saved_step = self.step
        self.memory = ValidationMemory(**state["memory"])

    def _claim(self) -> Claim:
        """In the main process: hold the directory, then look at it."""
        note = self.directory / "holder"
        self.stack.enter_context(locked(self.directory, note, "run", patience_seconds=LOCK_PATIENCE_SECONDS))
        self.stack.push(self.end_saving)
        return claim(self.config, self.train_stream, self.tokenizer)

    def open_metrics(self) -> None:
        """Tell what starts here, and with which processes."""
        ranks = everyones({"process": self.process, "pid": os.getpid(), "substreams": [self.first, self.last]})
        if not self.accelerator.is_main_process:
            return
        self.metrics = Metrics(self.directory, self.config.run, self.step, self.total_steps)
        if self.finished:
            return
        counts = self.learner.raw.parameter_counts()
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

    def close(self) -> int:
        """Finish the reports, and say where everything is; the exit code.

        Raises:
            RunError: the last checkpoint could not be written.
        """
        self.wait_for_disk()
        self.watchdog.close()
        if self.metrics:
            self.report_saves(self.saver.wait())
            self.metrics.close()
            if self.preempted:
                self.say_preempted()
            else:
                self.say_finished()
        if self.metrics and self.saved_step < self.step and not self.preempted:
            raise RunError(
                f"{self.directory}: the last checkpoint is of step {self.saved_step}, not {self.step} "
                f"({self.save_error}); mend that, as by making room on the disk, and type the same command again"
            )
        return PREEMPTED if self.preempted else 0

    def leave(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the other processes in order, if all end alike; elsewhere a launcher ends those that wait."""
        if error is None or isinstance(error, RunError):
            del self.learner  # and with it, and with what the error still holds of it, what holds the process group
            clear_frames(trace)
            end(self.accelerator)

    def say_preempted(self) -> None:
        """Leave the marker by which scripts know that the run is to be started again."""
        name = self.interrupts.name or "a signal to another process"
        mark(self.directory, name, self.step, self.saved_step)
        print(
            f"{self.directory}: {name} at step {self.step} of {self.total_steps}, saved at step {self.saved_step}; "
            "type the same command again to go on",
            flush=True,
        )

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
        """This process's substreams, once all processes are known to be alike."""
        prints = everyones(fingerprint(self.config, self.train_stream, self.valid_stream))
        try:
            check_alike(prints)
            return share(self.config, self.process, self.processes)
        except UserError:  # everyone's
            end(self.accelerator)
            raise
