# Two commands for a fresh machine: `make demo` writes text with the embedded model, `make test` runs the tests. While working:
# `make check` (format, lint, types) and `make test-fast` (the tests that are not marked slow, under a minute).
# Both make the virtual environment first. VENV=path puts it elsewhere, PYTHON=python3.12 takes another interpreter.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: chat demo test test-lowest check docs bench native sanitize test-arm wheel clean

demo: $(VENV)/.installed
	$(BIN)/fate run --expert-cache 25% --max-new-tokens 120 --seed 1

# A small model that talks, built once (about three minutes, and 3.5 GB of disk for that time), and its page in a browser.
chat: $(VENV)/.installed-serve
	$(BIN)/fate serve demo-chat --open

# One worker more than the two processors of a small machine: many tests wait for a process or a disk.
WORKERS ?= 3
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

.PHONY: test-fast test-newest
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests

# Debian's Chromium, for tests/serve/test_page_browser.py (skipped where there is none). Playwright's own download is not used.
.PHONY: browser
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && command -v apt-get && \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } || \
	  echo "The page is not tested in a browser: Chromium is not installed"

# The families with the lowest and with the newest transformers that pyproject.toml admits; the next make brings the pinned one back.
FAMILY_TESTS := tests/adapter/test_families.py tests/engine/test_parity.py tests/layers/test_plain.py
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
test-lowest: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'transformers==$(LOWEST).*'
	rm -f $(VENV)/.installed $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(FAMILY_TESTS)

NEWEST := $(shell sed -n 's/.*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
test-newest: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy only-if-needed '$(NEWEST)'
	rm -f $(VENV)/.installed $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(FAMILY_TESTS)

# Formatting, lint, and types of sources, tests, examples, recipes and benchmarks.
check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, under build/site; a broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/scripts/one_token.py
	$(BIN)/mkdocs build --strict --quiet

# This engine and others on the same real weights (10.4 B parameters, upcycled), under real memory limits, every cell three times:
# hours, and 50 GB under BENCH. Stopped, it goes on where it was. bench-quick is one round of its heart, in 20 minutes once the model is
# made (a quarter of an hour); bench-paper is the paper's experiment.
BENCH ?= build/bench
BENCH_MODEL := $(BENCH)/smollm2-wide
.PHONY: bench-quick bench-paper
bench: $(BENCH_MODEL)/model.safetensors.index.json
	$(BIN)/python -m benchmarks run $(BENCH_MODEL) --home $(BENCH)
	$(BIN)/python -m benchmarks report

bench-quick: $(BENCH_MODEL)/model.safetensors.index.json
	$(BIN)/python -m benchmarks run $(BENCH_MODEL) --home $(BENCH) --peers best load-on-demand llama.cpp-wheel ik_llama.cpp \
	  --limits none 52% --workloads decode prefill-512 --seconds 45 --rounds 1
	$(BIN)/python -m benchmarks report

bench-paper: $(BENCH_MODEL)/model.safetensors.index.json
	$(BIN)/python -m benchmarks.paper run $(BENCH_MODEL) --home $(BENCH)
	$(BIN)/python -m benchmarks.paper report

$(BENCH_MODEL)/model.safetensors.index.json: | $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.upcycle $(BENCH_MODEL) --hidden 2304 --expert-width 768 --shared-width 1536

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,gguf]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# What the tests and the site need, in one go: each `pip install -e` compiles the extension anew.
.PHONY: installed-all
installed-all:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $(VENV)/.installed && touch $(VENV)/.installed-dev $(VENV)/.installed-docs

# The C++ kernels, built into src/ for the interpreter PYTHON (an editable install has done so already).
native:
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check nanobind cmake ninja
	PATH="$(CURDIR)/build/tools/bin:$$PATH" cmake -S src/fate_moe/kernels/csrc -B build/native -G Ninja \
	  -DPython_EXECUTABLE="$(CURDIR)/build/tools/bin/python"
	PATH="$(CURDIR)/build/tools/bin:$$PATH" cmake --build build/native

# The kernel tests under AddressSanitizer and UBSan (gcc's), with an extension of their own beside a copy of the package's Python.
# The C++ library is preloaded too, or the sanitizer does not find what throws; torch and Python leak by design.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := build/sanitize/src/fate_moe
# Not optimized: that compiles in half the time, and the tests take a quarter longer.
.PHONY: sanitized
sanitized:
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check nanobind cmake ninja
	mkdir -p $(SANITIZED)
	cp -Rp src/fate_moe/. $(SANITIZED)/ && rm -f $(SANITIZED)/kernels/_native*
	# An editable install's finder comes before PYTHONPATH: without this the checkout's own extension would be tested.
	printf 'import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildInplaceFinder"]\n' \
	  > build/sanitize/src/sitecustomize.py
	PATH="$(CURDIR)/build/tools/bin:$$PATH" cmake -S $(SANITIZED)/kernels/csrc -B build/sanitize/native -G Ninja \
	  -DPython_EXECUTABLE="$(CURDIR)/build/tools/bin/python" -DCMAKE_BUILD_TYPE=None -DFATE_OPTIMIZE=-O0 \
	  -DCMAKE_CXX_FLAGS="$(SANITIZE) -g1" -DFATE_CHECK_OPS="$(CURDIR)/tests/kernels/csrc/check_ops.cpp"
	PATH="$(CURDIR)/build/tools/bin:$$PATH" cmake --build build/sanitize/native

