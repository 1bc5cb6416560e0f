"""One step: a window of every substream of this process forward and backward, then one update, the same on all.

A step's gradient is that of sum(loss) / (S * seq_len), a constant, so a token weighs the same in every step, on every
rank, in every micro-batch. Micro-batches are slices of substreams, never of time. What a step does is a pure function
of its batch, its learning rate and what `tensors` and `counts` hold: these are saved, and nothing else has to be.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnlm.checkpoint.checkpoint import Checkpoint, copy_tensors
from rnnlm.checkpoint.safetensors_file import DTYPES, CheckpointError
from rnnlm.config import Config
from rnnlm.data.substreams import Batch
from rnnlm.errors import UserError
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden
from rnnlm.model.precision import cast_once
from rnnlm.train.capture import NotCapturedError, Step, capture, record_cuda_graph
from rnnlm.train.communication import TokenVectorSum, sends_rows, sum_in_bf16
from rnnlm.train.distributed import Accelerator, errors_are_shared, fill_on_main
from rnnlm.train.guard import Guard
from rnnlm.train.interval_loss import IntervalLoss
from rnnlm.train.optim import build_optimizer, clip, optimizer_tensors, set_learning_rate, skip_next_step
from rnnlm.train.state import TrainerState
from rnnlm.train.tree_sum import TreeSum


class TrainStep:
    """Parameters, optimizer and the hidden states of substreams first ... last - 1: all that a step changes.

    Args:
        initialise: fill the parameters; False where `restore` follows.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        accelerator: Accelerator,
        first: int,
        last: int,
        initialise: bool = True,
    ):
        self.config, self.accelerator, self.first, self.last = config, accelerator, first, last
        train = config.train
        raw = RecurrentLM(
            config.model, vocab_size, train.seed, train.loss_chunk_tokens, initialise, train.gradient_filter
        )
        self.raw = raw.to(accelerator.device)  # without DDP and autocast: for evaluation, generation, saving
        with errors_are_shared():
            _check_states(self.raw)
            self.raw_optimizer = build_optimizer(self.raw, config.optim)
        self.parameters = list(self.raw.parameters())

        device = accelerator.device
        self.rows = torch.arange(first, last, device=device)
        window = torch.zeros((last - first, config.train.seq_len), dtype=torch.int64, device=device)
        self.inputs, self.targets = window, window.clone()
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.zero = self.raw.zero_hidden(1)  # a row's state before the first token
        self.hidden: Hidden = self.raw.zero_hidden(last - first)
        self.interval, self.guard = IntervalLoss(device), Guard(device)
        self.gradient_norm = torch.zeros((), device=device)
        self.rate = 0.0  # the last step's learning rate
        self._prepare()

        graph = device.type == "cuda" and config.train.capture == "auto" and self.raw.head.static_shapes
        self.record = record_cuda_graph if graph else None  # how steps are recorded; None: each runs by itself
        self._take: Step | None = None  # a step, or its replay: chosen when there is a batch
        # of its own for batches that arrive
        self._arrival = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _prepare(self) -> None:
        """Wrap the model, not the optimizer, whose wrapper adds only time; and let DDP lay out its buckets, which it
        does after the first backward pass, before the first step.

        Otherwise the first step of every attempt would sum its gradients in another order than the same step of an
        uninterrupted run; from three processes on the bits would differ.
        """
        train, processes = self.config.train, self.accelerator.num_processes
        rows = sends_rows(self.raw, train, processes)  # else their gradient is summed with all others
        self.token_vectors = TokenVectorSum(self.raw, train, processes) if rows else None
        self.model = self.accelerator.prepare(self.raw)
        if train.gradient_compression == "bf16" and processes > 1:
            self.model.register_comm_hook(None, sum_in_bf16)
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.rows.device)
        loss, _, _ = self.model(token, self.zero, token, token[0, 0], self.rows[:1])
        loss.backward()
        self._drop_gradients()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this process in a step."""
        train = self.config.train
        return train.exact_slices // self.accelerator.num_processes if train.exact_slices else train.accumulation

    def run(self, batch: Batch, epoch_begins: bool, rate: float) -> None:
        """Forward, backward, clip, update.

        Args:
            epoch_begins: whether this is the first step of an epoch; hidden states then start from zero.
            rate: the learning rate.
        """
        if self._take is None:
            self._take = self._captured(batch, rate) if self.record else self._execute
        self._load(batch, epoch_begins, rate)
        self._take()

    def _captured(self, batch: Batch, rate: float) -> Step:
        """A replay of the step, or after a warning the step itself."""
        assert self.record
        other = Batch(batch.step + 1, batch.tokens.flip(0), batch.lengths.flip(0), batch.positions)
        inputs = [partial(self._load, batch, True, rate), partial(self._load, other, False, (rate or 1.0) / 2)]
        try:
            return capture(self._execute, inputs, self.changing(), self.record)
        except NotCapturedError as error:
            if self.accelerator.is_main_process:
                print(f"warning: train.capture: no CUDA graph, {error}; each kernel is started", file=sys.stderr)

        # what was recorded halfway has left gradients, and DDP waiting for more of them
        self._drop_gradients()
        if self.accelerator.num_processes > 1:
            self.model = self.raw
            self.accelerator.free_memory()
            self.raw.__dict__.pop("forward", None)  # Accelerate's, which would be wrapped again
            self._prepare()
        return self._execute

    @property
    def is_captured(self) -> bool:
        """Whether steps are replays of a CUDA graph; known after the first."""
        return self._take not in (None, self._execute)

    def changing(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        states = optimizer_tensors(self.raw, self.raw_optimizer, self.config.optim)
        found = {**dict(self.raw.named_parameters()), **{f"optimizer.{name}": each for name, each in states.items()}}
        found |= {f"hidden.{name}": state for name, state in self.hidden.items()}
        found |= {"gradient_norm": self.gradient_norm, "interval": self.interval.sums, **self.guard.tensors()}
        if scaler := self.accelerator.scaler:
            scaler.scale(self.gradient_norm)  # makes its tensors, if they are not there
            found |= {"scaler.scale": scaler._scale, "scaler.growth": scaler._growth_tracker}
        return found

    def _load(self, batch: Batch, epoch_begins: bool, rate: float) -> None:
        """Fill in what a step reads, where it always lies."""
        torch._foreach_copy_([self.inputs, self.targets], self._arrived(batch))
        self.step.fill_(batch.step)  # filled on the device: no copy to wait for
        set_learning_rate(self.raw_optimizer, rate)
        self.rate = rate
        if epoch_begins:
            for name, state in self.hidden.items():
                state.copy_(self.zero[name])

    def _arrived(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device; to a GPU they travel while the step before still computes."""
        if self._arrival is None:
            return batch.to(self.rows.device)
        with torch.cuda.stream(self._arrival):
            found = batch.to(self.rows.device)

        here = torch.cuda.current_stream()
        here.wait_stream(self._arrival)
        for tensor in found:
            tensor.record_stream(here)  # else its memory might be given away too early
        return found

    @cast_once()  # the weights change at its end
    def _execute(self) -> None:
        """The step itself: on tensors alone, which it changes where they lie."""
        tree = TreeSum() if self.config.train.exact_slices else None
        losses, counts, after = list[Tensor](), list[Tensor](), list[Hidden]()
        size = (self.last - self.first) // self.micro_batches
        for start in range(0, self.last - self.first, size):
            is_last = start + size == self.last - self.first
            loss, count, hidden = self._micro_batch(slice(start, start + size), is_last, tree)
            losses.append(loss)
            counts.append(count)
            after.append(hidden)
            if tree:
                tree.add(self._gradients())
                if not is_last:
                    self._drop_gradients()
        if tree:
            tree.finish(self._gradients())
        elif self.token_vectors:
            self.token_vectors.finish(self.inputs)

        added = self.interval.add(torch.stack(losses), torch.stack(counts))
        self._carry(after)
        self._update(added)

    def _micro_batch(self, own: slice, is_last: bool, tree: TreeSum | None) -> tuple[Tensor, Tensor, Hidden]:
        """Forward and backward of some rows; () their summed loss, () their targets, and their new hidden state.

        Args:
            own: these rows.
            is_last: DDP then sums the gradients over the processes, unless `tree` does.
        """
        train, scaler = self.config.train, self.accelerator.scaler
        # a mean over substreams and time; DDP averages over processes: times their number it is a sum
        scale = (1 if tree else self.accelerator.num_processes) / (train.global_batch_size * train.seq_len)
        hidden = {name: state[own] for name, state in self.hidden.items()}

        with nullcontext() if is_last and not tree else self.accelerator.no_sync(self.model):
            loss, count, hidden = self.model(self.inputs[own], hidden, self.targets[own], self.step, self.rows[own])
            outer = loss.detach() * 0 + scale  # NaN where the loss is not finite: so is the gradient then, on all ranks
            loss.backward(scaler.scale(outer) if scaler else outer)

        # in mixed precision Accelerate makes fp32 of all that the model returns, which here is exact both ways
        return loss.detach(), count, {name: state.detach().to(self.zero[name].dtype) for name, state in hidden.items()}

    def _carry(self, after: list[Hidden]) -> None:
        """Hand the hidden states of all micro-batches on to the next step, without rows that are not finite."""
        joined = {name: torch.cat([each[name] for each in after]) for name in self.hidden} if after[1:] else after[0]
        new = self.guard.reset_rows(joined, self.zero)
        # only now: what a layer has returned may lie in the memory of what it was given
        torch._foreach_copy_(list(self.hidden.values()), [new[name] for name in self.hidden])

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _update(self, sums: Tensor) -> None:
        """Clip, and apply the gradient, unless the guard skips it.

        Args:
            sums: (3,) what this step added to the interval's, for the rule of spikes.
        """
        sigmas, scaler, optimizer = self.config.train.skip_spikes_sigmas, self.accelerator.scaler, self.raw_optimizer
        if scaler:
            scaler.unscale_(optimizer)
        self.gradient_norm.copy_(clip(self._gradients(), self.config.optim.clip_norm))

        loss = IntervalLoss.tensor_mean(self.accelerator.reduce(sums, "sum")) if sigmas else None
        skip_next_step(optimizer, self.guard.should_skip(self.gradient_norm, loss, sigmas))
        optimizer.step()
        self._drop_gradients()
        if scaler:
            scaler.update()

    def report(self) -> dict[str, Any]:
        """What a line of metrics says of the steps since the last one, over all processes; called by all.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        sums = self.accelerator.reduce(self.interval.sums, "sum").tolist()
        skipped = self.guard.check(self.config.train.stop_after_skipped)
        self.interval.clear()
        return {
            "loss": IntervalLoss.mean(sums),
            "learning_rate": self.rate,
            "gradient_norm": float(self.gradient_norm),
            "skipped_steps": skipped,
            "hidden_resets": self._resets(),
        }

    def _resets(self) -> int:
        return int(self.accelerator.reduce(self.guard.resets.clone(), "sum"))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of all processes: model, optimizer, and hidden, each (S, ...); called by all."""
        return {
            "model": dict(self.raw.named_parameters()),
            "optimizer": optimizer_tensors(self.raw, self.raw_optimizer, self.config.optim),
            "hidden": {name: self.accelerator.gather(state) for name, state in self.hidden.items()},
        }

    def counts(self) -> dict[str, Any]:
        """What trainer.json holds of all processes; called by all."""
        scaler = self.accelerator.scaler
        return {
            "interval": self.accelerator.reduce(self.interval.sums.clone(), "sum").tolist(),
            "health": self.guard.to_dict(self._resets()),
            "scaler": scaler.state_dict() if scaler else {},
            "layouts": self.layouts(),
        }

    def layouts(self) -> dict[str, str]:
        """The layout of each state that has a tag for it."""
        return {name: state.layout for name, state in self.raw.states().items() if state.layout}

    def restore(self, found: Checkpoint, state: TrainerState, same_substreams: bool) -> Tensor | None:
        """Take over what a checkpoint holds for these rows; where they ended, (rows,) int64. Called by all.

        Args:
            same_substreams: else an epoch begins, all hidden states with it from zero, and there is nothing to return.

        Raises:
            UserError: a checkpoint that is damaged, or of another model, in all processes.
        """
        self._fill(dict(self.raw.named_parameters()), "model", found)
        self._fill(optimizer_tensors(self.raw, self.raw_optimizer, self.config.optim), "optimizer", found)

        is_main = self.accelerator.is_main_process  # it carries what was summed over all
        if is_main:
            self.interval.restore(state.interval)
        self.guard.restore(state.health.counts, state.health.losses, state.health.resets if is_main else 0)
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return self._restore_hidden(found, state) if same_substreams else None

    def _fill(self, tensors: dict[str, Tensor], group: str, found: Checkpoint) -> None:
        """Put a group of a checkpoint into these tensors, which must be all that it has; read by one process."""
        fill_on_main(
            self.accelerator, tensors, lambda: copy_tensors(tensors, found.tensors(group, tensors), found.path)
        )

    def _restore_hidden(self, found: Checkpoint, state: TrainerState) -> Tensor:
        if state.layouts != self.layouts():
            raise CheckpointError(
                f"{found.path}: hidden states of the layout {state.layouts}, this code has {self.layouts()}; "
                "resume with the code that wrote them"
            )
        rows = self.config.train.global_batch_size
        whole = {name: each.new_empty((rows, *each.shape[1:]), device="cpu") for name, each in self.hidden.items()}
        whole["ended"] = torch.empty(rows, dtype=torch.int64)
        self._fill(whole, "hidden", found)

        ended = whole.pop("ended")[self.first : self.last]
        for name, state_of_rows in self.hidden.items():
            state_of_rows.copy_(whole[name][self.first : self.last])
        return ended


def _check_states(model: RecurrentLM) -> None:
    """Check that a checkpoint can hold all states of the layers, and that they have no others.

    Raises:
        UserError: naming the first that it cannot.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict().keys() - parameters:
        raise UserError(
            f"model.cell={model.config.cell}, model.head={model.config.head}: the buffer {name} is in no checkpoint; "
            "make it a state of the layer, a parameter, or with persistent=False a constant that the constructor fills"
        )
    for name, state in model.states().items():
        if state.dtype not in DTYPES.values():
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise UserError(
                f"model.cell={model.config.cell}: the state {name} is of {state.dtype}, which no checkpoint holds; "
                f"use one of {known}"
            )
