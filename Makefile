# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest evidence check bench lab clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/freestep demo

# Many tests wait more than they compute, so there are more processes than cores. Times are measured with nothing beside.
test: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not evidence' --ignore tests/test_speed.py --numprocesses 4 --dist worksteal
	$(BIN)/python -m pytest tests/test_speed.py

evidence: $(VENV)/installed
	$(BIN)/python -m pytest tests/demo -m evidence --numprocesses auto --maxprocesses 4 --dist loadfile

# The lowest versions that pyproject.toml allows of the libraries whose inner parts are used: a folder of theirs goes
# before the environment's packages.
OLDEST := $(VENV)/oldest

$(OLDEST)/installed: $(VENV)/installed constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --target $(OLDEST) --requirement constraints-oldest.txt
	touch $@

test-oldest: $(OLDEST)/installed
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -m 'not evidence' --numprocesses 4 --dist worksteal \
		tests/test_oldest.py tests/web tests/malformed/test_http.py tests/coordination \
		tests/client/test_bulk.py tests/client/test_bulk_connections.py tests/client/test_bulk_tls.py tests/client/test_client.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -m 'not slow'

# What to measure and how is said in BENCH: make bench BENCH='--quick --plot cost.png'.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(BENCH)

# Which experiments and how is said in LAB: make lab LAB='convex --quick'.
lab: $(VENV)/installed
	$(BIN)/python -m examples.lab $(LAB)

clean:
	rm -rf $(VENV) build dist demo-out lab-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
