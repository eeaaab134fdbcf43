# The front door of the project. `make` says what there is; every target brings what it needs.
#
# Stamps keep a second `make setup` free: one for Debian's packages, the others inside the virtual environment.
# `make clean` makes it look again.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
# Two pips at once would take apart what each other installs.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup run demo test lint fuzz soak bench clean

PYTHON ?= python3
VENV   := .venv
DEMO   := .cache/demo
SYSTEM := .cache/system-packages

# What `make run` runs. IMAGE is named as skopeo names it; CMD is a shell command line.
IMAGE ?= oci:$(DEMO)/oci:latest
CMD   ?= python3 -c 'import os, sys; print("Hello from Python", sys.version.split()[0], "in", sorted(os.listdir("/")))'

# For how long `make fuzz` fuzzes each target, and which; all if none is named.
SECONDS ?= 60
TARGET  ?=

# For how long `make soak` makes trouble: 12 kills a minute.
MINUTES ?= 25

# To build pyfuse3, to mount, to run containers and to build the demo image.
PACKAGES := python3-venv python3-dev gcc pkg-config fuse3 libfuse3-dev runc crun mmdebstrap pigz zstd
# What the tests compare with, and the benchmarks measure against.
PEERS    := acl apache2-utils attr buildah busybox-static bzip2 curl docker-registry e2fsprogs erofs-utils fio \
            fuse-overlayfs isal libcap2-bin nginx openssl skopeo squashfs-tools squashfuse umoci xz-utils

help: ## say what there is
	@echo 'make TARGET, where TARGET is one of'
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(VENV)/.installed ## install what is missing: Debian packages (as root) and a virtual environment in .venv
	@:

run: setup $(DEMO)/oci/index.json ## run a container from an image that is never unpacked [IMAGE=... CMD=...]
	@$(VENV)/bin/clipfs run --rm --stats $(IMAGE) $(CMD)

demo: setup $(DEMO)/oci/index.json ## build the demo image in .cache/demo

test: setup lint $(VENV)/.installed-bench $(VENV)/.installed-fuzz $(SYSTEM)-peers $(DEMO)/oci/index.json ## everything that must hold: ruff, mypy, pytest [ARGS=...]
	@$(VENV)/bin/pytest --numprocesses 2 $(ARGS)

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check --quiet
	@$(VENV)/bin/ruff format --check --quiet || { echo "run '$(VENV)/bin/ruff format'"; exit 1; }
	@$(VENV)/bin/mypy --no-error-summary

fuzz: $(VENV)/.installed-fuzz ## give the parsers inputs that nobody thought of [SECONDS=60 TARGET=tar]
	@$(VENV)/bin/python -m tests.fuzz --seconds $(SECONDS) $(TARGET)

soak: $(VENV)/.installed-bench $(SYSTEM)-peers $(DEMO)/oci/index.json ## kill, upgrade, disconnect a mount under load [MINUTES=25]
	@$(VENV)/bin/python -m tests.soak --minutes $(MINUTES) --plot .cache/soak.svg

bench: $(VENV)/.installed-bench $(SYSTEM)-peers $(DEMO)/oci/index.json ## measure, print the tables, renew benchmarks/README.md and its pictures
	@$(VENV)/bin/python -m benchmarks

clean: ## remove what make made in this directory
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(SYSTEM): Makefile
	@$(call install,$(PACKAGES))
	@mkdir -p $(@D) && touch $@

$(SYSTEM)-peers: Makefile $(SYSTEM)
	@$(call install,$(PEERS))
	@touch $@

# Install those of the Debian packages $(1) that are missing; without root, say how.
define install
missing=$$(comm -23 <(printf '%s\n' $(1) | sort) \
    <(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' 2>/dev/null | sed -n 's/^installed //p' | sort -u)); \
if [ -n "$$missing" ]; then \
    missing=$$(echo $$missing); \
    [ "$$(id -u)" = 0 ] || { echo "make setup: as root, please run: apt-get install $$missing" >&2; exit 1; }; \
    echo "setup: installing $$missing"; \
    export DEBIAN_FRONTEND=noninteractive; \
    apt-get update -qq; \
    mkdir -p .cache; \
    apt-get install -y -qq --no-install-recommends $$missing > .cache/apt.log 2>&1 || { cat .cache/apt.log >&2; exit 1; }; \
fi
endef

$(VENV)/.installed: pyproject.toml $(SYSTEM)
	@echo 'setup: python environment in $(VENV)'
	@# pip comes last: without it, somebody interrupted this.
	@[ -x $(VENV)/bin/pip ] || { \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make setup: $(PYTHON) is older than 3.11; name another: make setup PYTHON=...")'; \
	    $(PYTHON) -m venv $(VENV); \
	}
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo 'setup: matplotlib, ratarmount'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/.installed-fuzz: $(VENV)/.installed
	@echo 'setup: atheris'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@touch $@

$(DEMO)/oci/index.json: $(VENV)/.installed benchmarks/demo.py
	@$(VENV)/bin/python -m benchmarks.demo $(DEMO)
	@touch $@
