"""Continue prompts with a run's best checkpoint; without a prompt, ask for one after the other.

python launch/generate.py --run.directory=runs/imdb --generate.prompts="this film"
python launch/generate.py --run.directory=runs/imdb --generate.samples=3 --generate.temperature=0.7
python launch/generate.py --config configs/imdb.yaml    # of the run that the file names
"""

import sys
from collections.abc import Iterator

try:
    from rnnlm.cli import read_config, run_entry_point
    from rnnlm.config import as_list
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


def main() -> None:
    """Read the run's configuration, then generate."""
    config = read_config(("model", "train", "generate", "run"), __doc__, of_run=True)
    # The run's own prompts are for its samples.md: what was not asked for here is asked for now.
    given = any(argument.startswith("--generate.prompts") for argument in sys.argv[1:])

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
    for prompts in [as_list(config.generate.prompts) or [""]] if given else _typed_prompts():
        write_continuations(model, tokenizer, prompts, config.generate, sys.stdout)


def _typed_prompts() -> Iterator[list[str]]:
    """What the user types, line by line, until an empty line or the end of the input."""
    try:
        while line := input("prompt (empty to end)> "):
            yield [line]
    except EOFError:
        return


if __name__ == "__main__":
    run_entry_point(main)
