# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Needs Python 3.9 or newer and nothing else; everything it makes is below .venv and .cache.

.PHONY: help setup demo docs lint sanity unit client molecule integration test soak bench storage provision mala release-check clean

help:  ## show these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup:  ## install what development needs (PYTHON=/usr/bin/python3 picks another base Python)
	@tools/setup test

demo:  ## a database server, a study and its workers on this machine
	@tools/setup controller
	@.venv/bin/python examples/demo.py

docs:  ## the guide and the reference, as pages to open in a browser
	@tools/setup docs
	@tools/docs

lint sanity unit client molecule integration soak mala: setup
	@tools/test $@

lint:  ## style, types and documentation
sanity:  ## ansible-test sanity, on the working tree
unit:  ## unit tests
client:  ## the client package, with servers that go away, on the newest and the oldest libraries
molecule:  ## the playbooks, on this machine and on the mini Slurm cluster
integration:  ## the mini Slurm cluster, the conda channel and the hosting program under faults

test: setup  ## all of the above
	@tools/test lint+sanity+unit+client molecule integration

soak:  ## tests/client and tests/resilience as often as the targets in docs/reliability.md say: about two hours

bench: storage provision  ## what the figures in docs/ come from: an hour

storage:  ## Optuna on every storage, with 1 to 1,000 workers: twenty minutes, for docs/figures/many_workers.md
	@tools/setup bench
	@tools/bench

provision:  ## the playbooks beside the bare commands, their growth, and a server at rest, for docs/figures/performance.md
	@tools/setup cluster
	@[ "$$(id -u)" != 0 ] || tests/cluster/install-packages
	@.venv/bin/python bench/provision.py docs/figures/performance.md
	@.venv/bin/python bench/growth.py docs/figures/performance.md
	@.venv/bin/python bench/at_rest.py docs/figures/performance.md

mala:  ## MALA itself, through a move of the server: some minutes, and 1.5 GB to install

release-check: setup  ## what git has, built and checked as Galaxy and an empty machine would: about ten minutes
	@tools/release

clean:  ## remove what the commands above made
	rm -rf .venv .cache
