"""Train a model, or resume a run: the same command does both.

    python launch/train.py --config configs/imdb.yaml
    python launch/train.py --config configs/imdb.yaml --train.max_steps=100 --run.directory=runs/try
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 launch/train.py --config configs/imdb.yaml
    accelerate launch --config_file launch/one_node.yaml launch/train.py --config configs/imdb.yaml

Exit codes: 0 done; 75 stopped by SIGTERM, SIGINT or SIGUSR1 (preempted.json in the run holds the step that was saved);
1 a fault; 2 a mistake in what was asked; 128 + the number of a second signal, which ends it at once. Where this script
exits with 75, accelerate launch exits with 1, so scripts look for preempted.json.
"""

try:
    from rnnlm.cli import read_config, run_entry_point
    from rnnlm.config import TRAINING_SECTIONS
    from rnnlm.train.signals import Interrupts
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> int:
    """Read the configuration, then train; the exit code."""
    with Interrupts() as interrupts:
        config = read_config(TRAINING_SECTIONS, __doc__)
        from rnnlm.train.trainer import train

        return train(config, interrupts)


if __name__ == "__main__":
    run_entry_point(main)
