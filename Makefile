# Set-up is done by whatever target is asked for first, into .venv, and again when the project's requirements change.
# test-newest has .venv-newest: the newest torch, which has no IPEX, and torchao.
#
#   make demo         search an int8 recipe for a small CNN, save it, load it again
#   make test         the whole test suite          (make test ARGS="-m 'not slow'" for the quick part)
#   make test-newest  on the newest torch: torchao's form of SmoothQuant, the backends onednn and reference
#   make check        format, lint, types
#   make wheel-smoke  build sdist and wheel, install the wheel into a clean environment, use it outside of the repo
#
# PYTHON       the interpreter that .venv is made with
# PIP_FLAGS    further flags for every pip install
# TORCH_INDEX  index with PyTorch's CPU wheels: saves 6 GB of CUDA libraries that raysq never touches

PYTHON ?= python3.11
PIP_FLAGS ?=
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS)

NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.installed
NEWEST_PIP := $(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt $(PIP_FLAGS)
NEWEST_SUITES := $(addprefix tests/,test_smoothquant_torchao.py test_api.py test_observation.py test_quantized.py) \
	tests/kernels/test_backends.py tests/kernels/test_onednn.py

.PHONY: demo test test-newest check format wheel-smoke clean

demo: $(STAMP)
	$(BIN)/raysq demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-newest: $(NEWEST_STAMP)
	$(NEWEST)/bin/python -m pytest -m "not slow" $(NEWEST_SUITES) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel-smoke: $(STAMP)
	.ci/wheel-smoke

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --index-url "$(TORCH_INDEX)" "torch==2.8.*")
	$(PIP) -e ".[ipex,openvino,hyperopt,report,dev]"
	touch $@

$(NEWEST_STAMP): pyproject.toml constraints-newest.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(if $(TORCH_INDEX),$(NEWEST_PIP) --index-url "$(TORCH_INDEX)" "torch==2.13.*")
	$(NEWEST_PIP) -e ".[torchao]" pytest hypothesis
	touch $@
