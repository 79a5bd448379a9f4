# Every target works from a fresh clone with nothing but Python (with venv and pip) and a C++ compiler.
PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# Both honour an existing pip configuration; nothing here names an index.
PIP := $(VENV_PYTHON) -m pip install --disable-pip-version-check --quiet
TORCH := torch==2.13.0
TRITON := triton==3.9.0; platform_system == 'Linux'

INSTALLED := $(VENV)/.installed
INSTALLED_TRAIN := $(VENV)/.installed-train
NATIVE_FILES := CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)
CMAKE := $(VENV)/bin/cmake
CTEST := $(VENV)/bin/ctest
NATIVE_BUILD := build/native

# Tests run small problems in parallel processes: more threads in each only get in each other's way.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST_WORKERS ?= 2

.PHONY: demo test lint bench tiny-models install clean

demo: $(INSTALLED)
	$(VENV)/bin/tq-fast demo

test: $(INSTALLED)
	$(MAKE) --no-print-directory native-test
	$(TEST_ENV) $(VENV_PYTHON) -m pytest tests -n $(PYTEST_WORKERS) --benchmark-disable

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(VENV_PYTHON) -m pytest bench --benchmark-only

tiny-models: $(INSTALLED_TRAIN)
	$(VENV_PYTHON) scripts/train_tiny_models.py

install: $(INSTALLED)

# A build without native libraries (TQ_FAST_BUILD=none, no compiler) has no C++ tests either.
.PHONY: native-test
native-test: $(INSTALLED)
	@if [ -f $(NATIVE_BUILD)/CMakeCache.txt ]; then \
	  PATH="$(abspath $(VENV))/bin:$$PATH" $(CMAKE) --build $(NATIVE_BUILD) --target native_tests --parallel 2 && \
	  $(CTEST) --test-dir $(NATIVE_BUILD) --output-on-failure; \
	else echo "no native build: the C++ tests were not run"; fi

$(VENV_PYTHON):
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: another package's wider range must not choose its version.
$(INSTALLED): $(VENV_PYTHON) pyproject.toml constraints.txt $(NATIVE_FILES)
	$(PIP) "$(TORCH)"
	$(PIP) -c constraints.txt setuptools cmake ninja
	$(VENV_PYTHON) -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

$(INSTALLED_TRAIN): $(INSTALLED)
	$(PIP) -c constraints.txt --no-build-isolation -e ".[train]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tq_fast/*.so
