# `make` lists what can be made. Nothing needs root; everything is installed into $(VENV).

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast fuzz bench aot gpu gpu-site docs docs-serve lint types own

# The active environment if there is one, else .venv, which `make setup` creates.
VENV := $(or $(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
PYTHONS := $(or $(PYTHON),python3 python3.11 python3.12 python3.10)
READY := $(VENV)/.dynamic-dino-ready

# Keep what Python compiles, also where a shell says not to: tests, demo and benchmarks start many
# processes, and each would compile PyTorch again, for 4 s and more.
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Environment: $(VENV). To choose the Python that creates it: make setup PYTHON=python3.11"

setup: $(READY)  ## create .venv and install everything (2.5 GB of downloads, some minutes)
	@echo "Ready: $(PY)"

demo: $(READY)  ## from a dense detector to Dynamic-DINO: tune, evaluate, detect (20 minutes)
	@$(PY) -m dynamic_dino.demo

# With BROWSER=1 it brings what the tests of pages need: a browser, if there is none, and Gradio with
# what it needs beside what is here, but no older Pillow, which it asks for.
GRADIO := gradio gradio-client groovy hf-gradio orjson pandas pydub pytz safehttpx semantic-version tomlkit
test: $(READY)  ## run the tests, or some of them: make test TESTS="tests/moe -k router"
	@$(if $(BROWSER),$(PY) -m pip --disable-pip-version-check install -q -c constraints.txt \
	    -e '.[browser]' && $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt \
	    --no-deps $(GRADIO) && $(PY) tests/helpers/browser.py)
	@$(PY) -m pytest -q -n auto --dist worksteal $(TESTS)

# One path through everything: kernels, experts, their tuning, losses, a training step, data,
# recipes, the loop, an evaluation, checkpoints, and detectors that load by name.
FAST := tests/setup/test_layers.py tests/kernels/test_expert_ffn.py::test_matches_the_definition \
	tests/moe/test_router.py tests/moe/test_tuning.py tests/modeling/losses \
	tests/modeling/test_detector.py::test_training_step tests/data/test_mapper.py \
	tests/data/test_datasets.py tests/engine/test_recipe_config.py tests/engine/test_trainer.py \
	tests/evaluation/test_coco_ap.py tests/checkpoint/test_weights.py \
	tests/serving/test_shipped_models.py

test-fast: $(READY)  ## run one path through everything, in less than a minute
	@$(PY) -m pytest -q -n auto --dist worksteal -m "not slow" $(FAST)

fuzz: SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))
fuzz: TIMES := $(or $(TIMES),1)
fuzz: $(READY)  ## tests on other inputs, TIMES as many: make fuzz TIMES=20 SEED=123 TESTS=tests/data
	@echo "Seed: $(SEED)"
	@DYNAMIC_DINO_TEST_SEED=$(SEED) DYNAMIC_DINO_TEST_TIMES=$(TIMES) $(PY) -m pytest -q -n auto --dist worksteal --hypothesis-seed=$(SEED) $(TESTS)

bench: $(READY)  ## measure this machine, into benchmarks/results/<machine> (minutes)
	@for script in flops fps profile_detector moe_layer training_step peers \
	    public_weights; do \
	    $(PY) benchmarks/$$script.py --save || exit 1; done
	@$(PY) benchmarks/moe_layer.py --save --name moe_scaling --measure layer \
	    --tokens 100 300 900 2700 --experts 4 16
	@$(PY) benchmarks/results.py

aot: $(READY)  ## compile every kernel for every GPU, and check that it fits (minutes; needs no GPU)
	@$(PY) -m dynamic_dino_kernels.aot --targets all

# Installs nothing: on a machine without a network, `python3 benchmarks/gpu.py` is the same.
gpu:  ## measure a GPU in ten minutes, into gpu_results/<gpu>: make gpu GPU="--seconds 300"
	@$(or $(wildcard $(PY)),python3) benchmarks/gpu.py $(GPU)

gpu-site: $(READY)  ## make .site, which `make gpu` needs where nothing can be installed
	@$(PY) benchmarks/gpu_site.py

# The site's tools are asked for here alone: `make setup` doesn't bring them.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs
SITE := --config-file projects/DynamicDINO/mkdocs.yml

