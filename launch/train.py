"""Train a model, or go on with a run: the same command does both.

accelerate launch --config_file launch/cpu.yaml launch/train.py --config configs/imdb.yaml
accelerate launch --config_file launch/one_node.yaml launch/train.py --config configs/imdb.yaml
python launch/train.py --config configs/imdb.yaml --train.max_steps=100 --run.directory=runs/try
"""

from rnnlm.config import TRAINING_SECTIONS, read_config, run_door


def main() -> None:
    """Read the configuration, then train."""
    config = read_config(TRAINING_SECTIONS, __doc__)
    from rnnlm.trainer import Trainer  # after --help: torch takes a second to import

    Trainer(config).fit()


if __name__ == "__main__":
    run_door(main)
