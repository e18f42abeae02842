# Needs Python 3.11, make and PyPI; everything else is installed into $(VENV).
# `make test ARGS="-k leak"` passes ARGS to pytest.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
ON_PYTEST8 = PYTHONPATH=$(abspath $(VENV)/pytest8) $(BIN)/python -m pytest -n 3
# What touches most of pytest, in one process; everything runs on pytest 8 in `make soak`.
CORE = kinds.py
PIP := $(BIN)/python -m pip install -qq
# Rooms that need no other process and no card.
QUICK = scheduling tracking plugin test_admission.py test_house.py test_records.py test_units.py
# Those whose tests cover them alone: `make coverage` measures how far as it runs them.
COVERED = $(addprefix tests/unit/,archive forensics leases reports routing scheduling tracking cli test_admission.py test_budgets.py test_files.py test_records.py test_units.py)
PACKAGE := $(shell find pytest_gpumem -name '*.py' -o -name '*.pyi' -o -path '*/card/*' -o -name py.typed) pytest_gpumem.pth pyproject.toml README.md LICENSE

# The tests are about the built wheel: nothing may import the source tree beside it.
export PYTHONSAFEPATH = 1

.PHONY: help quick one demo test test-rest test-pytest8 lint docs coverage bench soak replay gpu-check wheel package-check clean

help:
	@echo "make quick          lint, types and the rooms that need no pytest run, for every save"
	@echo "make one ARGS=FILE  the tests of a file or a room, on the wheel as it would be now"
	@echo "make demo           the demo suite, on the GPU or on a simulated one"
	@echo "make test           all tests on pytest 9, those of the plugin's core also on pytest 8"
	@echo "make lint           ruff and mypy"
	@echo "make docs           the documentation as pages, into build/site"
	@echo "make coverage       the part of make test that measures how much of the rooms their own unit tests run"
	@echo "make bench          overhead against bare pytest, xdist, pytest-memray and pytest-monitor"
	@echo "make soak           property tests with many more examples; all of torch's operators; other packages' suites"
	@echo "make replay         the suite of 4,479 tests that ran out of memory, without and with the plugin"
	@echo "make gpu-check      the real-GPU suite; prints its figures as Markdown"
	@echo "make wheel          the wheel, into dist/"
	@echo "make package-check  build wheel and sdist, judge them, try them in empty environments"
	@echo "make clean          remove everything that make built"

demo: $(VENV)/.wheel
	@HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo.py

quick: lint
	$(BIN)/pytest -q -n 2 $(addprefix tests/unit/,$(QUICK)) $(ARGS)

one: $(VENV)/.wheel
	$(BIN)/pytest -q $(ARGS)

# Each test runs once: those of the rooms under coverage, which would slow the others' processes.
test: coverage test-rest test-pytest8

# Stealing: the slowest tests stand together, and one worker would have a quarter of all of them.
# Three workers keep two cores busy: many tests wait for processes, or for time to pass.
ON_PYTEST9 = -m pytest -n 3 --dist worksteal -m "not slow"

test-rest: $(VENV)/.wheel
	HF_HUB_OFFLINE=1 $(BIN)/python $(ON_PYTEST9) $(addprefix --ignore=,$(COVERED)) $(ARGS)

test-pytest8: $(VENV)/.wheel $(VENV)/.pytest8
	HF_HUB_OFFLINE=1 $(ON_PYTEST8) $(addprefix tests/plugin/test_,$(CORE)) -k "not n0 and not no-xdist and not n2" $(ARGS)

# With the wheel come the packages whose types mypy reads.
lint: $(VENV)/.wheel
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The variable silences a notice about another program.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Which tests ran is up to ARGS: then nothing is said of what they did not reach.
coverage: $(VENV)/.wheel
	rm -rf build/coverage
	HF_HUB_OFFLINE=1 $(BIN)/coverage run $(ON_PYTEST9) $(COVERED) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report $(if $(ARGS),--fail-under=0)

bench: $(VENV)/.wheel $(VENV)/.pytest8 $(VENV)/.peers
	$(BIN)/python scripts/bench/overhead.py --peers $(VENV)/peers --pytest8 $(VENV)/pytest8 $(ARGS)

