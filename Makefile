# Set-up is done by whatever target is asked for first, into .venv, and again when the project's requirements change.
# test-newest has .venv-newest: the newest torch, which has no IPEX, and torchao.
#
#   make demo         search an int8 recipe for a small CNN, save it, load it again
#   make test         the whole test suite          (make test ARGS="-m 'not slow'" for the quick part)
#   make test-newest  on the newest torch: torchao's form of SmoothQuant, the backends onednn and reference
#   make coverage     branch coverage of the quick part; what runs in Ray's workers isn't seen
#   make check        format, lint, types
#   make mutants      what tests would notice: mutmut's changes to the code, hours (make mutants ARGS="raysq.betting*")
#   make docs         the site, build/docs/index.html: without network, every link checked
#   make bench        all of benchmarks/, whose tables it writes into README and docs: for a quiet machine, and hours
#   make wheel-smoke  build sdist and wheel; use the wheel outside of the repo, without and with each extra, both torches
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

# script in benchmarks/ and the page that its tables are in
BENCHMARKS := workload_table:README.md approaches:docs/approaches.md smoothquant_table:docs/smoothquant.md \
	strategies:docs/strategies.md peers:docs/peers.md limit:docs/peers.md overhead:docs/overhead.md \
	early_rejection:docs/early-rejection.md scaling:docs/scaling.md dashboard_cost:docs/dashboard.md \
	tools_cost:docs/tools.md coverage_table:docs/coverage.md chaos:docs/faults.md \
	long_run:docs/large.md large:docs/large.md

.PHONY: demo test test-newest coverage check mutants docs bench format wheel-smoke clean

demo: $(STAMP)
	$(BIN)/raysq demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-newest: $(NEWEST_STAMP)
	$(NEWEST)/bin/python -m pytest -m "not slow" $(NEWEST_SUITES) $(ARGS)

coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(STAMP)
	$(PIP) "mutmut>=3.8,<4"
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run $(ARGS)

docs: $(STAMP)
	$(BIN)/sphinx-build --quiet --fail-on-warning -c docs -d build/.doctrees . build/docs
	@echo "build/docs/index.html"

bench: $(STAMP)
	set -e; for pair in $(BENCHMARKS); do $(BIN)/python benchmarks/$${pair%:*}.py --docs $${pair#*:}; done

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel-smoke: $(STAMP) $(NEWEST_STAMP)
	$(BIN)/python .ci/wheel_smoke.py
	$(NEWEST)/bin/python .ci/wheel_smoke.py

clean:
	rm -rf build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --index-url "$(TORCH_INDEX)" "torch==2.8.*")
	$(PIP) -e ".[ipex,openvino,hyperopt,report,cluster,s3,tensorboard,mlflow,wandb,optuna,docs,dev]"
	touch $@

$(NEWEST_STAMP): pyproject.toml constraints-newest.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(if $(TORCH_INDEX),$(NEWEST_PIP) --index-url "$(TORCH_INDEX)" "torch==2.13.*")
	$(NEWEST_PIP) -e ".[torchao]" build pytest hypothesis
	touch $@
