"""Pictures of high-dimensional points and their distortion: PCA, UMAP, neighbours, clusters, isotropy.

Hides: where UMAP runs (a child process that never imports torch). Everything is numpy; vectors are (N, C),
places on a picture (N, 2 or 3). Near means a high cosine between vectors, and a small distance on a picture.
Reference: Pearson 1901 (PCA); McInnes et al. 2018 (UMAP); Ethayarajh 2019 (mean cosine as anisotropy).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from primechat.errors import ConfigError

FIT_ROWS = 16_384  # axes and clusters are fitted on a sample of at most this many rows
CHILD = "primechat.interp.embeddings.umap_child"
HOUSE = Path(__file__).resolve().parents[3]  # folder from which the child imports primechat


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Principal axes (C, K) of a cloud around its `center` (C,), with the `share` (K,) of variance each."""

    center: np.ndarray
    axes: np.ndarray
    share: np.ndarray

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Return float32 places (N, K) of vectors (N, C), which may be those of another snapshot."""
        return ((vectors - self.center) @ self.axes).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Places (N, K) of points; `note` explains in one sentence if another method had to be used."""

    places: np.ndarray
    method: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Isotropy:
    """How evenly a cloud fills its space.

    `cosine` is the mean over pairs (0 for uniform directions), `cosine_centered` the same after subtracting
    the mean, `n_axes` the effective number of axes that carry the variance (at most `width`).
    """

    cosine: float
    cosine_centered: float
    n_axes: float
    width: int


def check_vectors(vectors: np.ndarray, least: int = 3) -> np.ndarray:
    """Return vectors as float32 (N, C).

    Raises:
        ConfigError: there are too few rows, the shape is wrong, or a number is not finite.
    """
    x = np.asarray(vectors, dtype=np.float32)
    if x.ndim != 2 or len(x) < least:
        raise ConfigError(
            f"vectors of shape {x.shape} must be ({least} or more, C); give more points."
        )
    if not np.isfinite(x).all():
        raise ConfigError(
            f"{int((~np.isfinite(x)).any(1).sum())} rows are not finite; the model is broken."
        )
    return x


def sample_rows(x: np.ndarray, n_rows: int = FIT_ROWS, seed: int = 0) -> np.ndarray:
    """Return at most n_rows of x, drawn without replacement, the same ones for the same seed."""
    return (
        x
        if len(x) <= n_rows
        else x[np.random.default_rng(seed).choice(len(x), n_rows, replace=False)]
    )


def scale_rows(x: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1; a row of zeros is unchanged."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def fit_basis(vectors: np.ndarray, n_axes: int = 3) -> Basis:
    """Return the principal axes of vectors (N, C), each with a positive largest entry.

    Source: Pearson 1901; with more than FIT_ROWS rows, of a sample.
    """
    x = sample_rows(check_vectors(vectors)).astype(np.float64)
    center = x.mean(0)
    values, axes = np.linalg.eigh((x - center).T @ (x - center) / len(x))
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(len(axes))])
    share = values / max(float(values.sum()), 1e-30)
    k = min(n_axes, axes.shape[1])
    return Basis(
        center=center.astype(np.float32), axes=axes[:, :k].astype(np.float32), share=share[:k]
    )


def fill_axes(places: np.ndarray, n_axes: int = 3) -> np.ndarray:
    """Return places padded with columns of zeros up to n_axes."""
    return np.pad(places, [(0, 0)] * (places.ndim - 1) + [(0, max(0, n_axes - places.shape[-1]))])


