# `make` alone lists the verbs, builds, and says what was built. Each verb makes what it needs:
# .venv with pinned packages, the compiled module, an editable install. ARGS goes to the program
# that a verb runs: make test ARGS="-k plan", make demo ARGS=--compare.
PYTHON ?= python3
# How many processes run tests side by side; the tests of a file stay together.
JOBS ?= 2
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: report build test test-all demo bench convergence checkstyle format clean
report:
	@echo 'make build       .venv, the compiled module, an editable install'
	@echo 'make test        the tests, without those marked slow'
	@echo 'make test-all    every test'
	@echo 'make demo        trains a small transformer with no learning rate chosen'
	@echo 'make bench       step times beside the optimizers of torch and mechanic-pytorch'
	@echo 'make convergence  learned learning rates beside tuned ones: hours (ARGS=--quick: minutes)'
	@echo 'make checkstyle  ruff, clang-format, mypy'
	@echo 'make format      rewrites the sources as checkstyle wants them'
	@echo 'make clean       removes what was built; .venv stays (rm -r .venv removes that too)'
	@$(MAKE) --no-print-directory build
	@$(PY) -m mechanic_fused

build: build/native.done .venv/editable.done

test: build
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-all: build
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

demo: build
	$(PY) examples/char_lm.py $(ARGS)

bench: build
	$(PY) -m benchmarks.step $(ARGS)

convergence: build
	$(PY) -m benchmarks.convergence $(ARGS)

checkstyle: build .venv/style.done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(CSRC)
	$(PY) -m mypy

format: build .venv/style.done
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(CSRC)

clean:
	rm -rf build .venv/editable.done mechanic_fused/_native*.so mechanic_fused/_build.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache *.egg-info

# A step that was cut short leaves no .done file. A cut-short installation may also leave a package
# that pip takes for whole: then .venv/begun is still there, and all is made anew.
.venv/packages.done: requirements/test.txt requirements/triton.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." \
		if sys.version_info < (3, 10) else 0)'
	@if test -e .venv/begun; then rm -rf .venv; fi
	@echo 'Installing the packages of requirements/test.txt into .venv, once'
	@mkdir -p .venv && touch .venv/begun
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements/test.txt
	@$(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
		|| $(PIP) -r requirements/triton.txt
	@rm .venv/begun && touch $@

.venv/style.done: requirements/style.txt .venv/packages.done
	$(PIP) -r requirements/style.txt
	@touch $@

# Without a compiler nothing is built and the next call tries again.
build/native.done: .venv/packages.done setup.py $(CSRC) csrc/rules.ninja
	@$(PY) setup.py --quiet build_ext --inplace
	@grep -q '^not built' mechanic_fused/_build.txt || touch $@

.venv/editable.done: .venv/packages.done setup.py pyproject.toml \
		$(wildcard triton_kernels/__init__.py) | build/native.done
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
