# Every target sets up .venv when it is needed; nothing has to be installed by hand.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc petite_fast -type f -not -name '*.so' -not -path '*/__pycache__/*')
BUILD := setup.py pyproject.toml CMakeLists.txt MANIFEST.in constraints.txt

.PHONY: demo test test-peft test-triton sanitize bench gpu-check lint clean

# The commands and what they need.
demo: $(VENV)/app
	$(BIN)/petite-fast demo --out runs/demo

# Against the installed package, not the source tree. Builds of their own come last, alone.
test: $(VENV)/dev
	$(BIN)/pytest -n 2 --dist loadfile

# The tests with Hugging Face PEFT, against its oldest release that is supported.
test-peft: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/peft-0.18 peft==0.18.1
	PYTHONPATH=$(VENV)/peft-0.18 $(BIN)/pytest python_tests/peft/test_hugging_face.py python_tests/peft/test_hugging_face_options.py

# The Triton kernels compiled ahead of time by the oldest Triton that is supported.
test-triton: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/pytest $(wildcard python_tests/backends/test_triton_*.py) -k "compiled or reasons"

# The tests of the native kernels with every read and write checked (GCC).
sanitize: $(VENV)/dev
	PETITE_FAST_SANITIZE=on $(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/sanitize .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(VENV)/sanitize \
	$(BIN)/pytest -p no:cacheprovider $(wildcard python_tests/backends/test_native*.py python_tests/backends/test_cuda*.py) python_tests/ops/test_dropout.py

bench: $(VENV)/dev
	$(BIN)/python bench/run.py --suite all

# On a machine with a GPU, in under ten minutes: build, tests, sanitizers, tuning, measurements into
# bench/results/. Run again, it goes on with what did not pass. PYTHON=python3 takes an interpreter
# that has torch and the rest already, as it is, instead of .venv.
ifdef PYTHON
gpu-check:
	$(PYTHON) bench/gpu_check.py
else
gpu-check: $(VENV)/dev
	$(PIP) pybind11 cmake ninja setuptools
	$(BIN)/python bench/gpu_check.py
endif

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	python3 -m venv $(VENV)

# pip installs the package anew when one of its files is newer than the stamp; what it depends on
# stays, so that takes seconds.
$(VENV)/app: $(BIN)/python $(SOURCES) $(BUILD)
	$(PIP) ".[app]"
	touch $@

$(VENV)/dev: $(BIN)/python $(SOURCES) $(BUILD)
	$(PIP) ".[app,dev]"
	touch $@
