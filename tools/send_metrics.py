"""Send what a run has logged to Weights & Biases: all lines of its metrics.jsonl, under the id that it keeps there.

    python tools/send_metrics.py runs/my
    python tools/send_metrics.py runs/my --project=mine --offline      # into runs/my/wandb, for `wandb sync`

For a run that was trained without run.wandb, or whose lines did not arrive; not while it trains. Lines that are there
already come a second time, with the same numbers at the same tokens.
"""

import argparse
from pathlib import Path

try:
    from rnnlm.cli import run_entry_point
    from rnnlm.config import RunConfig
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Replay the lines of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run.directory")
    parser.add_argument("--project", default=RunConfig().wandb_project, help="name of the project there")
    parser.add_argument("--offline", action="store_true", help="write into the run's wandb/, and send nothing")
    options = parser.parse_args()
    from rnnlm.train.trackers import WandbTracker, read_lines, replay

    lines = read_lines(options.run / "metrics.jsonl")
    if not lines:
        raise UserError(f"{options.run}: no metrics.jsonl with lines in it; give the directory of a run")
    config = RunConfig(wandb="offline" if options.offline else "online", wandb_project=options.project)
    try:
        tracker = WandbTracker(options.run, config)
        tracker.received = -1  # whatever was sent before
        sent = replay(tracker, lines)
        tracker.close()
    except Exception as error:  # a key, a network, a server: wandb has exceptions of many kinds
        raise UserError(f"{options.run}: not sent ({error}); `wandb login`, or --offline") from error
    print(f"{options.run}: {sent} lines sent to {options.project}, run {(options.run / 'wandb-id').read_text()}")


if __name__ == "__main__":
    run_entry_point(main)
