# Each target works as the first command in a fresh checkout, as root or with sudo.
# What is missing is installed first, once: see .ci/setup, which says what it does.

SHELL := /bin/bash
PYTEST_ARGS ?=
# Each file's tests stay together: they share a mount or a server.
JOBS ?= auto
DEMO_DIR ?= $(HOME)/stashcordfs-demo
BIN := .venv/bin
COMMANDS := demo test lint format bench posix demo-stop install clean help
COMMANDS += soak-faults soak-uploads soak-offline soak-recover soak-garbage soak-directory soak-model
COMMANDS += soak-crash-kill soak-crash-power soak-cuts soak-programs soak-fsx soak-fsstress
COMMANDS += soak-fio soak-stress soak-scale soak-systemd
COMMANDS += soak-fuzz

.PHONY: $(COMMANDS)
.DEFAULT_GOAL := help

help:
	@echo 'make demo    try StashcordFS: a mounted directory, no account needed (DEMO_DIR=$(DEMO_DIR))'
	@echo 'make demo-stop  end the demo: unmount, stop its server'
	@echo 'make install  for everyday use: /opt/stashcordfs, the command in /usr/local/bin, systemd units; as root or with sudo'
	@echo 'make test    run the tests (PYTEST_ARGS="-k name" for some of them; JOBS=0: one by one)'
	@echo 'make lint    ruff, mypy, import contracts'
	@echo 'make format  let ruff format the code'
	@echo 'make bench   compare the mount with ext4 and with a do-nothing FUSE file system'
	@echo 'make posix   what POSIX says of each call, on a local disk and on a mount; as root'
	@echo 'make soak-faults  every fault of the service against every operation (15 minutes)'
	@echo 'make soak-crash-kill   kill the daemon under load 300 times, check what was acknowledged (CRASH_ARGS)'
	@echo 'make soak-crash-power  cut the power of a loop-mounted ext4 and xfs 100 times; as root'
	@echo 'make soak-cuts  2,000 power cuts and kills in one process, on a virtual clock (10 minutes)'
	@echo 'make soak-uploads  1,000 uploads, a tenth of the answers lost: each exactly once (1 minute)'
	@echo 'make soak-recover  20 machines lost at a random moment, faults on: what was told is back (50 minutes)'
	@echo 'make soak-garbage  write and delete 10 GiB over 60 days, twice: what Discord holds, what it costs (30 minutes)'
	@echo 'make soak-offline  2 GiB written without the service, which is back a day later (8 minutes)'
	@echo 'make soak-directory  a folder of 1,000,000 entries: made, listed while it changes, removed (30 minutes)'
	@echo 'make soak-scale     a volume of 1,000,000 files: checkpoint, recover, fsck, memory (30 minutes; SCALE_ARGS)'
	@echo 'make soak-model    100,000 operations on the mount and on a plain folder: both alike after each (1 hour; MODEL_ARGS)'
	@echo 'make soak-programs  git, SQLite, PostgreSQL, restic, Samba, ... on a mount, in two regimes; as root (10 minutes)'
	@echo 'make soak-fsx, soak-fsstress, soak-fio, soak-stress  load on a mount, checked (1 hour each; LOAD_ARGS)'
	@echo 'make soak-fuzz  the readers of packs, segments, checkpoints, ... under a fuzzer (35 minutes; FUZZ_ARGS)'
	@echo 'make soak-systemd  a Debian 12 of its own: make demo, make install, the unit, fstab; as root (10 minutes)'
	@echo 'make clean   remove the virtual environment and what tools have left'

.venv/.stamp-sandbox: pyproject.toml .ci/setup
	@.ci/setup sandbox

.venv/.stamp-dev: pyproject.toml .ci/setup
	@.ci/setup dev

demo: .venv/.stamp-sandbox
	@mkdir -p '$(DEMO_DIR)'
	@$(BIN)/stashcordfs demo '$(DEMO_DIR)'