def find_near(
    table: np.ndarray, row: int, k: int = 10, *, straight: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows nearest to a row, itself excluded, and their cosines (or distances).

    Args:
        table: (N, C).
        row: index of the row whose neighbours are returned.
        k: number of neighbours, at most N - 1.
        straight: rank by distance, as on a picture, instead of by cosine.
    """
    if straight:
        far = np.linalg.norm(table - table[row], axis=1)
    else:
        size = np.linalg.norm(table, axis=1)
        far = -(table @ table[row]) / np.maximum(size * size[row], 1e-12)
    far[row] = np.inf
    k = min(k, len(table) - 1)
    near = np.argpartition(far, k - 1)[:k]
    near = near[np.argsort(far[near], kind="stable")]
    return near, far[near] if straight else -far[near]


def measure_neighbour_overlap(
    vectors: np.ndarray, places: np.ndarray, k: int = 10, n_rows: int = 512, seed: int = 0
) -> tuple[float, float]:
    """Return the share of the k true neighbours kept on a picture, and the share expected by chance.

    Args:
        vectors: (N, C).
        places: (N, 2 or 3), places of the same points.
        k: number of neighbours.
        n_rows: size of the sample of points whose neighbours are compared.
        seed: of the sample.
    """
    x = check_vectors(vectors, k + 2)
    asked = sample_rows(np.arange(len(x)), n_rows, seed)
    unit = scale_rows(x)
    kept = 0
    for rows in np.array_split(asked, max(1, len(asked) // 128)):
        far = -(unit[rows] @ unit.T)
        flat = np.square(places[rows, None, 0] - places[None, :, 0])
        for axis in range(1, places.shape[1]):
            flat += np.square(places[rows, None, axis] - places[None, :, axis])
        for i, row in enumerate(rows):
            far[i, row] = flat[i, row] = np.inf
            kept += len(
                np.intersect1d(np.argpartition(far[i], k)[:k], np.argpartition(flat[i], k)[:k])
            )
    return kept / (k * len(asked)), k / (len(x) - 1)


def cluster_rows(vectors: np.ndarray, k: int = 6, seed: int = 0, rounds: int = 30) -> np.ndarray:
    """Return a cluster 0..k-1 for each vector, by direction; cluster 0 is the largest.

    Source: Dhillon & Modha 2001 (spherical k-means); Arthur & Vassilvitskii 2007 (k-means++ start).
    """
    unit, rng = scale_rows(check_vectors(vectors)), np.random.default_rng(seed)
    unit = scale_rows(unit - sample_rows(unit).mean(0))  # a shared direction would hide all others
    x, k = sample_rows(unit), min(k, len(unit))

    # Initial centres far from each other.
    centers = x[[int(rng.integers(len(x)))]]
    while len(centers) < k:
        gap = np.maximum(1 - (x @ centers.T).max(1), 0).astype(np.float64) + 1e-12
        centers = np.vstack([centers, x[rng.choice(len(x), p=gap / gap.sum())]])

    # Move each centre to the mean direction of its cluster.
    for _ in range(rounds):
        own = (x @ centers.T).argmax(1)
        sums = np.stack([x[own == j].sum(0) if (own == j).any() else centers[j] for j in range(k)])
        moved = scale_rows(sums)
        if np.allclose(moved, centers, atol=1e-5):
            break
        centers = moved

    # Number the clusters by size.
    own = (unit @ centers.T).argmax(1)
    rank = np.empty(k, dtype=np.int64)
    rank[np.argsort(-np.bincount(own, minlength=k), kind="stable")] = np.arange(k)
    return rank[own]


def measure_isotropy(vectors: np.ndarray) -> Isotropy:
    """Return how evenly the directions of vectors (N, C) are distributed.

    Source: Ethayarajh 2019, mean cosine over pairs; participation ratio of the covariance's eigenvalues,
    (sum)^2 / sum of squares, of the vectors scaled to length 1.
    """
    unit = scale_rows(sample_rows(check_vectors(vectors))).astype(np.float64)

    def mean_cosine(x: np.ndarray) -> float:
        n, total = len(x), x.sum(0)
        return float((total @ total - np.square(x).sum()) / (n * (n - 1)))

    values = np.linalg.eigvalsh(np.cov(unit.T))
    centered = scale_rows(unit - unit.mean(0)).astype(np.float64)
    return Isotropy(
        cosine=mean_cosine(unit),
        cosine_centered=mean_cosine(centered),
        n_axes=float(values.sum() ** 2 / max(float(np.square(values).sum()), 1e-30)),
        width=unit.shape[1],
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two arrays; equal numbers share their mean rank."""

    def rank(x: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    one, two = rank(np.asarray(a)), rank(np.asarray(b))
    one, two = one - one.mean(), two - two.mean()
    return float(one @ two / max(np.sqrt((one @ one) * (two @ two)), 1e-30))


class UmapJob:
    """A UMAP picture being computed in a child process; `poll` it, `wait` for it or `stop` it.

    UMAP reads all columns of the rows, scaled to length 1: a projection on a few principal components would
    already decide which points are near. It keeps neighbours together, but its axes have no meaning, so two
    pictures cannot be compared. If it fails, the picture is PCA's, and its note says why.
    """

    def __init__(self, vectors: np.ndarray, n_axes: int = 2, seed: int = 0) -> None:
        x = check_vectors(vectors, 5)
        self.vectors, self.n_axes, self.t_start, self.stopped = x, n_axes, time.monotonic(), False
        # 20 s to load and compile, then in proportion to the points; twice that on a busy machine.
        self.expected_s = 20 + len(x) / 250
        folder = Path(tempfile.mkdtemp(prefix="primechat-umap-"))
        self.folder, self.picture = folder, None  # type: tuple[Path, Picture | None]
        np.save(folder / "vectors.npy", scale_rows(x))
        here = os.pathsep.join(filter(None, [str(HOUSE), os.environ.get("PYTHONPATH")]))
        program = [sys.executable, "-m", CHILD, str(folder), str(n_axes), str(seed)]
        with (folder / "errors.txt").open("wb") as errors:
            self.child = subprocess.Popen(
                program,
                env={**os.environ, "PYTHONPATH": here},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        self._end = weakref.finalize(self, end_child, self.child, folder)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.t_start

    def poll(self) -> Picture | None:
        """Return the picture, or None while it is being computed."""
        if self.picture is None and self.child.poll() is not None:
            self.picture = self.collect()
            self._end()
        return self.picture

    def wait(self, timeout_s: float = 600) -> Picture:
        """Return the picture; after `timeout_s` seconds the child is killed and the picture is PCA's."""
        try:
            self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        picture = self.poll()
        assert picture is not None, "a child that has ended leaves a picture"
        return picture

    def stop(self) -> Picture:
        """Stop the child and return the picture, which is PCA's unless UMAP had finished."""
        self.stopped = self.child.poll() is None
        self.child.kill()
        return self.wait()

    def collect(self) -> Picture:
        """Return the picture of a child that has ended."""
        path = self.folder / "places.npy"
        if self.child.returncode == 0 and path.is_file():
            return Picture(places=np.load(path), method="UMAP")
        text = (self.folder / "errors.txt").read_text(encoding="utf-8", errors="replace").strip()
        why = (
            "it was stopped"
            if self.stopped
            else text.splitlines()[-1][:200]
            if text
            else "no reason given"
        )
        code = "" if self.stopped else f" (exit code {self.child.returncode})"
        note = f"UMAP did not finish{code}: {why}. The picture is PCA's."
        flat = fit_basis(self.vectors, self.n_axes).project(self.vectors)
        return Picture(places=flat, method="PCA", note=note)


def end_child(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the child if it is running, and remove its folder."""
    if child.poll() is None:
        child.kill()
        child.wait()
    shutil.rmtree(folder, ignore_errors=True)
