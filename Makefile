# install: .venv with the command in it; quickstart: the whole recipe on handwritten digits; test: lint, then all rings,
# and thousands of simulated histories of drivers that are killed, paused and fenced.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-unit lint audit docs format

install: $(STAMP)

# DeepSpeed is built without isolation, so that it sees the torch that is installed and pulls no other. The demo's page
# comes without its dependencies (orchestrator/demo/requirements.txt says why); playwright drives a Chromium of the
# system, if there is one.
$(STAMP): pyproject.toml constraints.txt orchestrator/demo/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel packaging ninja py-cpuinfo psutil numpy pydantic
	$(BIN)/python -m pip install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev,docs,quickstart]"
	$(BIN)/python -m pip install -q --no-deps -r orchestrator/demo/requirements.txt playwright==1.65.2
	touch $@

quickstart: install
	$(BIN)/python experiments/digits.py --output runs/digits --seed 0
	$(BIN)/stageline run experiments/quickstart.yaml

lint: install audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Known vulnerabilities of what is installed; says so where no service can be asked.
audit: install
	$(BIN)/python tests/audit.py

# The site, in build/docs; the reference pages are written from the code first.
docs: install
	$(BIN)/python docs/reference.py
	$(BIN)/python -m sphinx -q -W --keep-going -n -d build/doctrees docs build/docs
	@echo build/docs/index.html

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-unit: install
	$(BIN)/python -m pytest -n auto tests/unit

test: lint
	$(BIN)/python -m pytest -n auto --durations=12 tests/unit
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python -m pytest --durations=12 tests/cluster tests/gpu