soak: $(VENV)/.wheel $(VENV)/.pytest8 $(VENV)/.neighbours
	$(PIP) --group soak
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 -m slow $(ARGS)
	HF_HUB_OFFLINE=1 $(ON_PYTEST8) tests/plugin
	$(BIN)/pytest -n 2 --hypothesis-profile=soak tests/unit -k "not docs" $(ARGS)
	$(BIN)/python tests/soak/opinfo_campaign.py
	$(BIN)/python tests/soak/lease_kills.py
	$(BIN)/python tests/soak/command_kills.py
	$(BIN)/python tests/soak/forensic_carriers.py
	$(BIN)/python tests/soak/stopped_holders.py
	$(BIN)/python tests/soak/children.py
	$(BIN)/python tests/soak/engines.py
	$(BIN)/python tests/soak/alive.py
	$(BIN)/python tests/soak/neutrality.py --neighbours $(VENV)/neighbours --pytest8 $(VENV)/pytest8
	$(BIN)/python tests/soak/peers.py --cache $(VENV)/suites
	$(BIN)/python tests/soak/foreign_suites.py --cache $(VENV)/foreign
	$(BIN)/python tests/soak/exclusive_fixtures.py
	$(BIN)/python tests/soak/host_memory.py
	$(BIN)/python tests/soak/killed_workers.py
	$(BIN)/python tests/soak/known_suites.py
	$(BIN)/python tests/soak/budgets.py
	$(BIN)/python tests/soak/blame.py
	$(BIN)/python tests/soak/oom_handlers.py
	$(BIN)/python tests/soak/oom_handlers.py --operations --suites 4
	$(BIN)/python tests/soak/plan_against_runs.py
	$(BIN)/python tests/soak/outcomes_fuzz.py
	$(BIN)/python tests/soak/isolated_crashes.py
	$(BIN)/pytest -p no:cacheprovider tests/soak/replay.py
	$(BIN)/python tests/soak/archive_kills.py
	$(BIN)/python tests/soak/archive_faults.py
	$(BIN)/python tests/soak/sleepers_kills.py
	$(BIN)/python tests/soak/sleepers_race.py
	$(BIN)/python tests/soak/sleepers_uses.py
	$(BIN)/python tests/soak/sleepers_uses.py --compiled
	$(BIN)/python tests/soak/store_campaign.py
	$(BIN)/python tests/soak/minilm_routing.py

replay: $(VENV)/.wheel
	@HF_HUB_OFFLINE=1 $(BIN)/python scripts/replay/run.py $(ARGS)

gpu-check: $(VENV)/.wheel
	@HF_HUB_OFFLINE=1 $(BIN)/python scripts/gpu_check.py $(ARGS)

wheel: $(VENV)/.wheel

package-check: $(VENV)/.package
	$(BIN)/python scripts/check_package.py $(ARGS)

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch goes first and alone: what comes later finds it there and pulls no other build of it.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $$(grep -o 'torch==[0-9.]*' pyproject.toml)
	$(PIP) hatchling --group test --group lint
	touch $@

# The package's own dependencies come with the first install of the wheel.
$(VENV)/.wheel: $(PACKAGE) | $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PIP) --force-reinstall --no-deps dist/*.whl
	$(PIP) dist/*.whl
	touch $@

# An older pytest alone, put before the newer one by PYTHONPATH; its dependencies are the venv's.
$(VENV)/.pytest8: | $(VENV)/.ready
	$(PIP) --no-deps --target $(VENV)/pytest8 'pytest<9'
	touch $@

$(VENV)/.peers: | $(VENV)/.ready
	$(PIP) --target $(VENV)/peers --group bench
	touch $@

$(VENV)/.docs $(VENV)/.package: $(VENV)/.%: pyproject.toml | $(VENV)/.ready
	$(PIP) --group $*
	touch $@

# Beside the venv: in it, they would take part in every other test.
$(VENV)/.neighbours: pyproject.toml | $(VENV)/.ready
	$(PIP) --target $(VENV)/neighbours --group neighbours
	touch $@
