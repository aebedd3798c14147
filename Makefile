# `make demo` and `make test` set everything up on a fresh machine; the second call skips that.
#
#   TORCH    what pip installs first, unless torch can be imported already. Keep a torch of your
#            own (a CUDA build) with: make demo VENV=/path/to/its/venv
#   EXTRAS   extras of pyproject.toml; a torch that brings its own Triton wants EXTRAS=runtime,dev
#   VENV     the virtual environment; ARGS: passed on to pytest or to the command
VENV   ?= .venv
TORCH  ?= torch==2.13.0
EXTRAS ?= runtime,kernels,dev
PYTHON ?= python3
ARGS   ?=

PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
RUN   := OMP_NUM_THREADS=1 $(PY) -m
export MYPYPATH := .typing

.PHONY: help setup demo test check soak bench gpu clean

help:  ## list these verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 14

setup: $(READY)  ## make the virtual environment and install into it

demo: $(READY)  ## the main job: calibrate, tune, run, compare; report in build/demo/
	$(RUN) cachetune demo $(ARGS)

test: check  ## everything that must hold, in minutes
	$(RUN) pytest -m "not slow and not gpu" $(ARGS)

FLOORS := core kernels simulator runtime calibration tuner cli

check: $(READY)  ## ruff and mypy (strict) on every floor
	$(RUN) ruff check .
	$(RUN) mypy $(FLOORS:%=-p cachetune.%) -m cachetune.__main__

soak: $(READY)  ## the slow tests: full counts of kills, fuzz, load; goes on where it was stopped
	$(RUN) pytest -m "slow and not gpu" --timeout 7200 $(ARGS)

BENCHES := fidelity quality ttft throughput kernels io grid serve shared-link
SEED    ?= 11

bench: $(BENCHES:%=build/bench/%)  ## all measurements; a second call goes on where the first stopped

build/bench/fidelity: $(READY)
	$(RUN) cachetune calibrate --max-tokens 512 --repeats 10 --out results/cpu/fidelity/profile.json \
	  --check --seed $(SEED) --check-repeats 25 --check-out results/cpu/fidelity
	@mkdir -p $(@D) && touch $@

build/bench/%: $(READY)
	$(RUN) cachetune bench $* $(ARGS)
	@mkdir -p $(@D) && touch $@

gpu:  ## correctness, benchmarks and the loop on a CUDA device, no set-up; without one a dry run
	PYTHONPATH=.typing$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m cachetune bench gpu $(ARGS)

clean:  ## remove what the other verbs made
	rm -rf .venv build dist cachetune.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || test -z "$(TORCH)" || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[$(EXTRAS)]'
	@touch $@
