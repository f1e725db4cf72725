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
client:  ## the client package during server outages, with the newest and the oldest libraries
molecule:  ## the playbooks, on this machine and on the test cluster
integration:  ## the test cluster, the conda channel and the supervisor under faults

test: setup  ## all of the above
	@tools/test lint+sanity+unit client+molecule+integration

soak:  ## tests/client and tests/resilience, as often as docs/reliability.md requires: about two hours

bench: storage provision  ## measure all figures in docs/: an hour

storage:  ## Optuna on every storage, with 1 to 1,000 workers: twenty minutes, for docs/figures/many_workers.md
	@tools/setup bench
	@tools/bench

provision:  ## measure the playbooks, the bare commands and an idle server, for docs/figures/performance.md
	@tools/setup cluster
	@[ "$$(id -u)" != 0 ] || tests/cluster/install-packages
	@.venv/bin/python bench/provision.py docs/figures/performance.md
	@.venv/bin/python bench/growth.py docs/figures/performance.md
	@.venv/bin/python bench/at_rest.py docs/figures/performance.md
	@.venv/bin/python bench/beside.py docs/figures/performance.md

mala:  ## MALA itself, through a move of the server: some minutes, and 1.5 GB to install

release-check: setup  ## build and check the committed files as on Galaxy and on an empty machine: about ten minutes
	@tools/release

clean:  ## remove all files that these commands have created
	rm -rf .venv .cache
