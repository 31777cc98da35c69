# make install   the environment in .venv, with the locked versions
# make demo      synthetic scenes through extract, train, evaluate, to a picture (under 3 minutes on 2 cores)
# make test      every check: ruff, mypy, pytest, the README's commands
#
# On Linux the registry's torch brings CUDA along. Without a GPU, save the gigabytes:
#   make install TORCH_INDEX=<address of PyTorch's CPU wheels, see pytorch.org>
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_INDEX ?=
STAMP := $(VENV)/.installed

.PHONY: install demo test lint types unit readme clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "pcd needs Python 3.11 or newer; set PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(VENV)/bin/pcd demo

test: lint types unit readme

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

unit: install
	$(VENV)/bin/pytest --cov=pcd --cov-report=term --cov-fail-under=90

readme: install
	$(VENV)/bin/python tests/run_readme.py README.md

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage
