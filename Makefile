# make install   the environment in .venv, with the locked versions
# make demo      synthetic scenes through extract, train, evaluate and report (under 3 minutes on 2 cores)
# make test      every check: ruff, mypy, pytest, the README's commands
# make browser   a Chromium for the tests of HTML, if there is none (PCD_BROWSER=PROGRAM names one); part of make test
#
# On Linux the registry's torch brings CUDA along. Without a GPU, save the gigabytes:
#   make install TORCH_INDEX=<address of PyTorch's CPU wheels, see pytorch.org>
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
BROWSER := $(VENV)/bin/python -m tests.browser
APT_BROWSER = test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
  apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends chromium fonts-dejavu-core >/dev/null

.PHONY: install demo test lint types unit readme browser clean

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

unit: install browser
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile --cov=pcd --cov-report=term --cov-fail-under=90

readme: install
	$(VENV)/bin/python tests/run_readme.py README.md

# Debian's package brings the libraries along; Playwright's download is for those who may not install packages.
browser: install
	@$(BROWSER) || { test -z "$$PCD_BROWSER" && { $(APT_BROWSER) || $(VENV)/bin/playwright install chromium; } && $(BROWSER); } \
	  || { echo "make browser: no browser that starts, and neither apt-get (as root) nor 'playwright install chromium' gave one." \
	    "Install Chromium or Chrome, or set PCD_BROWSER=PROGRAM: the tests of HTML need it." >&2; exit 1; }

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage
