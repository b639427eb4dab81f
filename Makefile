PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
JOBS ?= 2
ENGINES ?= 5
ARGS ?=
bin = $(VENV)/bin
gpu_tests = $(shell grep -l 'mark.gpu' tests/test_*.py)

.PHONY: env lint test test-gpu test-gpu-kernels test-gpu-engines test-gpu-alone demo bench plots docs clean

test: lint  ## everything that runs without a GPU, in an environment of its own
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(bin)/python -m pytest -m 'not gpu' -n $(JOBS) --dist loadfile $(ARGS)

lint: env
	$(bin)/ruff check lmdeploy_kvq scripts tests
	$(bin)/mypy
	$(bin)/lint-imports

env:
	@PYTHON=$(PYTHON) scripts/cpu_env.sh $(VENV)

test-gpu: test-gpu-kernels test-gpu-engines  ## the GPU half, with the Python that has torch, LMDeploy and this package

test-gpu-kernels:
	$(PYTHON) -m pytest -n $(JOBS) tests/test_fill.py tests/test_flatten.py tests/test_decode.py tests/test_division.py \
		tests/test_shares.py tests/test_merge.py tests/test_prefill.py tests/test_prefill_gpu.py tests/test_saturation.py \
		tests/test_loading.py -k 'not alone' $(ARGS)

test-gpu-engines:  ## real engines: half an hour on 16 cores
	$(PYTHON) -m pytest -n $(ENGINES) --dist loadgroup $(gpu_tests) -m gpu -k 'not alone' $(ARGS)

test-gpu-alone:  ## what needs the GPU to itself: the server under load, memory, compute-sanitizer; twenty minutes
	$(PYTHON) -m pytest $(gpu_tests) -m gpu -k alone $(ARGS)

demo:  ## a real server where there is a GPU, else the same model and prompt through transformers
	@if $(PYTHON) -c 'import torch, lmdeploy, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then set -x; $(PYTHON) scripts/demo.py; \
	else set -x; $(MAKE) --no-print-directory env && $(bin)/python scripts/demo.py; fi

bench:  ## every speed that README and docs state, on one GPU: about twelve minutes
	$(PYTHON) scripts/bench_decode.py --preset all
	$(PYTHON) scripts/bench_fill.py
	$(PYTHON) scripts/bench_layer.py
	$(PYTHON) scripts/bench_prefill.py
	$(PYTHON) scripts/bench_engine.py

plots:  ## benchmarks/*.svg and the tables of README and docs, from benchmarks/results/*.json
	$(PYTHON) scripts/plots.py
	$(PYTHON) scripts/readme.py

docs: $(DOCS_VENV)/.stamp  ## site/, in an environment of its own; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet  # the variable silences a notice of the theme
	@echo 'open site/index.html, or run $(DOCS_VENV)/bin/mkdocs serve'

$(DOCS_VENV)/.stamp: setup.cfg scripts/extras.py
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(PYTHON) scripts/extras.py docs >$(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check -r $(DOCS_VENV)/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
