# Two commands on a fresh machine: `make demo` and `make test`. Everything they need, they install: Python packages into
# .venv; a compiler, headers and fusermount3, and for `make test` the programs that tests run, through apt-get where it exists.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install deb deb-check demo unit test coverage bench bench-plot soak fuzz guest boot-test guides-test docs pictures lint clean system

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(STAMP) ## See memory converted while a guest runs (under a minute, no trace left)
	@./install-system-packages demo
	@$(BIN)/python -m demo

unit: $(STAMP) ## The tests that need no root and no mount (two minutes)
	$(BIN)/pytest -q tests/unit tests/model

test: lint ## Lint, then all tests (a quarter of an hour on two cores; root for those that mount)
	@./install-system-packages test
	$(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

bench: $(STAMP) ## Measure memfs beside tmpfs and an ordinary pyfuse3 filesystem (15 min; bench/out/bench.json)
	@$(BIN)/python -m bench

bench-plot: $(STAMP) ## Draw how cost grows with size, from what `make bench` measured (bench/out/size.png, .svg)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[plot]'
	@$(BIN)/python -m bench.plot

pictures: $(STAMP) ## Take the pictures in docs/pictures anew (root; Chromium; two minutes)
	@./install-system-packages test
	unshare --mount --propagation private $(BIN)/python -m demo.pictures

soak: $(STAMP) ## Many VMs at random, then files as on a tmpfs, then with deaths, MINUTES=n of each (SEED=n to repeat)
	MEMFS_SOAK_MINUTES=$(or $(MINUTES),10) MEMFS_SOAK_SEED=$(or $(SEED),0) \
		$(BIN)/pytest -s --timeout=0 tests/e2e/test_many_vms.py tests/e2e/test_differential.py tests/e2e/test_survival.py

fuzz: $(STAMP) ## Feed what others control with anything at all for long (MINUTES=n, and SEED=n to repeat)
	@$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=3' || echo "no atheris for this Python: with hypothesis"
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

coverage: $(STAMP) ## Which lines of memfs and kvmsim all tests run, in all processes (slower than make test)
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

boot-test: $(STAMP) ## Boot a Linux kernel in sealed memory (root; ten minutes, in an emulated machine, without SVM or VMX)
	@tests/boot/boot-test

guides-test: $(STAMP) ## Run every command of docs/guides, with QEMU, libvirt and virtiofsd (root; some minutes)
	@./install-system-packages guides
	MEMFS_TEST_GUIDES=1 $(BIN)/pytest tests/e2e/test_guides.py

docs: $(STAMP) ## Build the documentation as a site (build/site/index.html); a warning is an error
	@$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

guest: ## Build the test guest of native code anew (kvmsim/guests/selftest.elf; needs a C compiler)
	$(or $(CC),cc) -O2 -Wall -Wextra -Werror -march=x86-64 -ffreestanding -fno-pic -no-pie -nostdlib -static -fno-stack-protector \
		-fcf-protection=none -fno-asynchronous-unwind-tables -Wl,-z,max-page-size=4096,-z,noseparate-code,--build-id=none -s \
		-o kvmsim/guests/selftest.elf kvmsim/guests/selftest.c

lint: $(STAMP) ## ruff, mypy --strict, codespell, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo

install: ## Install for all users: PREFIX=/usr/local, DESTDIR=, PYTHON=python3 (contrib/install says what else)
	@PYTHON=$(PYTHON) contrib/install PREFIX=$(or $(PREFIX),/usr/local) DESTDIR=$(DESTDIR)

deb: ## Build a Debian package of what is checked out (dist/memfs_VERSION_ARCH.deb)
	@contrib/build-deb

deb-check: deb ## Install that package in a fresh Debian, and have lintian, mount(8) and systemd see it (root)
	@./install-system-packages package
	MEMFS_CHECK_PACKAGE=1 $(BIN)/pytest --timeout=900 tests/e2e/test_package.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* bench/out

$(STAMP): pyproject.toml | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memfs needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

system:
	@PYTHON=$(PYTHON) ./install-system-packages build
