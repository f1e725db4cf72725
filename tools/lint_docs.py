#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check a collection's documentation with antsibull-docs.

Usage: tools/lint_docs.py [FOLDER], by default the current one.

It builds pages in a temporary folder, whose path is in the pages. A name that ends with an underscore would be a link
in reStructuredText, and one of 37 random names does.
"""

from __future__ import annotations

import sys
import tempfile

from antsibull_docs.cli.antsibull_docs import run  # type: ignore[import-not-found,unused-ignore]


def main() -> int:
    """Run the check."""
    vars(tempfile)["_RandomNameSequence"].characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    folder = sys.argv[1] if len(sys.argv) > 1 else "."
    return run(["antsibull-docs", "lint-collection-docs", "--plugin-docs", "--validate-collection-refs=all", folder])


if __name__ == "__main__":
    sys.exit(main())
