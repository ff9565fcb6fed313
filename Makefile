# Everything runs in .venv, made on first use from pyproject.toml.
PYTHON ?= python3
# as in pyproject.toml
SUPPORTED := 3.11 3.12 3.13 3.14
PYTHONS ?= $(SUPPORTED)
# the newest torch that the tests ran with; mmref itself takes later ones, as `make setup TORCH=torch` does
TORCH ?= torch<2.14
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.tested

.PHONY: help setup demo serve test test-unit test-slow test-pythons lint format docs sweep chaos clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(TESTED)  ## create .venv and install mmref with what its tests need

# the CPU communication of DeepSpeed is compiled here once, not in the first minute of the first run
$(READY): pyproject.toml
	@found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null); \
	case " $(SUPPORTED) " in *" $${found:-none} "*) ;; *) \
		echo "mmref: $(PYTHON) is $${found:+Python }$${found:-no Python that runs here}; mmref runs on Python" \
			"$$(echo $(SUPPORTED) | sed 's/ /, /g'). Name one that is installed: make setup PYTHON=python3.12" >&2; \
		exit 1 ;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[tune,replicas,lora,hub]" "$(TORCH)"
	$(BIN)/python -m mmref.train.build_ops
	touch $(READY)

# the demo does without
$(TESTED): $(READY)
	$(BIN)/pip install --quiet -e ".[dev]" "$(TORCH)"
	touch $(TESTED)

demo: $(READY)  ## train on the bundled data, evaluate, print the table, write runs/demo/report.html
	$(BIN)/python jobs/demo.py

# options of mmref serve: make serve SERVE="--port 9000"
serve: $(READY) runs/demo-index/manifest.json  ## search the bundled images with the demo's model, on a page in your browser
	$(BIN)/mmref serve runs/demo-index $(SERVE)

# the index of a demo that was trained again is made again
runs/demo-index/manifest.json: runs/demo/metrics.json
	rm -rf runs/demo-index runs/demo-index.partial
	$(BIN)/mmref index data_shards/emoji --model runs/demo --out runs/demo-index --workers 0

# order-only: a newer .venv is no reason to train again
runs/demo/metrics.json: | $(READY)
	$(BIN)/python jobs/demo.py

test: test-unit  ## all but the slow tests
	$(BIN)/python -m pytest -m "not slow and ray"

# a process a core; tests of a module share what its fixtures build
test-unit: setup  ## the tests that start no Ray
	$(BIN)/python -m pytest -m "not slow and not ray" -n auto --dist loadscope

test-slow: setup  ## the slow tests: failures, sweeps, many workers
	$(BIN)/python -m pytest -m slow

# of some Pythons, some tests: make test-pythons PYTHONS="3.12 3.13" TESTS="tests/losses tests/data"
test-pythons:  ## set-up and the tests that start no Ray on each supported Python that is installed, in .venv-VERSION
	@PYTHONS="$(PYTHONS)" TESTS="$(TESTS)" tests/pythons.sh

lint: setup  ## what .pre-commit-config.yaml holds, on every file: ruff, mypy, the floors (import-linter)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy mmref jobs tune data_shards
	$(BIN)/lint-imports

format: setup  ## let ruff lay out the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/.docs  ## the documentation as a site in build/site; a broken link or anchor is an error
	$(BIN)/python docs/stage.py build/docs
	$(BIN)/zensical build --strict

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

sweep: setup  ## a small sweep on the bundled data (or the rest of one), its best config against the default on test, into runs/sweep/
	if [ -e runs/sweep/trials.jsonl ]; then $(BIN)/python tune/sweep.py --resume runs/sweep; else \
		$(BIN)/python tune/sweep.py --space tune/spaces/default.yaml --config configs/smoke.yaml --trials 8 \
		--run_dir runs/sweep --train.max_steps 400 --train.eval_every 50 --train.log_every 50; fi

chaos: setup  ## kill workers, nodes, drivers and disks of a small run; the table of what it cost into runs/chaos/
	$(BIN)/python benchmarks/chaos.py --out runs/chaos/chaos.json

clean:  ## remove .venv, .venv-VERSION, runs/ and caches
	rm -rf $(VENV) .venv-* runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
