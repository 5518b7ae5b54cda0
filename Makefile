# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Processes of the tests start by the hundred, and load bytecode that is there: `make clean` removes it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo screenshots test test-oldest evidence check chart pods docs reference pictures fuzz chaos audit sbom bench scale lab clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/freestep demo

# The pictures of docs/dashboard.md, taken with Debian's chromium of a run that trains meanwhile.
screenshots: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m dashboard docs/dashboard

# Many tests wait more than they compute, so there are more processes than cores. Times are measured with nothing beside.
test: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not evidence' --ignore tests/test_speed.py --numprocesses 4 --dist worksteal
	$(BIN)/python -m pytest tests/test_speed.py

evidence: $(VENV)/installed
	$(BIN)/python -m pytest tests/demo -m evidence --numprocesses auto --maxprocesses 4 --dist loadfile

# The lowest versions that pyproject.toml allows of the libraries whose inner parts are used, and of those that
# start a service by its command: a folder of theirs goes before the environment's packages.
OLDEST := $(VENV)/oldest

$(OLDEST)/installed: $(VENV)/installed constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --target $(OLDEST) --requirement constraints-oldest.txt
	touch $@

# Which of the tests, as an expression of markers.
OLDEST_TESTS ?= not evidence

test-oldest: $(OLDEST)/installed
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -m '$(OLDEST_TESTS)' --numprocesses 4 --dist worksteal \
		tests/test_oldest.py tests/web tests/edge tests/malformed/test_http.py tests/coordination \
		tests/client/test_bulk.py tests/client/test_bulk_connections.py tests/client/test_bulk_tls.py tests/client/test_client.py \
		tests/client/test_cli.py \
		tests/optimizers/test_compiled.py tests/optimizers/test_fused.py tests/optimizers/test_machine_code.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -m 'not slow'

# The Helm chart: a real Helm and Kubernetes' schemas, hundreds of megabytes that nothing else needs, in a folder before the
# environment's packages, and Checkov in an environment of its own. What cannot be installed has its tests skipped, and is
# tried again the next time.
CHART := $(VENV)/chart
POLICIES := $(VENV)/policies

$(CHART)/installed: $(VENV)/installed docker/requirements.py
	rm -rf $(CHART)
	mkdir -p $(CHART)
	$(PYTHON) docker/requirements.py chart >$(CHART)/requirements.txt
	$(BIN)/python -m pip install --quiet --target $(CHART) --requirement $(CHART)/requirements.txt \
		&& touch $@ || echo 'Helm cannot be installed here'

$(POLICIES)/installed: pyproject.toml docker/requirements.py
	$(PYTHON) -m venv $(POLICIES)
	$(PYTHON) docker/requirements.py policies >$(POLICIES)/requirements.txt
	$(POLICIES)/bin/python -m pip install --quiet --requirement $(POLICIES)/requirements.txt \
		&& touch $@ || echo 'Checkov cannot be installed here'

chart: $(CHART)/installed $(POLICIES)/installed
	PYTHONPATH=$(CURDIR)/$(CHART) $(BIN)/python -m pytest tests/chart

# What the chart renders, as containers of podman's: see docs/development.md.
pods: $(CHART)/installed
	PYTHONPATH=$(CURDIR)/$(CHART) $(BIN)/python -m pytest tests/pods

# The documents as a site, in build/docs/site; what is wrong with them ends it. Pages in docs/reference are made of the
# code, and pictures of the concepts are computed.
docs: $(VENV)/installed
	$(BIN)/python -m documents reference
	$(BIN)/python -m documents site

reference: $(VENV)/installed
	$(BIN)/python -m documents reference

pictures: $(VENV)/installed
	$(BIN)/python -m documents pictures

# The targets in tests/fuzz (all, unless FUZZ names some), so many seconds for each; what they find is kept in a folder.
FUZZ ?=
FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= fuzz-corpus

$(VENV)/fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,fuzz]' \
		&& touch $@ || echo 'atheris cannot be installed here'

fuzz: $(VENV)/fuzz
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) --corpus $(FUZZ_CORPUS) $(FUZZ)

# Schedules of faults over services, stores and workers, by seed: see docs/chaos.md.
SEEDS ?= 40
FIRST ?= 0

chaos: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m chaos --seeds $(SEEDS) --first $(FIRST) $(CHAOS)

# Programs that look at environments have one of their own, so that theirs is none of what they see.
TOOLS := $(VENV)/tools

$(TOOLS)/installed: pyproject.toml docker/requirements.py
	$(PYTHON) -m venv $(TOOLS)
	$(PYTHON) docker/requirements.py audit sbom >$(TOOLS)/requirements.txt
	$(TOOLS)/bin/python -m pip install --quiet --requirement $(TOOLS)/requirements.txt
	touch $@

# Known vulnerabilities of what is installed here, where the package index has advisories. AUDIT has options of pip-audit.
audit: $(VENV)/installed $(TOOLS)/installed
	$(TOOLS)/bin/python .ci/audit.py $(BIN)/python $(AUDIT)

# What a service consists of, as CycloneDX: of an environment that has nothing else.
sbom: $(TOOLS)/installed
	$(PYTHON) -m venv --clear $(TOOLS)/service
	$(TOOLS)/service/bin/python -m pip install --quiet --constraint constraints.txt '.[service]'
	$(TOOLS)/service/bin/python -m pip uninstall --quiet --yes pip setuptools
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --output-file sbom.cdx.json $(TOOLS)/service/bin/python

# What to measure and how is said in BENCH: make bench BENCH='--quick --plot cost.png'.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(BENCH)

# Throughput on this machine, and simulations beyond it: docs/scale.md. SCALE=--simulate takes what was measured before.
scale: $(VENV)/installed
	$(BIN)/python -m benchmarks.scale $(SCALE)

# Which experiments and how is said in LAB: make lab LAB='convex --quick'.
lab: $(VENV)/installed
	$(BIN)/python -m examples.lab $(LAB)

clean:
	rm -rf $(VENV) build dist sbom.cdx.json demo-out lab-out race-out scale-out fuzz-corpus
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
