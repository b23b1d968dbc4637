# The commands of the project; `make help` lists them. ARGS goes to pytest: make unit ARGS="-k packing".

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RIVALS := $(VENV)/.installed-bench
UNPACK := ../shared/data/unpack.py

export BQNN_DATA ?= $(CURDIR)/data

.DEFAULT_GOAL := help
.PHONY: help setup data demo test lint unit bench accuracy clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned versions and the package, editable

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

$(STAMP): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt setuptools torch  # what the extension is built with
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[test,dev]"
	touch $@

data:  ## put MNIST and CIFAR-10 into $BQNN_DATA (default: data/)
	@if [ -f $(UNPACK) ]; then $(PYTHON) $(UNPACK) "$(BQNN_DATA)"; \
	else echo "data: no $(UNPACK) here; torchvision can download MNIST: torchvision.datasets.MNIST('$(BQNN_DATA)', download=True)"; fi

demo: setup  ## run the demonstration
	$(VENV)/bin/bqnn demo

test: lint unit  ## lint, then all tests

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit: setup data  ## pytest, two processes of one thread each
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --benchmark-disable $(ARGS)

bench: $(RIVALS) data  ## pytest-benchmark on bench/, about 10 minutes; ARGS="-k lenet5" for a part
	$(VENV)/bin/pytest bench -q --benchmark-quiet $(ARGS)

$(RIVALS): $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[bench]"
	touch $@

accuracy: setup data  ## train LeNet-5 on MNIST for the table of the README; over an hour, goes on where it stopped
	$(VENV)/bin/python -m bench.accuracy_lenet5 --data "$(BQNN_DATA)" $(ARGS)

clean:  ## remove what builds, tests and tools left; .venv and data stay
	rm -rf build dist bqnn.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
