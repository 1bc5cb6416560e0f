"""The loop, and all that a run is.

The order: interval_loss, guard, schedule, optim, state, watchdog, signals, distributed, curves, trackers, metrics, run,
load, evaluation, step, trainer.
"""
