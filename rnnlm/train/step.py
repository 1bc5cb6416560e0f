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
from rnnlm.config import Config
from rnnlm.data.substreams import Batch
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Hidden
from rnnlm.train.distributed import Accelerator, TreeSum
from rnnlm.train.guard import Health
from rnnlm.train.interval_loss import IntervalLoss
from rnnlm.train.optim import build_optimizer, expected_optimizer_tensors, load_optimizer_tensors, optimizer_tensors


class Learner:
    """Parameters, optimizer and the hidden states of substreams first..last-1: all that a step changes."""

    def __init__(self, config: Config, vocab_size: int, accelerator: Accelerator, first: int, last: int):
        self.config, self.accelerator, self.first, self.last = config, accelerator, first, last
        raw = RecurrentLM(config.model, vocab_size, config.train.seed, config.train.loss_chunk_tokens)
        self.raw = raw.to(accelerator.device)  # without DDP and autocast: for evaluation, generation, saving
        self.raw_optimizer = build_optimizer(self.raw, config.optim)
        self.model, self.optimizer = accelerator.prepare(self.raw, self.raw_optimizer)
        self.rows = torch.arange(first, last, device=accelerator.device)
        self.hidden: Hidden = self.raw.zero_hidden(last - first)
        self.interval, self.health = IntervalLoss(accelerator.device), Health(accelerator.device)
        self.gradient_norm = torch.zeros((), device=accelerator.device)
        self.rate = 0.0  # the last step's learning rate
        self._settle()

    def _settle(self) -> None:
        """Let DDP lay out its buckets, which it does after the first backward pass, before the first step.

        Otherwise the first step of every life would sum its gradients in another order than the same step of an
        uninterrupted run; from three processes on the bits would differ.
        """
        zero = torch.zeros((1, 1), dtype=torch.int64, device=self.rows.device)
        loss, _, _ = self.model(zero, self.raw.zero_hidden(1), zero, zero[0, 0], self.rows[:1])
        loss.backward()
        self.raw_optimizer.zero_grad()

    @property
    def parts(self) -> int:
        """Micro-batches of this process in a step."""
        train = self.config.train
        return train.exact_slices // self.accelerator.num_processes if train.exact_slices else train.accumulation

    def learn(self, batch: Batch, begins: bool, rate: float) -> None:
        """Forward, backward, clip, update.

        Args:
            begins: whether an epoch does; hidden states then start from zero.
            rate: the learning rate.
        """
        train, device = self.config.train, self.rows.device
        inputs, targets = batch.to(device)  # (B, T) each
        if begins:
            self.hidden = self.raw.zero_hidden(self.last - self.first)
        step = torch.full((), batch.step, device=device)  # int64, filled on the device: no copy to wait for
        tree = TreeSum() if train.exact_slices else None
        # a mean over substreams and time; DDP averages over processes: times their number it is a sum
        scale = (1 if tree else self.accelerator.num_processes) / (train.global_batch_size * train.seq_len)
        after: list[Hidden] = []
        size = (self.last - self.first) // self.parts
        before = self.interval.sums.clone()
        for start in range(0, self.last - self.first, size):
            own = slice(start, start + size)
            hidden = {name: state[own] for name, state in self.hidden.items()}
            is_last = own.stop == self.last - self.first
            with nullcontext() if is_last and not tree else self.accelerator.no_sync(self.model):
                loss, count, hidden = self.model(inputs[own], hidden, targets[own], step, self.rows[own])
                poison = loss.detach() * 0  # NaN where the loss is not finite, and then so is the gradient of all ranks
                self.accelerator.backward(loss * (scale + poison))
            if tree:
                tree.add(self._gradients())
                if not is_last:
                    self.raw_optimizer.zero_grad()
            self.interval.add(loss.detach(), count)
            after.append({name: state.detach() for name, state in hidden.items()})
        if tree:
            tree.finish(self._gradients())
        joined = {name: torch.cat([each[name] for each in after]) for name in self.hidden}
        self.hidden = self.health.reset_rows(joined)
        self._update(self.interval.sums - before, rate)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.raw.parameters() if parameter.grad is not None]

    def _update(self, sums: Tensor, rate: float) -> None:
        """Clip, and apply the gradient, unless it is of no use.

        Args:
            sums: what this step added to the interval's, for the rule of spikes.
        """
        sigmas, self.rate = self.config.train.skip_spikes_sigmas, rate
        norm = self.accelerator.clip_grad_norm_(self.raw.parameters(), self.config.optim.clip_norm or float("inf"))
        assert norm is not None
        self.gradient_norm = norm.detach()
        loss = IntervalLoss.tensor_mean(self.accelerator.reduce(sums, "sum")) if sigmas else None
        skip = self.health.judge(self.gradient_norm, loss, sigmas)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate
        if not self.accelerator.scaler:  # fp16's scaler finds out by itself
            self.raw_optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # the fused kernels then do nothing
        self.optimizer.step()
        self.optimizer.zero_grad()

    def report(self) -> dict[str, Any]:
        """What a line of metrics says of the steps since the last one, over all processes; called by all.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        sums = self.accelerator.reduce(self.interval.sums, "sum").tolist()
        skipped = self.health.check(self.config.train.stop_after_skipped)
        self.interval = IntervalLoss(self.rows.device)
        return {
            "loss": IntervalLoss.mean(sums),
            "learning_rate": self.rate,
            "gradient_norm": float(self.gradient_norm),
            "skipped_steps": skipped,
            "hidden_resets": self._resets(),
        }

    def _resets(self) -> int:
        return int(self.accelerator.reduce(self.health.resets.clone(), "sum"))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of all processes: `model`, `optimizer`, and `hidden`, each (S, H); called by all."""
        return {
            "model": dict(self.raw.named_parameters()),
            "optimizer": optimizer_tensors(self.raw, self.raw_optimizer),
            "hidden": {name: self.accelerator.gather(state) for name, state in self.hidden.items()},
        }

    def counts(self) -> dict[str, Any]:
        """What trainer.json holds of all processes; called by all."""
        scaler = self.accelerator.scaler
        return {
            "interval": self.accelerator.reduce(self.interval.sums.clone(), "sum").tolist(),
            "health": self.health.to_dict(self._resets()),
            "scaler": scaler.state_dict() if scaler else {},
        }

    def restore(self, found: Checkpoint, same_rows: bool) -> Tensor | None:
        """Take over what a checkpoint holds for these rows; where they ended, (rows,).

        Args:
            same_rows: else an epoch begins, all hidden states with it from zero, and there is nothing to return.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        parameters = dict(self.raw.named_parameters())
        copy_tensors(parameters, found.tensors("model", parameters), found.path)
        expected = expected_optimizer_tensors(self.raw, self.raw_optimizer) if found.state["step"] else None
        load_optimizer_tensors(self.raw, self.raw_optimizer, found.tensors("optimizer", expected))
        is_main = self.accelerator.is_main_process  # it carries what was summed over all
        if is_main:
            self.interval.restore(found.state["interval"])
        self.health.restore(found.state["health"], is_main)
        if self.accelerator.scaler and found.state["scaler"]:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        if not same_rows:
            return None
        rows = self.config.train.global_batch_size
        whole = {name: each.new_empty((rows, each.shape[1]), device="meta") for name, each in self.hidden.items()}
        whole["ended"] = torch.empty(rows, dtype=torch.int64, device="meta")
        own = {name: each[self.first : self.last] for name, each in found.tensors("hidden", whole).items()}
        ended = own.pop("ended")
        copy_tensors(self.hidden, own, found.path)
        return ended
