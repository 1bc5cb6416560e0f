"""The loop, and all that a run is.

The order: tree_sum, interval_loss, guard, schedule, optim, state, watchdog, signals, distributed, communication,
capture, trackers, curves, metrics, speed, ending, inputs, identity, sizes, run, saving, load, evaluation, step,
trainer.
"""
