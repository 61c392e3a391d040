# A fresh machine needs Python >= 3.10 with venv, and g++; nvcc is used where there is one. Everything else comes into
# VENV, through constraints.txt. With PYTHON=<interpreter> the test targets use that environment instead and download
# nothing: it must hold PyTorch and pytest, and dist/ a wheel that fits it (`make wheel-portable` fits every version).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BASE_PYTHON ?= python3
ARGS ?=
BENCHES ?=
BENCH_MINUTES ?=
OUT ?= .benchmarks
WORKERS ?= auto
RIVALS ?= .venv-rivals
SEED ?= 0
CASES ?= 20000
MINUTES ?= 20
SANITIZE ?= 1
rivals_bin := $(abspath $(RIVALS))/bin

bin := $(abspath $(VENV))/bin
pip := $(bin)/python -m pip
sources := setup.py pyproject.toml CMakeLists.txt MANIFEST.in $(wildcard LICENSE README.md CHANGELOG.md) \
  $(shell find nasdet kernels csrc -name __pycache__ -prune -o -not -name '*.so' -print)

ifeq ($(origin PYTHON),command line)
NASDET_PYTHON := $(PYTHON)
endif
ifneq ($(NASDET_PYTHON),)
ready := existing
python := env PYTHONPATH=$(CURDIR)/build/existing $(NASDET_PYTHON)
else
ready := install
python := $(bin)/python
endif

# Tests run from an empty folder, so that what they import is what was installed.
elsewhere := folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cd "$$folder";
installed := NASDET_INSTALLED=1 NASDET_DIST=$(CURDIR)/dist
pytest := $(elsewhere) $(installed)

.PHONY: help install wheel wheel-portable demo test test-slow test-gpu test-asan fuzz rivals bench bench-gpu bench-rivals lint \
  format clean existing

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(VENV)/.torch: constraints.txt
	$(BASE_PYTHON) -m venv $(VENV)
	$(pip) install --quiet --constraint constraints.txt torch numpy build
	touch $@

# The chain that a release goes through: sdist, then the wheel from the sdist alone. Kept in build/cmake, objects of
# unchanged C++ sources are not compiled again.
dist/.built: $(sources) $(VENV)/.torch
	rm -rf dist build/sdist
	mkdir -p dist build/sdist
	$(bin)/python -m build --sdist --outdir dist . > build/sdist.log || { cat build/sdist.log; exit 1; }
	tar xf dist/nasdet-*.tar.gz --strip-components=1 -C build/sdist
	NASDET_BUILD_DIR=$(CURDIR)/build/cmake $(pip) wheel --no-deps --wheel-dir dist build/sdist
	touch $@

$(VENV)/.installed: dist/.built
	wheel=$$(ls dist/nasdet-*.whl | grep -v py3-none); \
	  $(pip) install --quiet --force-reinstall --no-deps "$$wheel"; \
	  $(pip) install --quiet --constraint constraints.txt "$$wheel[detect,fast,onnx,triton,test]"
	touch $@

# torchvision's wheels load only beside a CUDA build of PyTorch: several GB, which work without a GPU.
$(RIVALS)/.torch: constraints-rivals.txt
	$(BASE_PYTHON) -m venv $(RIVALS)
	$(rivals_bin)/python -m pip install --quiet --constraint constraints-rivals.txt \
	  torch torchvision numpy pytest pytest-benchmark
	touch $@

# The very wheel file that VENV has, beside another PyTorch.
$(RIVALS)/.installed: dist/.built $(RIVALS)/.torch
	wheel=$$(ls dist/nasdet-*.whl | grep -v py3-none); \
	  $(rivals_bin)/python -m pip install --quiet --no-index --force-reinstall --no-deps "$$wheel"
	touch $@

install: $(VENV)/.installed  ## build the wheel and install it with all extras into VENV (.venv)

wheel: dist/.built  ## build dist/nasdet-*.tar.gz and the wheel from it

wheel-portable: dist/.built  ## build a wheel without the pybind11 module, for every version of Python
	NASDET_PYBIND=0 NASDET_BUILD_DIR=$(CURDIR)/build/cmake $(pip) wheel --no-deps --wheel-dir dist build/sdist

existing:
	@ls dist/nasdet-*.whl > /dev/null || { echo "dist/ holds no wheel: run 'make wheel-portable' first" >&2; exit 1; }
	rm -rf build/existing
	wheel=$$(ls dist/nasdet-*.whl | sort | tail -n 1); \
	  $(NASDET_PYTHON) -m pip install --quiet --no-index --no-deps --target build/existing "$$wheel"

demo: install  ## the main job: digits, a search, retraining, a comparison and its page in runs/ (ARGS="--space nats")
	$(bin)/nasdet demo $(ARGS)

