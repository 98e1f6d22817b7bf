# Two commands: `make demo` shows what the library does, `make test` checks it. Each sets itself up on a bare machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check asan bench ablation auto zoo train training support hosts clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision timm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/tokenmerge demo

test: .venv/ready
	$(BIN)/python -m pytest --numprocesses auto

check: .venv/ready
	scripts/check

# the part in C++ under AddressSanitizer and UBSan
asan: .venv/ready
	scripts/asan

bench: .venv/ready
	$(BIN)/python benchmarks/run.py

ablation: .venv/ready
	$(BIN)/python benchmarks/ablation.py

auto: .venv/ready
	$(BIN)/python benchmarks/auto.py

zoo: .venv/ready
	$(BIN)/python benchmarks/zoo.py

train: .venv/ready
	$(BIN)/python recipes/train_reference.py

# training with merging against merging afterwards; cut off, it goes on
training: .venv/ready
	for study in scratch finetune combine mae video audio; do $(BIN)/python benchmarks/training.py $$study || exit 1; done
	$(BIN)/python benchmarks/clip_groups.py

# the page of supported models, from the results of the tests that support them
support: .venv/ready
	$(BIN)/python -m pytest tests/adapters tests/conformance/test_timm_registry.py --support docs/support.md

# the same promises on the oldest host versions that are supported, in an environment of their own
OLD := .venv-hosts/bin
.venv-hosts/ready: pyproject.toml
	$(PYTHON) -m venv .venv-hosts
	$(OLD)/python -m pip install --quiet --disable-pip-version-check torch torchvision timm==1.0.16 "transformers==4.57.*"
	$(OLD)/python -m pip install --quiet --disable-pip-version-check --editable ".[viz,cli]" pytest pytest-timeout pytest-xdist
	touch $@

hosts: .venv-hosts/ready
	$(OLD)/python -m pytest --numprocesses auto tests/adapters tests/conformance/test_timm_registry.py

clean:
	rm -rf .venv .venv-hosts tokenmerge-demo .mypy_cache .ruff_cache .pytest_cache