sanitize: sanitized $(VENV)/.installed-dev
	build/sanitize/native/check_ops
	PYTHONPATH=build/sanitize/src ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -p no:cacheprovider tests/kernels/test_cpu.py tests/kernels/test_layers.py \
	    tests/kernels/test_attention.py tests/kernels/test_elementary.py tests/layers/test_modules.py tests/gpu/test_host_compute.py \
	    tests/memory/test_expert_memory.py tests/memory/test_sources.py

# What runs on several threads under ThreadSanitizer, in a program without Python: the portable kernels, thread team and host compute.
.PHONY: tsan
tsan:
	mkdir -p build/tsan
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-missing-field-initializers -fsanitize=thread -ffp-contract=off -I $(CSRC) -pthread \
	  -o build/tsan/check_threads tests/kernels/csrc/check_threads.cpp \
	  $(filter-out $(wildcard $(CSRC)/module*.cpp) %/neon_dot.cpp %/neon_i8mm.cpp,$(wildcard $(CSRC)/*.cpp)) -ldl
	TSAN_OPTIONS="suppressions=tests/kernels/csrc/tsan.supp" build/tsan/check_threads

# Damaged files, faults, kills, races and budgets, each case from a number (docs/concepts/reliability.md): five minutes, MINUTES= or HOURS=
# otherwise. SEED= repeats a run; each failure prints the command that repeats it alone. FOLDER= is where the files are made.
.PHONY: torture
MINUTES ?= $(if $(HOURS),$(shell expr 60 \* $(HOURS)),5)
torture: $(VENV)/.installed-dev
	$(BIN)/python -m tests.torture --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(FOLDER),--folder $(FOLDER))

# Known vulnerabilities in what is installed, and a bill of materials (CycloneDX). Both ask the network, from an environment of their own.
.PHONY: audit sbom
$(VENV)/.audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/.audit
	$(VENV)/.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom

audit: $(VENV)/.installed-serve $(VENV)/.audit/bin/pip-audit
	$(VENV)/.audit/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

sbom: $(VENV)/.installed-serve $(VENV)/.audit/bin/pip-audit
	mkdir -p build
	$(VENV)/.audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-file build/sbom.json
	@echo build/sbom.json

# The NEON kernels without and with SDOT and SMMLA under the same sanitizers, on emulated processors (Debian: g++-aarch64-linux-gnu,
# qemu-user-static), without Python.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= ASAN_OPTIONS=detect_leaks=0 qemu-aarch64-static -L /usr/aarch64-linux-gnu
CSRC := src/fate_moe/kernels/csrc
ARM_FLAGS := -std=c++17 -O0 -g1 -Wall -Wextra -Wno-psabi -Wno-missing-field-initializers $(SANITIZE) -ffp-contract=off -I $(CSRC)
ARM_SOURCES := $(filter-out $(wildcard $(CSRC)/module*.cpp),$(wildcard $(CSRC)/*.cpp))
ARM_OBJECTS := $(patsubst $(CSRC)/%.cpp,build/arm/%.o,$(ARM_SOURCES)) build/arm/check_ops.o
build/arm/neon_dot.o: ARM_FLAGS += -march=armv8.2-a+dotprod
build/arm/neon_i8mm.o: ARM_FLAGS += -march=armv8.2-a+dotprod+i8mm
build/arm/check_ops.o: tests/kernels/csrc/check_ops.cpp
	mkdir -p build/arm
	$(ARM_CXX) $(ARM_FLAGS) -pthread -c $< -o $@
build/arm/%.o: $(CSRC)/%.cpp
	mkdir -p build/arm
	$(ARM_CXX) $(ARM_FLAGS) -pthread -c $< -o $@
$(ARM_OBJECTS): $(wildcard $(CSRC)/*.h $(CSRC)/*.inc tests/kernels/csrc/*.h)
build/arm/check_ops: $(ARM_OBJECTS)
	$(ARM_CXX) $(ARM_FLAGS) -pthread -o $@ $^ -ldl

# Each instruction set on a processor on which it is the best.
.PHONY: test-arm-neon test-arm-dot test-arm-i8mm
test-arm-neon: build/arm/check_ops
	$(ARM_RUN) -cpu cortex-a53 $< neon portable
test-arm-dot: build/arm/check_ops
	$(ARM_RUN) -cpu cortex-a76 $< neon-dot
test-arm-i8mm: build/arm/check_ops
	$(ARM_RUN) -cpu max $< neon-i8mm
test-arm: test-arm-neon test-arm-dot test-arm-i8mm

# A wheel with the extension for this machine's Python, under dist/ (for all platforms: cibuildwheel, see pyproject.toml).
wheel:
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist src/fate_moe/kernels/_native* .pytest_cache .mypy_cache .ruff_cache .hypothesis
