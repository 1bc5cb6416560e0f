"""Where else a run reports to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rnnlm.config import RunConfig


def start_wandb(directory: Path, config: RunConfig) -> Any:
    """A wandb run that goes on where an earlier life of this run left it; None when off or not to be had."""
    if config.wandb == "off":
        return None
    id_file = directory / "wandb-id"
    try:
        import wandb

        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex())
        run = wandb.init(
            project=config.wandb_project,
            id=id_file.read_text(),
            resume="allow",
            mode=config.wandb,
            dir=str(directory),
            name=directory.name,
            settings=wandb.Settings(init_timeout=60, login_timeout=30),  # seconds, after which training starts without
        )
        run.define_metric("*", step_metric="tokens")  # wandb's own step may not go back, a resumed run does
        return run
    except Exception as error:  # a missing package, key or network is no reason not to train
        print(f"warning: run.wandb={config.wandb}: {error}; training without it", file=sys.stderr, flush=True)
        return None
