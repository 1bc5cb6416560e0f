"""One step: a window of every substream of this process forward and backward, then one update, the same on all.

A step's gradient is that of sum(loss) / (S * seq_len), a constant, so a token weighs the same in every step, on every
rank, in every micro-batch. Micro-batches are slices of substreams, never of time. What a step does is a pure function
of its batch, its learning rate and what `tensors` and `counts` hold: these are saved, and nothing else has to be.
"""

from __future__ import annotations

from contextlib import nullcontext
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
from rnnlm.train.distributed import Accelerator, errors_are_shared, fill_on_main
from rnnlm.train.guard import Guard
from rnnlm.train.interval_loss import IntervalLoss
from rnnlm.train.optim import build_optimizer, optimizer_tensors, set_learning_rate, skip_next_step
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
        # the optimizer's state is where it belongs: to place it would cast it to the parameters' dtype
        prepared = accelerator.prepare(self.raw, self.raw_optimizer, device_placement=[True, False])
        self.model, self.optimizer = prepared

        self.rows = torch.arange(first, last, device=accelerator.device)
        self.zero = self.raw.zero_hidden(1)  # a row's state before the first token
        self.hidden: Hidden = self.raw.zero_hidden(last - first)
        self.interval, self.guard = IntervalLoss(accelerator.device), Guard(accelerator.device)
        self.gradient_norm = torch.zeros((), device=accelerator.device)
        self.rate = 0.0  # the last step's learning rate
        self._lay_out_buckets()

    def _lay_out_buckets(self) -> None:
        """Let DDP lay out its buckets, which it does after the first backward pass, before the first step.

        Otherwise the first step of every attempt would sum its gradients in another order than the same step of an
        uninterrupted run; from three processes on the bits would differ.
        """
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.rows.device)
        loss, _, _ = self.model(token, self.zero, token, token[0, 0], self.rows[:1])
        loss.backward()
        self.raw_optimizer.zero_grad()

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
        inputs, targets = batch.to(self.rows.device)  # (B, T) each
        step = torch.full((), batch.step, device=self.rows.device)  # int64, filled on the device: no copy to wait for
        if epoch_begins:
            self.hidden = self.raw.zero_hidden(self.last - self.first)
        before = self.interval.sums.clone()

        tree = TreeSum() if self.config.train.exact_slices else None
        after: list[Hidden] = []
        size = (self.last - self.first) // self.micro_batches
        for start in range(0, self.last - self.first, size):
            is_last = start + size == self.last - self.first
            after.append(self._micro_batch(inputs, targets, step, slice(start, start + size), is_last, tree))
            if tree:
                tree.add(self._gradients())
                if not is_last:
                    self.raw_optimizer.zero_grad()
        if tree:
            tree.finish(self._gradients())

        joined = {name: torch.cat([each[name] for each in after]) for name in self.hidden}
        self.hidden = self.guard.reset_rows(joined, self.zero)
        self._update(self.interval.sums - before, rate)

    def _micro_batch(
        self, inputs: Tensor, targets: Tensor, step: Tensor, own: slice, is_last: bool, tree: TreeSum | None
    ) -> Hidden:
        """Forward and backward of some rows; their new hidden state.

        Args:
            inputs, targets: (B, T) int64, of all micro-batches.
            own: the rows of this one.
            is_last: DDP then sums the gradients over the processes, unless `tree` does.
        """
        train = self.config.train
        # a mean over substreams and time; DDP averages over processes: times their number it is a sum
        scale = (1 if tree else self.accelerator.num_processes) / (train.global_batch_size * train.seq_len)
        hidden = {name: state[own] for name, state in self.hidden.items()}

        with nullcontext() if is_last and not tree else self.accelerator.no_sync(self.model):
            loss, count, hidden = self.model(inputs[own], hidden, targets[own], step, self.rows[own])
            nan_if_not_finite = loss.detach() * 0  # then the gradient is NaN too, and so on all ranks
            self.accelerator.backward(loss * (scale + nan_if_not_finite))

        self.interval.add(loss.detach(), count)
        # in mixed precision Accelerate makes fp32 of all that the model returns, which here is exact both ways
        return {name: state.detach().to(self.zero[name].dtype) for name, state in hidden.items()}

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.raw.parameters() if parameter.grad is not None]

    def _update(self, sums: Tensor, rate: float) -> None:
        """Clip, and apply the gradient, unless the guard skips it.

        Args:
            sums: (3,) what this step added to the interval's, for the rule of spikes.
        """
        sigmas, self.rate = self.config.train.skip_spikes_sigmas, rate
        norm = self.accelerator.clip_grad_norm_(self.raw.parameters(), self.config.optim.clip_norm or float("inf"))
        assert norm is not None
        self.gradient_norm = norm.detach()

        loss = IntervalLoss.tensor_mean(self.accelerator.reduce(sums, "sum")) if sigmas else None
        skip = self.guard.should_skip(self.gradient_norm, loss, sigmas)
        if not self.accelerator.scaler:  # fp16's scaler finds out by itself
            skip_next_step(self.raw_optimizer, skip)

        set_learning_rate(self.raw_optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def report(self) -> dict[str, Any]:
        """What a line of metrics says of the steps since the last one, over all processes; called by all.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        sums = self.accelerator.reduce(self.interval.sums, "sum").tolist()
        skipped = self.guard.check(self.config.train.stop_after_skipped)
        self.interval = IntervalLoss(self.rows.device)
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