demo-stop: .venv/.stamp-sandbox
	@$(BIN)/stashcordfs demo --stop '$(DEMO_DIR)'

install:
	@.ci/setup install

test: .venv/.stamp-dev
	PYTHONPATH=tests/plugins $(BIN)/python -m pytest -p require_fuse -n $(JOBS) --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

lint: .venv/.stamp-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.stamp-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.stamp-dev
	$(BIN)/python tests/bench/run.py

posix: .venv/.stamp-dev
	$(BIN)/python tests/posix/run.py --write

soak-faults: .venv/.stamp-dev
	$(BIN)/python tests/faults/run.py --state .venv/.soak-faults.json --write

soak-cuts: .venv/.stamp-dev
	$(BIN)/python tests/vfs/cuts.py --seeds 500

soak-uploads: .venv/.stamp-dev
	$(BIN)/python tests/soak/run.py uploads --write

soak-recover: .venv/.stamp-dev
	$(BIN)/python tests/soak/run.py recover --state .venv/.soak-recover.json --write

soak-directory: .venv/.stamp-dev
	$(BIN)/python tests/soak/run.py directory --write

soak-garbage: .venv/.stamp-dev
	$(BIN)/python tests/soak/run.py garbage --state .venv/.soak-garbage.json --write

soak-offline: .venv/.stamp-dev
	$(BIN)/python tests/soak/run.py offline --write

# Seeded; after an interruption the same command goes on with the next batch. MODEL_ARGS='--seed 2'.
MODEL_ARGS ?=

soak-model: .venv/.stamp-dev
	$(BIN)/python tests/model/soak_model.py --state .venv/.model.json --write $(MODEL_ARGS)

soak-programs: .venv/.stamp-dev
	$(BIN)/python tests/programs/run.py --write

LOAD_ARGS ?=

soak-fsx soak-fsstress soak-fio soak-stress: soak-%: .venv/.stamp-dev
	$(BIN)/python tests/soak/load.py $* --write $(LOAD_ARGS)

# Goes on from the corpus in .venv/.fuzz. FUZZ_ARGS='--seconds 3600 --seed 2 segment'.
FUZZ_ARGS ?=

soak-fuzz: .venv/.stamp-dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || { echo '==> Installing atheris'; $(BIN)/python -m pip install -q '.[fuzz]'; }
	$(BIN)/python tests/fuzz/run.py --write $(FUZZ_ARGS)

# After an interruption the same command goes on. SCALE_ARGS='--files 100000', '--dir FOLDER' (16 KiB of disk a file).
SCALE_ARGS ?=

soak-scale: .venv/.stamp-dev
	$(BIN)/python tests/soak/scale.py --dir .venv/.soak-scale --write $(SCALE_ARGS)
	$(BIN)/python tests/soak/scale_plot.py

soak-systemd: .venv/.stamp-dev
	@command -v debootstrap systemd-nspawn >/dev/null || { echo '==> Installing debootstrap and systemd-container'; apt-get update -qq; apt-get install -y -qq --no-install-recommends debootstrap systemd-container; }
	$(BIN)/python tests/systemd/run.py --write
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage htmlcov

# Seeded; after an interruption the same command goes on with the next round. CRASH_ARGS='--seed 2'.
CRASH_ARGS ?=

soak-crash-kill: .venv/.stamp-dev
	$(BIN)/python tests/crash/run.py kill --state .venv/.crash-kill.json --evidence docs/evidence/crash-kill.json $(CRASH_ARGS)

soak-crash-power: .venv/.stamp-dev
	@command -v mkfs.xfs >/dev/null || { echo '==> Installing xfsprogs'; apt-get install -y -qq --no-install-recommends xfsprogs; }
	$(BIN)/python tests/crash/run.py power --state .venv/.crash-power.json --evidence docs/evidence/crash-power.json $(CRASH_ARGS)
