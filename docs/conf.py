# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Sphinx has to know. tools/docs calls it, with the pages and the generated reference in one folder.

The pages are Markdown that can be read as it is, too. So links lead to files of the repository, and are turned here
into links to pages, to the reference or to the repository on the web. One that leads nowhere is a warning, and so
the build fails.
"""

from __future__ import annotations

import os.path
import re
import zlib
from pathlib import Path

import yaml
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[1]
GALAXY = yaml.safe_load((ROOT / "galaxy.yml").read_text())
# Pages that are elsewhere in the repository.
ELSEWHERE = {"client": "client/README.md", "contributing": "CONTRIBUTING.md"}
# What the reference mentions of Ansible's own documentation: the label, the page there, and what it is called.
ANSIBLE = {
    "action_plugins": ("plugins/action.html", "action plugins"),
    "ansible_configuration_settings": ("reference_appendices/config.html", "Ansible's settings"),
    "common_return_values": ("reference_appendices/common_return_values.html", "common return values"),
}

project = f"{GALAXY['namespace']}.{GALAXY['name']}"
copyright = "mala.hpc_db contributors"
version = release = GALAXY["version"]
extensions = ["myst_parser", "sphinx.ext.intersphinx", "sphinx_antsibull_ext"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False
html_copy_source = False

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"^```mermaid\n.*?^```\n", re.DOTALL | re.MULTILINE)
SPECS = re.compile(r"roles/(\w+)/meta/argument_specs\.yml")
logger = logging.getLogger(__name__)


def page_of(path: str) -> str:
    """Return the page that a file of the repository is; nothing if it is none."""
    pages = {file: page for page, file in ELSEWHERE.items()}
    return pages.get(path) or (path[len("docs/"):-len(".md")] if re.fullmatch(r"docs/(figures/)?\w+\.md", path) else "")


def in_reference(role: str, option: str) -> str:
    """Return the label of a role's option in the reference."""
    specs = yaml.safe_load((ROOT / "roles" / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    entry = next((entry for entry, spec in specs.items() if option in spec.get("options", {})), "no such option")
    return f"#ansible_collections.{project}.{role}_role__parameter-{entry}__{option}"


def turn_links(docname: str, text: str) -> str:
    """Have links to files of the repository lead to where their readers find them."""
    folder = os.path.dirname(ELSEWHERE.get(docname, f"docs/{docname}.md"))

    def turn(link: re.Match[str]) -> str:
        said, path, anchor = link[1], os.path.normpath(os.path.join(folder, link[2])), link[3] or ""
        specs, page = SPECS.fullmatch(path), page_of(path)
        if specs and re.fullmatch("`[a-z_]+`|`[a-z_]+: .*`", said):
            return f"[{said}]({in_reference(specs[1], said.strip('`').partition(':')[0])})"
        if page and (ROOT / path).is_file():
            return f"[{said}]({os.path.relpath(page, os.path.dirname(docname) or '.')}.md{anchor})"
        if not (ROOT / path).exists():
            logger.warning("%s does not exist", path, location=docname)
        return f"[{said}]({GALAXY['repository']}/blob/main/{path}{anchor})"

    return LINK.sub(turn, text)


def contents(text: str) -> str:
    """Return a table of contents for each section of the first page, which is a list of links, and the reference."""
    sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    pages = [re.findall(r"^- \[[^\]]*\]\(([\w/]+)\.md\)", section, re.MULTILINE) for section in sections[1::2]]
    tables = [*zip(sections[::2], pages), ("Reference", ["reference/index"])]
    table = "```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {}\n\n{}\n```\n"
    return "".join(table.format(caption, "\n".join(names)) for caption, names in tables)


def read_source(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn what is Markdown for everybody into what Sphinx needs."""
    if not docname.startswith("reference/"):
        page = f"{GALAXY['repository']}/blob/main/{ELSEWHERE.get(docname, f'docs/{docname}.md')}"
        source[0] = PICTURE.sub(f"[The picture is in the repository.]({page})\n", turn_links(docname, source[0]))
    if docname == "index":
        source[0] += "\n" + contents(source[0])


def inventory() -> str:
    """Write the index of Ansible's documentation, as far as it is used here; return the file's name."""
    labels = "".join(f"{label} std:label -1 {page} {text}\n" for label, (page, text) in ANSIBLE.items())
    head = "# Sphinx inventory version 2\n# Project: Ansible\n# Version: \n# compressed by zlib\n"
    file = ROOT / ".cache" / "docs" / "ansible.inv"
    file.write_bytes(head.encode() + zlib.compress(labels.encode()))
    return str(file)


intersphinx_mapping = {"ansible": ("https://docs.ansible.com/ansible/devel", inventory())}


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_source)