test: $(ready)  ## the fast tests, on the installed wheel
	@$(pytest) $(python) -m pytest $(CURDIR)/tests -m "not slow and not gpu" $(ARGS)

test-slow: $(ready)  ## the tests that take minutes
	@$(pytest) $(python) -m pytest $(CURDIR)/tests -m "slow and not gpu" $(ARGS)

# The files that have such tests: others may need packages that a machine with a GPU and no network lacks.
gpu_tests = $(addprefix $(CURDIR)/,$(shell grep -rl --include='test_*.py' 'mark\.gpu' tests))

# Most of the time goes into compiling: side by side where xdist is, and each worker on a core of its own. Then, one by
# one, those that want the device's memory to themselves. 5 is pytest's word for none chosen, as ARGS="-k" may have it.
test-gpu: $(ready)  ## the tests that need a CUDA device; a missing one is a failure (WORKERS=auto)
	@$(elsewhere) export $(installed) NASDET_REQUIRE=cuda,triton TORCHINDUCTOR_COMPILE_THREADS=1; \
	  workers=$$($(python) -c 'import importlib.util as u; print("-n $(WORKERS)" * bool(u.find_spec("xdist")))'); \
	  shared=0; $(python) -m pytest $(gpu_tests) -m "gpu and not whole_gpu" $$workers $(ARGS) || shared=$$?; \
	  alone=0; $(python) -m pytest $(gpu_tests) -m whole_gpu $(ARGS) || alone=$$?; \
	  case $$shared,$$alone in 0,0|0,5|5,0) ;; *) echo "test-gpu: pytest said $$shared, $$alone" >&2; exit 1 ;; esac

fuzz: $(ready)  ## random cases of every operator against float64 references (SEED=0 CASES=20000 MINUTES=20)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cd "$$folder"; \
	  $(python) $(CURDIR)/tests/fuzz/fuzz.py --seed $(SEED) --cases $(CASES) --seconds $$(($(MINUTES) * 60)) $(ARGS)

rivals: $(RIVALS)/.installed  ## the tests against torchvision, on the same wheel, in RIVALS (.venv-rivals, several GB)
	@$(pytest) NASDET_REQUIRE=cpp,torchvision $(rivals_bin)/python -m pytest -p no:cacheprovider \
	  $(CURDIR)/tests/rivals $(CURDIR)/tests/compat $(ARGS)

# The sanitizers' runtimes must come first in the process; libstdc++ with them, or exceptions are not understood.
test-asan: install  ## the operators' tests under the sanitizers (SANITIZE=avx2: no wider kernels, in less time)
	rm -rf build/asan/site
	NASDET_SANITIZE=$(SANITIZE) NASDET_CUDA=0 NASDET_BUILD_DIR=$(CURDIR)/build/asan $(pip) install --quiet --no-deps \
	  --target build/asan/site build/sdist
	@preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	  $(pytest) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/asan/site \
	  LD_PRELOAD="$$preload" $(bin)/python -m pytest $(CURDIR)/tests/ops $(CURDIR)/tests/python_module \
  -m "not slow and not gpu" $(ARGS)

# One pytest per file, each with a JSON of its own in OUT; ARGS are pytest's.
benchmark = $(python) $(CURDIR)/benchmarks/run.py --out $(abspath $(OUT)) $(addprefix --bench ,$(BENCHES)) \
  $(addprefix --minutes ,$(BENCH_MINUTES)) --

bench: $(ready)  ## the benchmarks, speed and peak memory; rewrites the results and the tables (BENCHES="mix nms")
	@$(pytest) $(benchmark) $(ARGS)

bench-gpu: $(ready)  ## the same on a CUDA device; a missing one is a failure (OUT=FOLDER BENCH_MINUTES=9)
	@$(pytest) NASDET_REQUIRE=cuda,triton $(benchmark) --bench-device cuda $(ARGS)

bench-rivals: python = $(rivals_bin)/python
bench-rivals: $(RIVALS)/.installed  ## the benchmarks with torchvision among the contestants, in RIVALS
	@$(pytest) NASDET_REQUIRE=cpp,torchvision $(benchmark) $(ARGS)

cplusplus = find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

lint: install  ## ruff, mypy and clang-format
	$(bin)/python -m ruff check .
	$(bin)/python -m mypy
	$(cplusplus) | xargs $(bin)/clang-format --dry-run --Werror

format: install  ## the C++ and CUDA sources by .clang-format
	$(cplusplus) | xargs $(bin)/clang-format -i

clean:  ## remove everything that was built, and VENV
	rm -rf build dist $(VENV) $(RIVALS) nasdet.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
