#: make build        .venv, the compiled module, an editable install
#: make demo         trains a small transformer with no learning rate chosen
#: make test         what every change must pass: no framework, no interpreter, four minutes
#: make test-triton  the Triton kernels, in Triton's interpreter
#: make test-stacks  the tests with training frameworks, which it installs
#: make test-slow    the slow tests of these three: every combination
#: make test-all     all of these, with CUDA compiled where nvcc is
#: make fuzz         random events between steps, C++ beside the reference: FUZZ_CASES=100000
#: make sanitize     the C++ backend under the sanitizers of GCC, with the tests that call it
#: make wheels       a wheel for this Python, and one with CUDA where nvcc is; tried without compilers
#: make site         the documents as a site, in build/site
#: make bench        step times beside the optimizers of torch and mechanic-pytorch
#: make convergence  learned learning rates beside tuned ones: hours (ARGS=--quick: minutes)
#: make checkstyle   ruff, clang-format, mypy, import-linter
#: make format       rewrites the sources as checkstyle wants them
#: make clean        removes what was built; .venv stays (rm -r .venv removes that too)
#:
#: ARGS goes to the program of a verb: make test ARGS="-k checkpoint", make demo ARGS=--compare.
#: CUDA is compiled where a GPU is visible; MECHANIC_CUDA=1 or 0 in the environment decides it.
.PHONY: help build demo test test-triton test-stacks test-slow test-all
.PHONY: fuzz sanitize wheels site bench convergence checkstyle format clean always
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
	MECHANIC_STACKS=1 $(PYTEST) --continue-on-collection-errors -m "not triton $(SLOW)" $(ARGS) \
		$(INTEGRATIONS)

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

# Each is installed into an environment of its own, and tested there by a copy of the tests, with a
# PATH on which neither a compiler nor nvcc is.
WHEELS := build/wheels
TRIED := tests/core/test_checkpoints.py tests/core/test_command_line.py tests/core/test_muon.py \
	tests/backends/test_running_ops.py tests/backends/test_muon_ops.py
wheels: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0;12.0+PTX
wheels: .venv/build.done .venv/torch.done .venv/wheels.done
	rm -rf $(WHEELS) build/wheel-tests
	MECHANIC_CUDA=0 $(PY) -m pip wheel -q --no-deps --no-build-isolation -w $(WHEELS)/cpu/raw .
	$(if $(NVCC),MECHANIC_CUDA=1 $(PY) -m pip wheel -q --no-deps --no-build-isolation \
		-w $(WHEELS)/cuda/raw .)
	mkdir build/wheel-tests && cp -r tests build/wheel-tests
	for kind in $(WHEELS)/*; do \
		PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/auditwheel repair --strip -w $$kind \
			$$kind/raw/*.whl && $(MAKE) --no-print-directory try-wheel KIND=$$kind || exit 1; done

.PHONY: try-wheel
try-wheel:
	rm -rf $(KIND)/env && $(PYTHON) -m venv $(KIND)/env
	$(KIND)/env/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		torch numpy pytest hypothesis $(ASK_TORCH_INDEX_UNLESS_GPU)
	@begin=$$(date +%s); \
	PATH=/nonexistent $(CURDIR)/$(KIND)/env/bin/python -m pip install -qq \
		--disable-pip-version-check --no-deps $(KIND)/*.whl && \
	echo "$$(ls $(KIND)/*.whl): $$(du -k $(KIND)/*.whl | cut -f1) KB," \
		"installed in $$(( $$(date +%s) - begin )) s"
	cd build/wheel-tests && PATH=/nonexistent $(CURDIR)/$(KIND)/env/bin/python -m pytest -q \
		-p no:cacheprovider -o pythonpath=tests -o addopts= -m "not slow and not triton" \
		-c $(CURDIR)/pyproject.toml --rootdir . $(TRIED)

site: .venv/site.done
	rm -rf build/site-sources && mkdir -p build/site-sources
	git ls-files -z docs benchmarks examples mechanic_fused '*.md' CITATION.cff | \
		xargs -0 cp --parents -t build/site-sources
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

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

# A stack that cannot be installed says so, and only its tests fail.
STACKS := transformers trl lightning deepspeed torchtitan-needs axolotl-needs
STACKS_ALONE := torchtitan timm axolotl llamafactory
# A stack may have been left out for the platform or the version of Python.
ABSENT = from importlib.util import find_spec; names = "transformers peft trl lightning deepspeed \
	torchtitan timm axolotl llamafactory".split(); \
	print("".join(f" {name}" for name in names if not find_spec(name)), end="")
.venv/stacks.done: pyproject.toml constraints.txt .venv/test.done
	@touch .venv/begun
	@failed=; for stack in $(STACKS); do $(PIP) --group $$stack || failed="$$failed $$stack"; done; \
	for stack in $(STACKS_ALONE); do \
		$(PIP) --no-deps --group $$stack || failed="$$failed $$stack"; done; rm .venv/begun; \
	failed="$$failed$$($(PY) -c '$(ABSENT)')"; \
	if [ -z "$$failed" ]; then touch $@; else echo "not installed, its tests fail:$$failed"; fi

# The groups of pyproject.toml, by name.
.venv/%.done: pyproject.toml constraints.txt | .venv/pip.done
	$(call install,--group $*)

GPU = nvidia-smi -L 2>/dev/null | grep -q GPU || test -e /dev/nvidia0
ASK_TORCH_INDEX = $(if $(TORCH_INDEX),--retries 0 --timeout 5 --extra-index-url $(TORCH_INDEX))
ASK_TORCH_INDEX_UNLESS_GPU = $(shell $(GPU) || echo $(ASK_TORCH_INDEX))
.venv/torch.done: constraints.txt | .venv/pip.done
	$(call install,--no-deps torch $(ASK_TORCH_INDEX_UNLESS_GPU))

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
