# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conda channel that gains a newer PostgreSQL."""

# A program that copies a channel without one version: WHOLE FOLDER VERSION.
GROW = """
import json, pathlib, shutil, sys
whole, folder, hidden = sys.argv[1:]
whole, folder = pathlib.Path(whole), pathlib.Path(folder)
if not folder.exists():
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("wheels", "*-18.*"))
content = json.loads((whole / "linux-64/repodata.json").read_text())
known = content["packages.conda"]
content["packages.conda"] = {name: record for name, record in known.items() if record["version"] != hidden}
(folder / "linux-64/repodata.json").write_text(json.dumps(content))
"""
