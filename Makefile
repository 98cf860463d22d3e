# The five things people type. PYTHON=path/to/python chooses another interpreter.
PYTHON ?= python

.PHONY: install train test lint docs

install:  ## requirements of training, tests and linters
	$(PYTHON) -m pip install -r requirements-dev.txt

train:  ## the default run
	$(PYTHON) train.py --config config.yaml

test:  ## the quick tests; `make test ARGS='-m slow'` runs the slow ones
	$(PYTHON) -m pytest $(ARGS)

lint:  ## style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:  ## the API reference, into api/
	$(PYTHON) -m pdoc -o api pocketlm model train data
