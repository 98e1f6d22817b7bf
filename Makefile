# Two commands: `make demo` shows what the library does, `make test` checks it. Each sets itself up on a bare machine.
PYTHON ?= python3
BIN := .venv/bin

PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick check pictures asan bench ablation auto tune zoo real train training support hosts s3 latest docs wheel wheels clean

# what an editable install builds or writes down; the rest of the package is used from where it is
INSTALLED := pyproject.toml hatch_build.py src/tokenmerge/kernels/native.cpp

.venv/ready: $(INSTALLED) constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/tokenmerge demo

# what the tests of pages need besides a browser (Debian: apt-get install chromium); they skip, with the reason, what is not there
.axe/package/axe.min.js:
	mkdir -p .axe && cd .axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz

test: .venv/ready
	-test -e .axe/package/axe.min.js || $(MAKE) .axe/package/axe.min.js
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# a contributor's loop: the core by itself, three families with three methods, and what they look like from outside
QUICK := $(addprefix tests/test_,api.py config.py face.py files.py functional.py golden.py keybias.py matching.py \
  plan.py restore.py rooms.py schedule.py) tests/conformance/test_methods.py \
  $(foreach family,timm_vit hf_vit torch_encoder,$(foreach method,tome tofu evit,\
  "tests/conformance/test_pairs.py::test_a_method_in_a_family[$(family)-$(method)]"))
quick: .venv/ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(QUICK)

check: .venv/ready
	scripts/check

# the pictures of the README and the docs: make pictures WEIGHTS=clip_vitb16.safetensors PHOTOGRAPHS=folder_of_class_folders
pictures: .venv/ready
	$(BIN)/python scripts/pictures.py $(WEIGHTS) $(if $(PHOTOGRAPHS),--photographs $(PHOTOGRAPHS))

# the part in C++ under AddressSanitizer and UBSan
asan: .venv/ready
	scripts/asan

bench: .venv/ready
	$(BIN)/python benchmarks/run.py

ablation: .venv/ready
	$(BIN)/python benchmarks/ablation.py

auto: .venv/ready
	$(BIN)/python benchmarks/auto.py

tune: .venv/ready
	for part in small speed drop killed cost; do $(BIN)/python benchmarks/tune.py $$part || exit 1; done

zoo: .venv/ready
	$(BIN)/python benchmarks/zoo.py

# real weights and photographs, which are no part of the package; what is not given is skipped:
# make real CLIP=clip_vitb16.safetensors PHOTOGRAPHS="DIR..." BACKBONE=vits14.safetensors DECODER=decoder.safetensors \
#   WHISPER=FOLDER RECORDINGS=FOLDER
real: .venv/ready
	@test -n "$(CLIP)" || echo "skipped: the CLIP tower (CLIP=FILE.safetensors PHOTOGRAPHS='DIR...', DIR/CLASS/*.jpg)"
	@test -n "$(BACKBONE)" || echo "skipped: the dense model (BACKBONE= and DECODER=FILE.safetensors PHOTOGRAPHS='DIR...')"
	@test -n "$(WHISPER)" || echo "skipped: speech (WHISPER=FOLDER RECORDINGS=FOLDER of DIGIT_SPEAKER_TAKE.wav)"
	for part in $(if $(CLIP),front images ablation speed); do \
	  $(BIN)/python benchmarks/real.py $$part --weights $(CLIP) --photographs $(PHOTOGRAPHS) || exit 1; done
	for part in $(if $(CLIP),accuracy speed); do \
	  $(BIN)/python benchmarks/stacking.py $$part --weights $(CLIP) --photographs $(PHOTOGRAPHS) || exit 1; done
	for part in images video; do $(BIN)/python benchmarks/equal_accuracy.py $$part || exit 1; done
	$(if $(BACKBONE),$(BIN)/python benchmarks/real_dense.py --backbone $(BACKBONE) --decoder $(DECODER) --photographs $(PHOTOGRAPHS))
	$(if $(WHISPER),$(BIN)/python benchmarks/real_speech.py --model $(WHISPER) --recordings $(RECORDINGS))

train: .venv/ready
	$(BIN)/python recipes/train_reference.py

# training with merging against merging afterwards; cut off, it goes on
training: .venv/ready
	for study in scratch finetune combine mae video audio; do $(BIN)/python benchmarks/training.py $$study || exit 1; done
	$(BIN)/python benchmarks/clip_groups.py

# the page of supported models, from the results of the tests that support them
support: .venv/ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/adapters tests/vlm/test_packed_towers.py \
	  tests/conformance/test_timm_registry.py tests/conformance/test_transformers_registry.py --support docs/support.md

# the same promises on the oldest host versions that are supported, in an environment of their own
OLD := .venv-hosts/bin
.venv-hosts/ready: $(INSTALLED)
	$(PYTHON) -m venv .venv-hosts
	$(OLD)/python $(PIP) torch torchvision timm==1.0.16 "transformers==4.57.*"
	$(OLD)/python $(PIP) --editable ".[viz,cli]" pytest pytest-timeout pytest-xdist
	touch $@

hosts: .venv-hosts/ready
	$(OLD)/python -m pytest --numprocesses auto --dist worksteal tests/adapters tests/vlm \
	  tests/conformance/test_timm_registry.py

# the whole suite on the newest of everything, in an environment of its own: what the next constraints.txt has to pass
NEW := .venv-latest/bin
latest:
	$(PYTHON) -m venv .venv-latest
	$(NEW)/python $(PIP) --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(NEW)/python -m pip freeze --exclude-editable
	$(NEW)/python -m pytest --numprocesses auto --dist worksteal

# a bucket as a source, on a server of this machine: its libraries want older ones than others do
BUCKET := .venv-s3/bin
.venv-s3/ready: $(INSTALLED)
	$(PYTHON) -m venv .venv-s3
	$(BUCKET)/python $(PIP) --editable ".[embed]" "moto[server]" s3fs pytest pytest-timeout
	touch $@

s3: .venv-s3/ready
	$(BUCKET)/python -m pytest tests/batch/test_s3.py

# the site, into site/: made from the Markdown and the docstrings, without torch; only what the extra `docs` names is installed
DOC := .venv-docs/bin
.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOC)/python $(PIP) --constraint constraints.txt $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr , ' ')
	touch $@

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOC)/python -m mkdocs build --strict

# the wheel of this machine, into dist/, and that it works where there is no compiler
wheel: .venv/ready
	scripts/wheel

# the wheels that are given away, by cibuildwheel, into dist/; on Linux it needs a container engine
wheels:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP) cibuildwheel==4.3.5
	.venv-wheel/bin/python -m cibuildwheel --output-dir dist

clean:
	rm -rf .axe .venv .venv-hosts .venv-latest .venv-docs .venv-s3 .venv-wheel site dist tokenmerge-demo .mypy_cache .ruff_cache .pytest_cache
