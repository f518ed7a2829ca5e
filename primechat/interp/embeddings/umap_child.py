"""The child process that computes a UMAP layout.

umap-learn imports torch if it can, and two copies of OpenMP in one process crash on some machines, so this
process refuses the import. It reads vectors.npy in the given folder and writes places.npy atomically.
Reference: McInnes, Healy & Melville 2018, UMAP.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

REFUSED = ("torch", "torchvision", "tensorflow", "keras")


class Refusal:
    """A module finder that refuses to import the modules in REFUSED."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for a refused module."""
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not to be imported here", name=name)


def lay_out(folder: Path, n_axes: int, seed: int) -> None:
    """Compute the layout of the vectors in a folder and write it, float32 (N, n_axes)."""
    import numpy as np
    import umap

    vectors = np.load(folder / "vectors.npy")
    n_neighbors = max(2, min(15, len(vectors) - 1))
    layout = umap.UMAP(
        n_components=n_axes, n_neighbors=n_neighbors, metric="cosine", random_state=seed
    )
    np.save(folder / "part.npy", layout.fit_transform(vectors).astype(np.float32))
    assert not set(REFUSED) & set(sys.modules), "no second OpenMP in this process"
    os.replace(folder / "part.npy", folder / "places.npy")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refusal())  # type: ignore[arg-type]
    warnings.simplefilter("ignore")
    lay_out(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
