# Two commands: `make pmgaft` (set up, then the main job) and `make test` (set up, then every check).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NEWEST ?= .venv-newest
DEMO ?= .venv-demo
OUTPUT ?= out/pmgaft
export HF_HUB_OFFLINE ?= 1
# where it is set, each of the many processes that tests start would compile torch and transformers again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: pmgaft test pytest test-slow test-newest test-browser demo demo-picture lint lines benchmark clean

# torch first and by its exact version: a range would let the resolver choose a CUDA build of several gigabytes
# the rest by uv, in half the time; by pip where packages come from an index that only pip's configuration names
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
		$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

pmgaft: $(VENV)/.ready
	$(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml recipes/pmgaft.py \
		--output_dir $(OUTPUT) --overwrite --compare tecoa $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/duplicates.py hf_robust_clip recipes

# lint beside the tests, and these in two processes, a file at a time (each file's models and runs are made once)
test: $(VENV)/.ready
	$(MAKE) -j2 --output-sync=target lint pytest

pytest: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow and not browser" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

# the fast tests in an environment of their own: the newest versions that pyproject.toml allows, torch as pinned
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install -q --no-compile -c $(NEWEST)/torch.txt torch
	$(NEWEST)/bin/pip install -q --no-compile --upgrade --upgrade-strategy eager -c $(NEWEST)/torch.txt -e '.[dev]'
	$(NEWEST)/bin/pip list | grep -iE '^(torch|transformers|accelerate|peft|datasets|huggingface_hub) '
	$(NEWEST)/bin/python -m pytest -m "not slow and not browser" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# the page in an environment of its own, since gradio asks for an older pillow and tomlkit than the rest is tested with
$(DEMO)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	grep -vE '^(pillow|tomlkit)==' constraints.txt > $(DEMO)/constraints.txt
	$(DEMO)/bin/pip install -q --no-compile -c $(DEMO)/constraints.txt torch
	$(DEMO)/bin/pip install -q --no-compile -c $(DEMO)/constraints.txt -e '.[demo]' pytest selenium
	touch $@

# serves the page: the model of `make pmgaft` beside the undefended one if it is there, else the latter with a defence
demo: $(DEMO)/.ready
	$(DEMO)/bin/hf-robust-clip demo --reference digits-clip $(if $(wildcard $(OUTPUT)/config.json),\
		--model_name_or_path $(OUTPUT),--defence RTPT --radius 24/255) $(ARGS)

# the picture of the page in recipes/README.md
demo-picture: $(DEMO)/.ready
	$(DEMO)/bin/python tests/demo/screenshot.py $(OUTPUT) recipes/demo.png $(ARGS)

# clicks through the page in a browser without a window, which comes with the system's packages
test-browser: $(DEMO)/.ready
	command -v chromedriver > /dev/null || (apt-get update -q && apt-get install -y -q chromium chromium-driver)
	$(DEMO)/bin/python -m pytest tests/demo $(ARGS)

# lines of code of each folder, and the files that are too long
lines:
	$(PYTHON) tests/count_code.py

benchmark: $(VENV)/.ready
	$(BIN)/python tests/benchmarks/step_speed.py $(or $(ARGS),--images 16 --classes 12 62)

clean:
	rm -rf $(VENV) $(NEWEST) $(DEMO) out
