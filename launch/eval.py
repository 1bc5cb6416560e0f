"""Score a stream with a run's best checkpoint: perplexities and bits per byte, with the counts behind them.

    python launch/eval.py --run.directory=runs/imdb
    python launch/eval.py --config configs/imdb.yaml --eval.split=test
    accelerate launch --config_file launch/one_node.yaml launch/eval.py --run.directory=runs/imdb

The run is the one that run.directory names, as an option or in a file of --config; its model is as it was trained.
The result is printed as one JSON object.
"""

import json
import os

try:
    from rnnlm.cli import read_config, run_entry_point
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Read the run's configuration, evaluate, print."""
    config = read_config(("stream", "model", "train", "eval", "run"), __doc__, of_run=True)
    from rnnlm.train.evaluation import evaluate_run

    result = evaluate_run(config)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.to_dict(), indent=1))


if __name__ == "__main__":
    run_entry_point(main)
