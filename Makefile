# Two commands: `make demo` shows what the library does, `make test` checks it. Each sets itself up on a bare machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench ablation train clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision timm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/tokenmerge demo

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	scripts/check

bench: .venv/ready
	$(BIN)/python benchmarks/cpu_overhead.py

ablation: .venv/ready
	$(BIN)/python benchmarks/ablation.py

train: .venv/ready
	$(BIN)/python recipes/train_reference.py

clean:
	rm -rf .venv tokenmerge-demo .mypy_cache .ruff_cache .pytest_cache
