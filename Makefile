# Two commands do everything on a clean Linux machine with Python 3.11+ and a C++ compiler:
#   make train    set up what is missing, then train the embedded default
#   make test     set up what is missing, then run the tests
#   make browser  install Debian's Chromium and its driver, without which the browser tests are skipped
# The README shows the same steps one by one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup train test browser lint clean

setup: $(VENV)/.installed

# torch comes first and pinned: a build without it would fetch another one, or skip the extension.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,test]'
	$(BIN)/python -m dpo_fast.info
	touch $@

train: setup
	$(BIN)/python -m dpo_fast.train

test: setup
	$(BIN)/python -m pytest

browser:
	apt-get update
	apt-get install -y --no-install-recommends chromium chromium-driver

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info dpo_fast/*.so
