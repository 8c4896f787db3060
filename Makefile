# `make serve` and `make test` are all that a newcomer needs; both begin with `make setup`.
#
#   make setup                     .venv in this folder, from requirements.lock; needs no root
#   make setup TORCH=2.13.0+cpu    another build or version of torch (pip's own index settings say where from)
#   make test ARGS="-k config -x"  arguments for pytest; likewise for serve, bench, cluster-demo
#   make cluster-demo              a cluster on this machine, two of its workers killed in mid-stream (half a minute)
#   make measurements              docs/measurements/README.md again from the JSON files there
#   make picture                   docs/images/page.png again, of a cluster on this machine (needs Chromium)
#   make lock                      write requirements.lock again from pyproject.toml

# the first whose packages requirements.lock holds; without one CHECK_PYTHON says what python3 is, and what to do
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$$name"; exit; }; \
	done; echo python3)
TORCH ?= $(shell sed -n 's/^# torch==//p' requirements.lock)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.installed-torch-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint format bench cluster-demo measurements picture lock clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make serve | make test | make lint | make format | make bench"

define CHECK_PYTHON
import sys
def need(what, debian, fedora, mac):
    sys.exit("Foretoken needs %s. Install it, then try again:\n  Debian, Ubuntu:  sudo apt-get install %s\n"
             "  Fedora, RHEL:    sudo dnf install %s\n  macOS:           brew install %s" % (what, debian, fedora, mac))
version = "python%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    fit = "python3.11" if sys.version_info < (3, 11) else "python3.13"
    need("Python 3.11 to 3.13, and %s is %s" % (sys.executable, version), fit + " " + fit + "-venv", fit, "python@3.13")
try:
    import ensurepip, venv
except ImportError:
    need("the venv module of %s" % sys.executable, version + "-venv", version, "python@3.12")
endef
export CHECK_PYTHON

setup: $(STAMP)

# torch comes first, by its exact version: nothing that follows may replace it with another, larger build.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Foretoken needs Python 3.11 to 3.13. Debian, Ubuntu: sudo apt-get install python3 python3-venv; Fedora: sudo dnf install python3; macOS: brew install python@3.13"; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH)
	@echo "Installing the other packages (about 0.2 GB) ..."
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@$(VENV)/bin/foretoken kernels build || echo "The CPU kernels are optional: without them small steps are slower."
	@rm -f $(VENV)/.installed-*
	@touch $@

serve: setup
	$(VENV)/bin/foretoken serve $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest $(ARGS)

bench: setup
	$(VENV)/bin/foretoken bench serve $(ARGS)

cluster-demo: setup
	$(VENV)/bin/python -m loadtests.cluster_demo $(ARGS)

measurements: setup
	$(VENV)/bin/python -m loadtests.pages docs/measurements

picture: setup
	$(VENV)/bin/python -m tests.browser.picture docs/images/page.png $(ARGS)

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# One lock for Linux (x86-64, arm64) and macOS, Python 3.11 to 3.13. torch and what only its CUDA builds need are left
# out: their files differ by machine, so torch is pinned by version in the first line and brings its own.
COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --extra test --extra lint --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate --quiet

lock: setup
	$(COMPILE) --output-file $(VENV)/all.lock
	@sed -n 's/^torch==\([^ ;+]*\).*/# torch==\1/p' $(VENV)/all.lock > $(VENV)/new.lock
	@echo "# Made by 'make lock'. torch is installed first, by the version above; its files differ by machine." >> $(VENV)/new.lock
	$(COMPILE) $$(sed -nE 's/^(torch|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==.*/--no-emit-package \1/p' $(VENV)/all.lock) >> $(VENV)/new.lock
	@! grep -n '://' $(VENV)/new.lock
	mv $(VENV)/new.lock requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
