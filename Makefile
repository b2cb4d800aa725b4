# `make demo` and `make test` work on a fresh machine that has make and Python >= 3.11: they build .venv themselves.
PYTHON ?= python3
CONSTRAINTS := constraints.txt
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
# The last three are of words that training saw only apart, and of a style that it never saw of that emoji.
PROMPTS := "red apple, flat style" "sun with face" "fire engine" "four-thirty" "evergreen tree" "butterfly" "purple heart" "pig face" "kiwi fruit, blob style"
CODE := setup.py src examples research tests
export HF_HUB_DISABLE_TELEMETRY := 1

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test test-oldest lint format docs space dist clean

demo: $(VENV)/.train
	$(PY) examples/generate.py --model model_cards/dualrate-emoji64 --compare model_cards/dualrate-emoji64 --distilled model_cards/dualrate-emoji64-distilled --prompt $(PROMPTS) --output demo.png

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# The same suite on the oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: $(VENV)/.dev
	$(PY) -m ruff check $(CODE) && $(PY) -m ruff format --check $(CODE) && $(PY) -m mypy

format: $(VENV)/.dev
	$(PY) -m ruff check --fix $(CODE) && $(PY) -m ruff format $(CODE)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "build/docs/index.html"

# The page of examples/app.py as a Hugging Face Space: it holds package and models, so that it needs neither from elsewhere.
SPACE := build/space
space:
	rm -rf $(SPACE) && mkdir -p $(SPACE) && cp -R examples/space/. examples/app.py src/diffusers_dualrate model_cards $(SPACE)
	find $(SPACE) -name __pycache__ -prune -exec rm -rf {} +
	@echo "$(SPACE)"

dist: $(VENV)/.dev
	rm -rf dist && $(PY) -m build --no-isolation --outdir dist && $(PY) -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-oldest build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache demo.png && find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# Each stamp is written last, so an interrupted step runs again. torch goes first and alone, at its pinned version.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "diffusers-dualrate needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created $(CONSTRAINTS)
	$(INSTALL) torch
	@touch $@

$(VENV)/.train $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml src/diffusers_dualrate/__init__.py
	$(INSTALL) -e '.[$*]'
	@touch $@
