# make quickstart   from nothing to a trained model and its text, in a few minutes on two CPU cores
# make test         the test suite
# make check        lint, format and types
# make mutants      small faults put into the code, and which no test notices: hours, or SAMPLE=20, MODULES=rnnlm/data/ring.py
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := quickstart/run

.PHONY: quickstart test check mutants clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/python tools/make_corpus.py quickstart/corpus
	$(BIN)/python tools/train_tokenizer.py --config configs/quickstart.yaml
	$(BIN)/python tools/build_stream.py --config configs/quickstart.yaml
	$(BIN)/python launch/train.py --config configs/quickstart.yaml
	$(BIN)/python launch/eval.py --run.directory=$(RUN)
	$(BIN)/python launch/generate.py --run.directory=$(RUN) --generate.prompts='"""This module '
	@echo
	@echo "Everything is in quickstart/: corpus/, streams/, and run/ with its"
	@echo "  curves.png      loss, perplexity and learning rate"
	@echo "  metrics.jsonl   every number    samples.md   text after each evaluation"
	@echo "Next, with your own text (README.md tells more):"
	@echo "  . $(BIN)/activate"
	@echo "  python tools/train_tokenizer.py --corpus.train=my.txt --stream.directory=streams/my"
	@echo "  python tools/build_stream.py --corpus.train=my.txt --stream.directory=streams/my"
	@echo "  python launch/train.py --stream.directory=streams/my --run.directory=runs/my"
	@echo "  python launch/generate.py --run.directory=runs/my"

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutants]'
	nice $(BIN)/python tools/mutate.py --slow --sample $(or $(SAMPLE),0) $(MODULES)

clean:
	rm -rf $(VENV) quickstart .mutants

# The stamp is written last: an installation that was interrupted is taken up again.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, as in make PYTHON=python3.12 (found %s)" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
