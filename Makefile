#: make build        .venv, the compiled module, an editable install
#: make demo         trains a small transformer with no learning rate chosen
#: make test         what every change must pass: no framework, no interpreter, four minutes
#: make test-triton  the Triton kernels, in Triton's interpreter
#: make test-stacks  the tests with training frameworks, which it installs
#: make test-slow    the slow tests of these three: every combination
#: make test-all     all of these, with CUDA compiled where nvcc is
#: make fuzz         random events between steps, C++ beside the reference: FUZZ_CASES=100000
#: make sanitize     the C++ backend under the sanitizers of GCC, with the tests that call it
#: make bench        step times beside the optimizers of torch and mechanic-pytorch
#: make convergence  learned learning rates beside tuned ones: hours (ARGS=--quick: minutes)
#: make checkstyle   ruff, clang-format, mypy, import-linter
#: make format       rewrites the sources as checkstyle wants them
#: make clean        removes what was built; .venv stays (rm -r .venv removes that too)
#:
#: ARGS goes to the program of a verb: make test ARGS="-k checkpoint", make demo ARGS=--compare.
#: CUDA is compiled where a GPU is visible; MECHANIC_CUDA=1 or 0 in the environment decides it.
.PHONY: help build demo test test-triton test-stacks test-slow test-all
.PHONY: fuzz sanitize bench convergence checkstyle format clean always
# One pip at a time in .venv; ninja and pytest use all cores by themselves.
.NOTPARALLEL:

PYTHON ?= python3
# How many processes run tests side by side; the tests of a file stay together.
JOBS ?= 2
# For Linux, PyPI's torch is the CUDA build, of gigabytes. Where no GPU is visible this index too is
# asked, and its CPU build wins by its local version. Empty, or out of reach: pip's own choice.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

help:
	@sed -n 's/^#: \{0,1\}//p' Makefile

build: build/native.done .venv/editable.done

# It runs on the CPU.
demo: export MECHANIC_CUDA ?= 0
demo: build .venv/demo.done
	$(PY) examples/char_lm.py $(ARGS)

PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile
INTEGRATIONS := tests/integrations
SLOW = and not slow

test: build .venv/test.done .venv/triton.done
	$(PYTEST) -m "not triton $(SLOW)" --ignore=$(INTEGRATIONS) $(ARGS)

test-triton: build .venv/test.done .venv/triton.done
	TRITON_INTERPRET=1 $(PYTEST) -m "triton $(SLOW)" --ignore=$(INTEGRATIONS) $(ARGS)

test-stacks: build .venv/stacks.done
	$(PYTEST) -m "not triton $(SLOW)" $(ARGS) $(INTEGRATIONS)

test-slow: SLOW = and slow
test-slow: test test-triton test-stacks

NVCC = $(shell command -v nvcc || command -v $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc)
test-all: SLOW =
test-all: export MECHANIC_CUDA ?= $(if $(NVCC),1)
test-all: test test-triton test-stacks

fuzz: export FUZZ_CASES ?= 100000
fuzz: build .venv/test.done
	$(PY) -m pytest -m "not slow" tests/fuzz $(ARGS)

# A copy of the package, whose module the tests then import; see tests/conftest.py.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
PRELOADED = $(foreach library,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
CALL_CPP := $(wildcard tests/backends/test_*ops.py) $(addprefix tests/,core fuzz tuners) \
	$(addprefix tests/backends/,test_contract.py test_cpp.py test_tables.py)
sanitize: build .venv/test.done
	@mkdir -p $(SANITIZED) && rm -rf $(SANITIZED)/csrc $(SANITIZED)/mechanic_fused
	@cp -pr csrc mechanic_fused setup.py pyproject.toml README.md $(SANITIZED)
	@rm -f $(SANITIZED)/mechanic_fused/_native*
	cd $(SANITIZED) && CXX="$(CXX) $(SANITIZERS)" MECHANIC_CUDA=0 \
		$(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 MECHANIC_PACKAGE=$(SANITIZED) \
		$(PYTEST) -o pythonpath="$(SANITIZED) tests ." -m "not triton $(SLOW)" $(CALL_CPP) $(ARGS)

bench: build .venv/bench.done
	$(PY) -m benchmarks.step $(ARGS)

convergence: build .venv/bench.done
	$(PY) -m benchmarks.convergence $(ARGS)

checkstyle: build .venv/style.done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(CSRC)
	$(PY) -m mypy
	.venv/bin/lint-imports

format: build .venv/style.done
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(CSRC)

clean:
	rm -rf build .venv/editable.done mechanic_fused/_native*.so mechanic_fused/_build.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

# A step that was cut short leaves no .done file. A cut-short installation may also leave a package
# that pip takes for whole: then .venv/begun is still there, and all is made anew.
ifneq ($(and $(MAKECMDGOALS),$(wildcard .venv/begun)),)
$(shell rm -rf .venv)
endif
define install
@touch .venv/begun
$(PIP) $(1)
@rm .venv/begun && touch $@
endef

.venv/pip.done:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." \
		if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(call install,pip)

# The groups of pyproject.toml, by name.
.venv/%.done: pyproject.toml constraints.txt | .venv/pip.done
	$(call install,--group $*)

GPU = nvidia-smi -L 2>/dev/null | grep -q GPU || test -e /dev/nvidia0
ASK_TORCH_INDEX = $(if $(TORCH_INDEX),--retries 0 --timeout 5 --extra-index-url $(TORCH_INDEX))
.venv/torch.done: constraints.txt | .venv/pip.done
	$(call install,--no-deps torch $(shell $(GPU) || echo $(ASK_TORCH_INDEX)))

TRITON_GROUP = import torch; print("pip" if torch.version.cuda else "--group triton")
.venv/triton.done: pyproject.toml .venv/editable.done
	$(call install,$(shell $(PY) -c '$(TRITON_GROUP)'))

.venv/editable.done: pyproject.toml setup.py .venv/torch.done | .venv/build.done build/native.done
	$(call install,--no-build-isolation --editable .)

# What the environment asks of setup.py; the file is touched only when that changes.
build/asked: always
	@mkdir -p build
	@echo "MECHANIC_CUDA=$(MECHANIC_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)" > $@.new
	@cmp -s $@.new $@ || mv $@.new $@

# Without a compiler nothing is built and the next call tries again.
build/native.done: build/asked setup.py $(CSRC) csrc/rules.ninja .venv/build.done
	@$(PY) setup.py --quiet build_ext --inplace
	@grep -q '^not built' mechanic_fused/_build.txt || touch $@
