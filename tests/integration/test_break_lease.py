# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lease whose holder cannot be checked, and the playbook that breaks it."""

from __future__ import annotations

import json
import re
import subprocess

from target import ROOT, Target

HOLDER = {
    "host": "laptop.home.lan", "pid": 4711, "job": "4711", "kind": "local", "cluster": "an-old-name",
    "place": "another-boot pid:[4026531836]", "start": "1", "since": 1_800_000_000,
}
BEAT = "cd lease-test/run; exec bash -c 'while read -t 0.2 -r _line; [ $? -gt 128 ]; do date +%N > hb.1; done'"


def test_break_lease(here: Target) -> None:
    here.run("mkdir -p -m 700 lease-test lease-test/run lease-test/host lease-test/log")
    packed = subprocess.run(
        ["tar", "-c", "-C", str(ROOT / ".cache/host"), "--dereference", "hpc_db_host"], check=True, capture_output=True
    ).stdout
    subprocess.run([*here.shell, "tar -x -C ~/lease-test/host"], input=packed, env=here.environment, check=True)
    here.run(f"cd lease-test; echo '{json.dumps(HOLDER)}' > run/lease.1; echo 77 > run/hb.1")
    here.run("""cd lease-test; echo '{"lease_ttl": 3, "cluster": "here"}' > host/settings.json""")
    settings = {"instance_root": "~/lease-test"}
    held = (
        "the data directory is held by job 4711 on laptop.home.lan (PID 4711) since 2027-01-15 08:00:00 UTC; its lease "
        "was last renewed "
    )
    try:
        beating = here.start(BEAT)
        assert beating.stdin
        with beating, beating.stdin:
            refused = here.play("break_lease", settings)
        assert refused.returncode != 0 and held in refused.stdout
        assert "ago, and is broken unless it is renewed in the next 4 s" in refused.stdout  # watching time
        assert "the holder renewed the lease within 4 s" in refused.stdout
        before = here.run("ls lease-test/run")

        looked = here.play("break_lease", settings, "--check")
        assert looked.returncode == 0 and held in looked.stdout, looked.stdout
        assert here.run("ls lease-test/run") == before == "hb.1\nlease.1"

        broken = here.play("break_lease", settings)
        assert broken.returncode == 0 and re.search(r"changed=1 ", broken.stdout), broken.stdout
        assert "released.2" in here.run("ls lease-test/run")
    finally:
        here.run("rm -rf lease-test")
