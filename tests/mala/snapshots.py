# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create small snapshots that MALA can learn from: python snapshots.py FOLDER."""

import sys
from pathlib import Path

import numpy as np

GRID = (6, 6, 6)
DESCRIPTORS, ENERGIES = 8, 11


def main() -> None:
    """Write descriptors (after three coordinates) and a density of states computed from them."""
    folder = Path(sys.argv[1])
    random = np.random.default_rng(1)
    weights = random.normal(size=(DESCRIPTORS, ENERGIES))
    coordinates = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), axis=-1)
    for number in range(2):
        descriptors = random.normal(size=(*GRID, DESCRIPTORS))
        density = np.abs(np.tanh(descriptors @ weights)) + 0.01
        np.save(folder / f"snapshot{number}.in.npy", np.concatenate([coordinates, descriptors], axis=-1))
        np.save(folder / f"snapshot{number}.out.npy", density)


if __name__ == "__main__":
    main()
