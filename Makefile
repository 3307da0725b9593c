# Two commands: `make pmgaft` (set up, then the main job) and `make test` (set up, then every check).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NEWEST ?= .venv-newest
OUTPUT ?= out/pmgaft
export HF_HUB_OFFLINE ?= 1

.PHONY: pmgaft test pytest test-slow test-newest lint lines benchmark clean

# torch first and by its exact version: a range would let the resolver choose a CUDA build of several gigabytes
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

pmgaft: $(VENV)/.ready
	$(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml recipes/pmgaft.py \
		--output_dir $(OUTPUT) --overwrite --compare tecoa $(ARGS)

# symilar is pylint's similarity check by itself: pylint takes minutes to read torch before it
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	found=$$($(BIN)/symilar -d 8 --ignore-docstrings --ignore-comments --ignore-signatures $$(find hf_robust_clip recipes -name '*.py')); \
		case "$$found" in *"duplicates=0 "*) ;; *) echo "$$found"; exit 1 ;; esac

# lint beside the tests, and these in two processes, a file at a time (each file's models and runs are made once)
test: $(VENV)/.ready
	$(MAKE) -j2 --output-sync=target lint pytest

pytest: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

# the fast tests in an environment of their own: the newest versions that pyproject.toml allows, torch as pinned
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install -q --no-compile -c $(NEWEST)/torch.txt torch
	$(NEWEST)/bin/pip install -q --no-compile --upgrade --upgrade-strategy eager -c $(NEWEST)/torch.txt -e '.[dev]'
	$(NEWEST)/bin/pip list | grep -iE '^(torch|transformers|accelerate|peft|datasets|huggingface_hub) '
	$(NEWEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

# lines of code of each folder, and the files that are too long
lines:
	$(PYTHON) tests/count_code.py

benchmark: $(VENV)/.ready
	$(BIN)/python tests/benchmarks/step_speed.py $(or $(ARGS),--images 16 --classes 12 62)

clean:
	rm -rf $(VENV) $(NEWEST) out
