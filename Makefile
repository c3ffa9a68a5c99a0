# make demo   set everything up and run the main job: synthetic speech -> packs -> ZeRO-2 training -> WER
# make test   set everything up and pass the tests
# make torture ARGS="--seconds 3600 --seed 7"   the tests' full counts; goes on where it was
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv
# uv does not read pip's configuration: hand it the machine's own directories of wheels, where it has any.
export UV_FIND_LINKS ?= $(shell ( echo "$$PIP_FIND_LINKS"; $(PYTHON) -m pip config get global.find-links;\
  $(PYTHON) -m pip config get install.find-links ) 2>/dev/null | tr -s " \n" "," | sed "s/^,//; s/,$$//")
# PyTorch's CPU build on a machine without a GPU saves gigabytes: UV_TORCH_BACKEND=cpu make demo

.PHONY: setup demo test torture lint pip-set clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	test -x $(UV) || $(VENV)/bin/python -m pip install --quiet "uv>=0.9,<1"
	$(UV) pip install --quiet --python $(VENV)/bin/python --editable '.[beam,demo,tensorboard,test]'
	touch $@

demo: setup
	$(VENV)/bin/speechctl pack recipes/demo.yaml
	@if [ -e runs/demo ]; then $(VENV)/bin/speechctl resume runs/demo; \
	else $(VENV)/bin/speechctl launch recipes/demo.yaml; fi
	@echo "  (after: . $(VENV)/bin/activate)"

lint: setup
	$(VENV)/bin/ruff check launcher tests
	$(VENV)/bin/ruff format --check launcher tests
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

torture: setup
	$(VENV)/bin/python -m tests.torture $(ARGS)

# The quick tests on what plain `pip install .` resolves to (transformers 4.57, torchvision present).
pip-set:
	tests/pip_set.sh

clean:
	rm -rf $(VENV)
