"""The program of the child process that lays out a UMAP picture.

Hides: that umap-learn imports torch when it can. Two copies of OpenMP in one process crash on some machines,
so here the import is refused. Reads vectors.npy in the given folder, writes places.npy whole.
Reference: McInnes, Healy & Melville 2018, UMAP.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

REFUSED = ("torch", "torchvision", "tensorflow", "keras")


class Refusal:
    """A finder of modules that has none of the refused ones."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse a module."""
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not to be imported here", name=name)


def lay_out(folder: Path, n_axes: int, seed: int) -> None:
    """Write the places (N, n_axes) float32 of the vectors in a folder."""
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
