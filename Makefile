# SPDX-License-Identifier: Apache-2.0
# Everything starts here. `make demo` and `make test` need nothing before them on a fresh Debian 12 machine as root.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NAME ?=
KERNEL ?= 6.1
STAMP := $(VENV)/.mfsd-setup

.DEFAULT_GOAL := help
.PHONY: help setup build demo lab lab-quick test test-vm bench lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  benchmarks:       $$(ls bench/*.py | sed -e 's,bench/,,' -e 's,\.py,,' | grep -v -e __init__ -e common | tr '\n' ' ')"

$(STAMP): pyproject.toml scripts/setup.sh scripts/constraints.txt
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV)
	@touch $@

setup: $(STAMP) ## Debian packages, virtual environment, generated code (idempotent)

build: $(STAMP) ## protobuf code, BPF object, layouts (only what is out of date)
	@$(PY) scripts/build.py

demo: build ## the main job on real TCP in network namespaces: build/demo.json, build/demo.html
	$(PY) -m mfsd.lab.demo

lab-quick: build ## the cluster lab, five policies at two loads, 4 minutes: build/lab/quick.json, quick.html
	$(PY) -m mfsd.daemon lab quick

lab: build ## the whole cluster lab: hours, goes on where it was interrupted: build/lab/lab.json, lab.html
	$(PY) -m mfsd.daemon lab full

test: build ## all tests of this machine's kernel; fails if a tier did not run
	@mkdir -p build
	$(PY) -m pytest --junitxml=build/junit.xml
	@$(PY) scripts/check_tiers.py build/junit.xml

test-vm: build ## the kernel tests in guests, KERNEL=6.1|6.12|7.3|all: build/vm/; all: docs/kernels.md
	$(PY) scripts/vm/run.py --report $(KERNEL)

bench: build ## one benchmark, NAME=...: build/bench/NAME.json and a table
	@test -n "$(NAME)" || { echo "say which one: make bench NAME=promotion (make help lists them)"; exit 2; }
	$(PY) -m bench.$(NAME)

lint: build ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=tests $(VENV)/bin/mypy --explicit-package-bases tests

format: build ## let ruff format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix-only .

clean: ## remove everything that was generated, but not the virtual environment
	rm -rf build dist mfsd/datapath/_bpf mfsd/datapath/_abi.py mfsd/v1
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