docs: $(VENV)/.docs-ready  ## build the site of the documentation into site/ (a minute)
	@$(MKDOCS) build --strict --quiet $(SITE)
	@echo "Open site/index.html"

docs-serve: $(VENV)/.docs-ready  ## show the site at http://localhost:8000 while you write
	@$(MKDOCS) serve $(SITE)

$(VENV)/.docs-ready: $(READY)
	@$(PY) -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[docs]'
	@touch $@

# Needs ruff alone, at the version of constraints.txt: the environment's, that of the PATH, or else
# one in an environment of its own.
RUFF_VERSION := $(shell sed -n 's/^ruff==//p' constraints.txt)
LINT_RUFF := .venv-lint/bin/ruff
RUFF = $(shell for ruff in $(VENV)/bin/ruff ruff; do \
    [ "$$($$ruff --version 2>/dev/null)" = "ruff $(RUFF_VERSION)" ] && echo $$ruff && exit; done; \
    echo $(LINT_RUFF))

lint:  ## check the style of the code (seconds, needs no set-up)
	@ruff=$(RUFF); [ $$ruff != $(LINT_RUFF) ] || $(MAKE) -s --no-print-directory $$ruff || exit 1; \
	    $$ruff check && $$ruff format --check

$(LINT_RUFF): constraints.txt
	@echo "Installing ruff $(RUFF_VERSION) into .venv-lint"
	@$(or $(PYTHON),python3) -m venv .venv-lint
	@.venv-lint/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt ruff
	@touch $@

types: $(READY)  ## check types, and that no import climbs the stair
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-cache --no-logo

# Of what pip says, print what tells a waiting person how far it is: the larger files.
PROGRESS := { grep --line-buffered -oE -e '^ *(Downloading|Using cached) .* [MG]B\)$$' \
	-e '^Installing collected packages' || true; }

# Runs again whenever what it installs has changed. Nothing is compiled to bytecode here: that takes a
# minute for 17,000 files, of which few are ever imported.
$(READY): setup.py constraints.txt projects/DynamicDINO/dynamic_dino/install_detectron2.py | $(PY) own
	@echo "[1/3] Installing Dynamic-DINO and what it needs into $(VENV)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip  # environments of uv lack pip
	@set -o pipefail; $(PY) -m pip --disable-pip-version-check install --progress-bar off --no-compile \
	    -c constraints.txt -e '.[nano,dev]' | $(PROGRESS)
	@echo "[2/3] Installing Detectron2, unless there is one"
	@$(PY) -m dynamic_dino.install_detectron2
	@echo "[3/3] Installing lvis, which the tests of our LVIS AP compare it with, and trackers"
	@# without what they ask for: their second OpenCV takes the place of the one we have
	@$(PY) -m pip --disable-pip-version-check install -q -c constraints.txt --no-deps lvis trackers
	@touch $@

# An active environment may be that of another checkout: installing this one there would change
# what the other runs, and without installing it the other's code would run here.
own: | $(PY)
	@found=$$($(PY) -c 'import importlib.util as u; s = u.find_spec("dynamic_dino"); \
	    print(s.origin if s else "")'); \
	case "$$found" in "" | "$(CURDIR)"/* | "$(realpath $(VENV))"/*) exit;; esac; \
	echo "error: $(VENV) runs another checkout's Dynamic-DINO: $$found" >&2; \
	echo "Run \`deactivate\`, and this checkout gets an environment of its own, .venv;" \
	    "or move that one here: $(PY) -m pip install --no-deps -e ." >&2; \
	exit 1

# The first Python that is neither too old nor too new.
$(PY):
	@for python in $(PYTHONS); do \
	    "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
	        2>/dev/null || continue; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "error: $$python can't create environments; on Debian or Ubuntu:" \
	            "apt install python3-venv" >&2; \
	        exit 1; \
	    fi; \
	    echo "[0/3] Creating $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv "$(VENV)"; \
	done; \
	echo "error: Dynamic-DINO needs Python 3.10, 3.11 or 3.12; tried: $(PYTHONS)." >&2; \
	echo "Install one, and name it if need be: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 1
