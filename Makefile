# Two commands do everything on a clean Linux machine with Python 3.11+ and a C++ compiler:
#   make train    set up what is missing, then train the embedded default
#   make test     set up what is missing, then run the tests
#   make test-oldest  the tests of models, trainer and command line with the oldest transformers that is allowed
#   make test-engines  the tests of DeepSpeed and of bitsandbytes
#   make peers    add the trainers of other people that the tests compare with
#   make browser  install Debian's Chromium and its driver, without which the browser tests are skipped
# The README shows the same steps one by one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup peers train test test-oldest test-engines browser lint clean

setup: $(VENV)/.installed

# torch comes first and pinned: a build without it would fetch another one, or skip the extension.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,test]'
	$(BIN)/python -m dpo_fast.info
	touch $@

peers: setup
	$(BIN)/python -m pip install -q -c constraints.txt trl liger-kernel

train: setup
	$(BIN)/python -m dpo_fast.train

test: setup
	$(BIN)/python -m pytest -n auto

# This environment uses the packages of .venv, except for the few that are older here.
OLDEST := .venv-oldest
OLDEST_TESTS := test_model_families test_model_calls test_model_refusals test_model_wrappers test_start_checks \
	test_aux_loss test_dropout test_rope_regimes test_head_adapters test_load test_attention test_protocol \
	test_trainer test_trainer_evaluation test_trainer_reference test_trainer_adapters test_cli test_cli_errors \
	test_options test_options_without_effect test_option_sources

$(OLDEST)/.installed: $(VENV)/.installed constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(OLDEST)/bin/python -c "import site; print(site.getsitepackages()[0])")/newest.pth
	$(OLDEST)/bin/python -m pip install -q --no-deps -r constraints-oldest.txt
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto -m "not slow" $(OLDEST_TESTS:%=tests/%.py)

# Beside .venv as well: every process that finds DeepSpeed or bitsandbytes imports them.
ENGINES := .venv-engines
ENGINES_TESTS := test_quantised test_deepspeed

$(ENGINES)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --clear $(ENGINES)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(ENGINES)/bin/python -c "import site; print(site.getsitepackages()[0])")/engines.pth
	DS_BUILD_OPS=0 $(ENGINES)/bin/python -m pip install -q -c constraints.txt --no-build-isolation bitsandbytes deepspeed
	touch $@

test-engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest -n 2 $(ENGINES_TESTS:%=tests/%.py)

browser:
	apt-get update
	apt-get install -y --no-install-recommends chromium chromium-driver

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) $(ENGINES) build dist *.egg-info dpo_fast/*.so
