# make demo: train a small model on the built-in corpus and read its stories (about 3 minutes).
# make test: lint, types and all tests (about 25 minutes on two CPU cores).
# make test-fast: the tests that need no compiler, no browser and few processes (under 2 minutes).
# make lint: format, lint and types alone.
# make docs: the documentation's site, in build/docs/site.
# make sbom: the packages that storylab is installed with here, as a CycloneDX bill of materials.
# All make a virtual environment in .venv first; PYTHON and VENV choose others, WORKERS says how
# many tests run at once (0: one, in this process).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = demo-run

WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS)

.PHONY: demo docs lint test test-fast sbom clean

demo: $(BIN)/.storylab
	rm -rf $(DEMO)
	$(BIN)/storylab prepare --source builtin --tokenizer bpe:1024 --out $(DEMO)/data
	$(BIN)/storylab train --preset nano --data_dir $(DEMO)/data --out_dir $(DEMO)/run \
	  --max_iters 1200 --batch_size 16 --gradient_accumulation_steps 1 --learning_rate 3e-3 \
	  --min_lr 0 --warmup_iters 50 --eval_interval 300 --eval_iters 5
	@echo && echo "More stories by the same model (storylab sample $(DEMO)/run --samples 2):" && echo
	$(BIN)/storylab sample $(DEMO)/run --samples 2 --seed 1 --prompt "Once upon a time"

lint: $(BIN)/.storylab-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST)

test-fast: $(BIN)/.storylab-test
	$(PYTEST) -m "not slow"

docs: $(BIN)/.storylab-docs
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_site.py

# In an environment of its own, so that its packages are not in the bill.
sbom: $(BIN)/.storylab
	$(PYTHON) -m venv $(VENV)/sbom
	$(VENV)/sbom/bin/python -m pip install --quiet cyclonedx-bom
	$(VENV)/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-format JSON --output-file sbom.cdx.json $(BIN)/python

clean:
	rm -rf $(VENV) $(DEMO) build sbom.cdx.json

# A Python that has torch already (a CUDA build, say) keeps it: the environment sees it, and the
# pin on torch is left out.
$(BIN)/python:
	$(PYTHON) -m venv \
	  $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)

# The low-precision tests compare with these; their own requirements are for GPUs.
ORACLES = torchao transformer-engine

define install
	if $(BIN)/python -c "import torch" 2>/dev/null; then \
	  grep -v '^torch==' constraints.txt > $(VENV)/pins.txt; \
	else cp constraints.txt $(VENV)/pins.txt; fi
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/pins.txt --editable '$(1)'
	touch $@
endef

$(BIN)/.storylab: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.)

$(BIN)/.storylab-docs: pyproject.toml constraints.txt $(BIN)/.storylab
	$(call install,.[docs])

$(BIN)/.storylab-test: pyproject.toml constraints.txt $(BIN)/.storylab
	$(call install,.[test])
	$(BIN)/python -m pip install --quiet --no-deps --constraint $(VENV)/pins.txt $(ORACLES) \
	  || echo "without $(ORACLES): the tests against them are skipped"
	touch $@
