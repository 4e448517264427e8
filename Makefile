# Each target does all of its own set-up, in a virtual environment inside the clone: `make demo` and `make check` are all it takes.
PYTHON ?= python3
PYTHON310 ?= python3.10
VENV ?= .venv
KIT ?= out/gpu-kit
DEMO ?= out/demo
BIN := $(VENV)/bin

.PHONY: demo check lint test wheel device-check gpu-check gpu-prepare clean baseline

## Install, then build the demonstration model at three quarters of its resolution in INT8 and print the table.
demo: $(VENV)/.ready-demo
	$(BIN)/python -m examples.images $(DEMO)/images
	$(BIN)/rdeploy build examples.efficientnet_lite:efficientnet_lite0 --scale 0.75 --int8 \
		--calib $(DEMO)/images/calib --data $(DEMO)/images/labelled.csv --target rtx-40 --out $(DEMO)

## Make the demonstration's counts and ratios the baseline that CI compares with; after a change that is meant.
baseline: demo
	$(BIN)/rdeploy check $(DEMO)/efficientnet_lite0-r168-int8 --write-baseline benchmarks/baselines/demo.json --launches 0

## Install, then everything that CI checks.
check: lint test

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -n auto --dist worksteal

## Build the sdist and the wheel into dist/ and check their metadata.
wheel: $(VENV)/.ready-test
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

## What a device has: a Python 3.10 with the base install, fakes of TensorRT and CUDA, and nothing of the model side.
device-check: $(VENV)/.ready-test
	test -x $(VENV)-device/bin/python || $(PYTHON310) -m venv $(VENV)-device
	$(VENV)-device/bin/python -m pip install --quiet --disable-pip-version-check .
	RDEPLOY_DEVICE_PYTHON=$(abspath $(VENV)-device/bin/python) $(BIN)/python -m pytest -q tests/worker/test_device.py

## What gpu-check needs on a GPU host without package access, in KIT=FOLDER: its graphs, TensorRT 8.6.0 with a Python; in parts.
gpu-prepare: $(VENV)/.ready-gpu-check
	mkdir -p $(KIT)
	PYTHONPATH=. $(BIN)/python benchmarks/gpu_check.py --prepare $(KIT)
	ls $(KIT)/kit.tar.xz.000 >/dev/null 2>&1 || $(PYTHON310) benchmarks/gpu_kit.py pack $(KIT)
	$(BIN)/python benchmarks/gpu_kit.py cut $(KIT)

## Everything that only a machine with an NVIDIA GPU can show; WHEELS=FOLDER is what was brought where there is no package access.
gpu-check: $(if $(WHEELS),,$(VENV)/.ready-gpu-check)
	PYTHONPATH=. $(if $(WHEELS),$(PYTHON),$(BIN)/python) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-device dist out .rdeploy-cache .pytest_cache .mypy_cache .ruff_cache

# foolbox is here for the 20 labelled photographs in its wheel: none of its dependencies is needed.
$(VENV)/.ready-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps foolbox==3.3.4
	touch $@
