"""Continue prompts with a run's best checkpoint; without a prompt, ask for one after the other.

python launch/generate.py --run.directory=runs/imdb --generate.prompts="this film"
python launch/generate.py --run.directory=runs/imdb --generate.samples=3 --generate.temperature=0.7
"""

import sys

from rnnlm.cli import read_config, run_entry_point
from rnnlm.config import as_list
from rnnlm.errors import UserError


def main() -> None:
    """Read the run's configuration, then generate."""
    config = read_config(("model", "train", "generate", "run"), __doc__, of_run=True)
    asked = any(argument.startswith("--generate.prompts") for argument in sys.argv[1:])  # the run's own are not
    import torch  # after --help: it takes a second to import

    from rnnlm.model.generate import write_continuations
    from rnnlm.train.load import choose, load_model

    cuda = torch.cuda.is_available() and config.train.device != "cpu"
    model, tokenizer, found = load_model(config, choose(config), torch.device("cuda" if cuda else "cpu"))
    if tokenizer is None:
        raise UserError(
            f"{found.path}: trained on a stream without a tokenizer, so there is no text; adopt the stream with "
            "tools/adopt_stream.py --tokenizer=my.model, and train on that"
        )
    print(f"{found.path}, step {found.state['step']}", file=sys.stderr)
    for prompts in [as_list(config.generate.prompts) or [""]] if asked else iter(_ask, []):
        write_continuations(model, tokenizer, prompts, config.generate, sys.stdout)


def _ask() -> list[str]:
    try:
        line = input("prompt (empty to end)> ")
    except EOFError:
        line = ""
    return [line] if line else []


if __name__ == "__main__":
    run_entry_point(main)
