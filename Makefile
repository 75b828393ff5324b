# SPDX-License-Identifier: Apache-2.0
# Everything starts here; nothing needs to be done before. `make check` is for everybody. What needs more than Python
# installs it first, which takes root: `make setup`, `demo`, `lab`, `test`, `bench`.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NAME ?=
KERNEL ?= 6.1
VLLM_VENV ?= build/venv-vllm
ARGS ?=
AGAIN ?=
NCCL_CC ?= $(firstword $(foreach c,clang cc gcc,$(shell command -v $(c))))
STAMP := $(VENV)/.mfsd-setup
ROOTLESS := not (root or netns or bpf)
PURE := $(ROOTLESS) and not daemon

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup system generated build check rootless demo lab lab-quick e2e-vllm e2e-mooncake test test-vm test-deb test-systemd test-metrics \
	test-kubernetes deb wheel coverage fuzz soak kills bench lint nccl-plugin format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  benchmarks:     $$(ls bench/*.py | sed -e 's,bench/,,' -e 's,\.py,,' | grep -v -e __init__ -e common | tr '\n' ' ')"

system:
	@sh scripts/setup.sh system

$(STAMP): pyproject.toml scripts/setup.sh scripts/constraints.txt
	PYTHON=$(PYTHON) sh scripts/setup.sh python $(VENV)
	@touch $@

generated: $(STAMP)
	@$(PY) scripts/build.py

check: lint ## first thing to run: lint and the pure tests, properties with few examples, a minute, as any user
	@mkdir -p build
	$(PY) -m pytest -q -n logical -p support.short -m "$(PURE)" --junitxml=build/check.xml
	@$(PY) scripts/check_tiers.py --pure build/check.xml

rootless: generated ## all tests that need no privileges, those with daemons, too: some three minutes, as any user
	@mkdir -p build
	$(PY) -m pytest -q -n logical -m "$(ROOTLESS)" --junitxml=build/rootless.xml
	@$(PY) scripts/check_tiers.py --pure build/rootless.xml

setup: build ## Debian packages (as root), virtual environment, generated code: what of them is missing or out of date

build: system generated ## the same as setup

demo: build ## the main job on real TCP in network namespaces, two minutes: build/demo.json, build/demo.html
	$(PY) -m mfsd.lab demo

lab-quick: build ## the cluster lab, five policies at two loads, 4 minutes: build/lab/quick.json, quick.html
	$(PY) -m mfsd.lab quick

lab: build ## the whole cluster lab: hours, goes on where it was interrupted: build/lab/lab.json, lab.html
	$(PY) -m mfsd.lab full

e2e-vllm: build ## real vLLM, prefill to decode on TCP, 11 minutes (ARGS=--quick: 3), once 3 GB: build/lab/e2e-vllm.html
	PYTHON=$(PYTHON) sh scripts/vllm_env.sh $(VLLM_VENV)
	$(PY) -m mfsd.lab vllm --python $(VLLM_VENV)/bin/python $(ARGS)

e2e-mooncake: build ## Mooncake's transfer engine and Store by mfsd's wrappers, half a minute, once 3 GB
	PYTHON=$(PYTHON) sh scripts/vllm_env.sh $(VLLM_VENV)
	$(PY) scripts/mooncake_check.py --python $(VLLM_VENV)/bin/python

test: build ## all tests of this machine's kernel, as root; fails if a tier did not run (AGAIN=1: what failed, once more)
	@mkdir -p build
	@# what needs privileges has the kernel to itself, one test after the other
	@status=0; \
	run() { scripts/pytest_again.sh "$(AGAIN)" $(PY) "$$@" || status=1; }; \
	run -n logical -m "$(ROOTLESS)" --junitxml=build/rootless.xml; \
	run -m "not ($(ROOTLESS))" --junitxml=build/privileged.xml; \
	$(PY) scripts/check_tiers.py build/rootless.xml build/privileged.xml && exit $$status

nccl-plugin: ## NCCL's profiler plugin, which tells mfsd of collectives: build/libnccl-profiler-mfsd.so
	@mkdir -p build
	$(NCCL_CC) -std=c11 -O2 -Wall -Wextra -fPIC -fvisibility=hidden -shared -pthread \
		-o build/libnccl-profiler-mfsd.so nccl/profiler.c

test-vm: build ## the kernel tests in guests, KERNEL=6.1|6.12|7.3|all: build/vm/; all: docs/kernels.md
	$(PY) scripts/vm/run.py --report $(KERNEL)

wheel: build ## wheel and sdist, with the compiled BPF objects, in dist/; the same commit gives the same files
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PY) -m build -q --no-isolation

deb: build ## the Debian package for 12 and 13, in dist/
	$(PY) packaging/deb.py

test-deb: deb ## the package installed, upgraded, removed and purged in fresh Debian 12 and 13: build/system/
	MFSD_DEB="$$(ls $(CURDIR)/dist/mfsd_*.deb)" $(PY) -m pytest -q tests/system/test_package.py

test-systemd: deb ## the unit under a real systemd of Debian 12 and 13: build/system/
	MFSD_DEB="$$(ls $(CURDIR)/dist/mfsd_*.deb)" $(PY) -m pytest -q tests/system/test_unit_runs.py

test-metrics: build ## a real Prometheus reads a daemon; each query of the dashboard has an answer
	$(PY) -m pytest -q tests/monitoring

test-kubernetes: build ## the chart rendered by Helm's code and checked against Kubernetes' schemas (350 MB of packages)
	$(PY) -m pip install -q --disable-pip-version-check -c scripts/constraints.txt -e '.[kubernetes]'
	$(PY) -m pytest -q tests/kubernetes

docs: generated ## the documentation as a site, links checked: build/site/
	$(PY) scripts/pages.py

coverage: generated ## branches that the tests without privileges take in policy, engine, api and client
	rm -rf build/coverage
	$(VENV)/bin/coverage run -m pytest -q -n logical -m "$(ROOTLESS)"
	@$(VENV)/bin/coverage combine -q
	@for room in policy engine api client; do \
		$(VENV)/bin/coverage report --skip-empty --skip-covered --include "mfsd/$$room/*"; echo; done

fuzz: generated ## whatever others send, write or answer, MINUTES=10 of it; what trips mfsd is added to tests/fuzz/corpus
	PYTHONPATH=.:tests $(PY) -m fuzz.run --minutes $(or $(MINUTES),10)

soak: build ## everything that can happen to a host, at random, MINUTES=60, as root: build/bench/soak.json
	$(PY) -m bench.soak --minutes $(or $(MINUTES),60)

kills: build ## kill -9 at random moments, KILLS=1000 of them, as root: every restore must be exact
	MFSD_KILLS=$(or $(KILLS),1000) $(PY) -m pytest -q tests/e2e/test_kills.py -k test_killed_at_any_moment

bench: build ## one benchmark, NAME=...: build/bench/NAME.json and a table
	@test -n "$(NAME)" || { echo "say which one: make bench NAME=promotion (make help lists them)"; exit 2; }
	$(PY) -m bench.$(NAME)

lint: generated ## ruff, the rooms' import contracts (pyproject.toml), mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --cache-dir build/import-linter
	$(VENV)/bin/mypy
	MYPYPATH=tests $(VENV)/bin/mypy --explicit-package-bases tests

format: generated ## let ruff format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix-only .

clean: ## remove everything that was generated, but not the virtual environment
	rm -rf build dist mfsd/datapath/_bpf mfsd/datapath/_abi.py mfsd/v1
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
