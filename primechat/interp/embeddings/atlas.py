"""Atlases of embeddings: a model's tables, a table over the snapshots of a run, the states of a text.

Hides: which vectors a picture shows. Each atlas makes a `Cloud` of one of its spaces, answers `near`, and may
lay the space out by UMAP; PCA uses one basis for all frames, so that motion between them is a real change.
Reference: Smilkov et al. 2016, Embedding Projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from primechat.checkpoint.registry import open_model
from primechat.errors import ConfigError
from primechat.events import Channel, Cloud, Nearby
from primechat.interp.embeddings import maps, tables
from primechat.model.gpt import GPT
from primechat.text.tokenizer import Tokenizer

N_NEAR = 10
MAX_BYTES = 1 << 30  # for the vectors of one space over all frames


class Atlas:
    """The base class: spaces with titles, each with vectors (F, N, C), frames, labels and channels."""

    def __init__(self, spaces: dict[str, str]) -> None:
        self.spaces = spaces
        self.vectors: dict[str, np.ndarray] = {}
        self.clouds: dict[tuple[str, str, int], Cloud] = {}

    is_whole = True  # the pictures have all their channels

    def complete(self) -> None:
        """Compute the channels too slow for the first picture, and add them to existing pictures."""

    def load(self, space: str) -> np.ndarray:
        """Return the vectors (F, N, C) of a space."""
        raise NotImplementedError

    def describe(self, space: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Channel, ...]]:
        """Return the labels of the points, the titles of the frames, and the channels of the points."""
        raise NotImplementedError

    def fetch(self, space: str) -> np.ndarray:
        """Return the vectors of a space; they are cached."""
        if space not in self.spaces:
            raise ConfigError(
                f"space={space!r} must be one of {', '.join(self.spaces)}; choose one."
            )
        if space not in self.vectors:
            self.vectors[space] = self.load(space)
        return self.vectors[space]

    def show(self, space: str, method: str = "PCA", n_axes: int = 2) -> Cloud:
        """Return the picture of a space; one by UMAP must first be computed with `start` and `keep`.

        Raises:
            ConfigError: the space does not exist, or its picture has not been computed.
        """
        key = (space, method, n_axes)
        if key not in self.clouds:
            vectors = self.fetch(space)
            if method != "PCA":
                raise ConfigError(
                    f"method={method!r} is not laid out yet for {space}; start it first."
                )
            basis = maps.fit_basis(vectors[-1] if self.fits_last else np.concatenate(vectors))
            places = np.stack([basis.project(x) for x in vectors])
            parts = zip(places[..., :n_axes], vectors, strict=True)
            shown = tuple(float(p.var(0).sum() / max(x.var(0).sum(), 1e-30)) for p, x in parts)
            self.clouds[key] = self.make_cloud(space, places, "PCA", n_axes, shown=shown)
        return self.clouds[key]

    fits_last = True  # the axes are fitted on the last frame

    def make_cloud(
        self, space: str, places: np.ndarray, method: str, n_axes: int, **more: Any
    ) -> Cloud:
        """Return the Cloud of a picture, with the share of true neighbours that it keeps."""
        vectors, kept, chance = self.fetch(space), list[float](), 0.0
        n_points = vectors.shape[1]
        if n_points > N_NEAR + 1:
            n_rows = int(np.clip(4_000_000 // (n_points * len(vectors)), 64, 512))
            for x, p in zip(vectors, places, strict=True):
                share, chance = maps.measure_neighbour_overlap(x, p[:, :n_axes], N_NEAR, n_rows)
                kept.append(share)
        labels, frames, channels = self.describe(space)
        return Cloud(
            title=self.spaces[space],
            labels=labels,
            places=maps.fill_axes(places),
            frames=frames,
            channels=channels,
            method=method,
            n_axes=n_axes,
            kept=tuple(kept),
            chance=chance,
            **more,
        )

    def near(self, space: str, method: str, n_axes: int, frame: int, point: int) -> Nearby:
        """Return the neighbours of a point in one frame, among the vectors and on the picture."""
        vectors, cloud = self.fetch(space)[frame], self.show(space, method, n_axes)
        if not 0 <= point < len(vectors):
            raise ConfigError(
                f"point={point} must be from 0 to {len(vectors) - 1}; choose one on the map."
            )
        true, cosines = maps.find_near(vectors, point, N_NEAR)
        drawn, _ = maps.find_near(cloud.places[frame][:, :n_axes], point, N_NEAR, straight=True)
        return Nearby(
            true=tuple(true.tolist()),
            cosines=tuple(cosines.tolist()),
            drawn=tuple(drawn.tolist()),
            chance=len(true) / max(1, len(vectors) - 1),
        )

    def start(self, space: str, n_axes: int = 2) -> maps.UmapJob:
        """Start a UMAP layout of a space in a child process and return its job.

        Raises:
            ConfigError: the space has several frames, which UMAP cannot show on one map.
        """
        vectors = self.fetch(space)
        if len(vectors) > 1:
            raise ConfigError(
                f"UMAP cannot show {len(vectors)} frames: each would get a map of its own, and points would "
                "move for no reason; PCA has one basis for all."
            )
        return maps.UmapJob(vectors[0], n_axes)

    def keep(self, space: str, n_axes: int, picture: maps.Picture) -> Cloud:
        """Return a finished picture as a Cloud; a UMAP picture is stored for `show`."""
        cloud = self.make_cloud(
            space, picture.places[None], picture.method, n_axes, note=picture.note
        )
        if picture.method == "UMAP":
            self.clouds[space, "UMAP", n_axes] = cloud
        return cloud


class TokenAtlas(Atlas):
    """The tables of one model, with one point per token."""

    def __init__(self, model: Any, tokenizer: Tokenizer, counts: np.ndarray | None = None) -> None:
        """Set up the tables of a model.

        Args:
            model: model whose tables are shown.
            tokenizer: its tokenizer.
            counts: (V,) number of times each token occurs in a text; if None, the bundled chats are counted
                when needed. Pictures made before that lack the counts until `complete` is called.
        """
        super().__init__(tables.list_tables(model))
        self.model, self.tokenizer = model, tokenizer
        self.counted = counts
        self.kinds = tables.sort_kinds(tokenizer)
        self.labels = tuple(tables.name_token(tokenizer, i) for i in range(tokenizer.vocab_size))
        self.norms: dict[str, np.ndarray] = {}

    @property
    def counts(self) -> np.ndarray:
        """Number of times each token occurs in a text (V,)."""
        if self.counted is None:
            self.counted = tables.count_tokens(self.tokenizer)
        return self.counted

    @property
    def is_whole(self) -> bool:  # type: ignore[override]
        """Whether every existing picture has the frequency of tokens."""
        return all(
            any(c.key == "frequency" for c in cloud.channels) for cloud in self.clouds.values()
        )

    def complete(self) -> None:
        """Count the tokens, and add their frequency to existing pictures."""
        _ = self.counts
        for key, cloud in self.clouds.items():
            self.clouds[key] = replace(cloud, channels=self.describe(key[0])[2])

    def load(self, space: str) -> np.ndarray:
        """Return the table of a space; input rows are scaled to length 1, as the model reads them."""
        return self.scale(space, tables.read_table(self.model, space))[None]

    def scale(self, space: str, table: np.ndarray) -> np.ndarray:
        """Record the lengths of a table's rows, and return the rows as the model uses them."""
        self.norms[space] = np.linalg.norm(table, axis=1)
        return maps.scale_rows(table) if space == "input" and isinstance(self.model, GPT) else table

    def describe(self, space: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Channel, ...]]:
        """Return the labels and channels of the tokens, in a single frame."""
        clusters = maps.cluster_rows(self.fetch(space)[-1])
        seen = () if self.counted is None else (self.counted,)
        channels = (
            Channel(key="kind", title="kind of token", values=self.kinds, names=tables.KINDS),
            *(
                Channel(key="frequency", title="times seen", values=counts, whole=True)
                for counts in seen
            ),
            Channel(key="norm", title="length of the vector", values=self.norms[space]),
            Channel(
                key="cluster", title="cluster", values=clusters, names=self.name_clusters(clusters)
            ),
        )
        return self.labels, ("",), channels

    def name_clusters(self, clusters: np.ndarray) -> tuple[str, ...]:
        """Return a name for each cluster: its three most frequent tokens.

        Before the tokens are counted, these are the ones that the tokenizer learned first.
        """
        names, often = [], -np.arange(len(self.labels)) if self.counted is None else self.counted
        for j in range(int(clusters.max()) + 1):
            rows = np.flatnonzero(clusters == j)
            names.append("  ".join(self.labels[i] for i in rows[np.argsort(-often[rows])[:3]]))
        return tuple(names)


class TimeAtlas(TokenAtlas):
    """The tables of a run over its snapshots, one frame per snapshot, on the axes of the last one."""

    def __init__(self, identifiers: Sequence[str], counts: np.ndarray | None = None) -> None:
        """Open the snapshots of a run.

        Args:
            identifiers: snapshots of the run in order, such as base/d4@snap:64.
            counts: as in TokenAtlas.

        Raises:
            ConfigError: there are fewer than two snapshots.
        """
        if len(identifiers) < 2:
            raise ConfigError(f"{len(identifiers)} snapshot(s) show no motion; give two or more.")
        self.opened = [open_model(name) for name in identifiers]
        model, tokenizer, _ = self.opened[-1]
        super().__init__(model, tokenizer, counts)
        self.steps = tuple(int(meta["step"]) for _, _, meta in self.opened)

    def load(self, space: str) -> np.ndarray:
        """Return a table at each snapshot, (F, N, C)."""
        frames = [self.scale(space, tables.read_table(model, space)) for model, _, _ in self.opened]
        size = sum(x.nbytes for x in frames)
        if size > MAX_BYTES:
            raise ConfigError(
                f"{space} over {len(frames)} snapshots takes {size / 2**30:.1f} GB, at most "
                f"{MAX_BYTES >> 30} GB are shown; give fewer snapshots."
            )
        return np.stack(frames)

    def describe(self, space: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Channel, ...]]:
        """Return the labels and channels of the tokens, with one frame per snapshot."""
        labels, _, channels = super().describe(space)
        return labels, tuple(f"{step:,}" for step in self.steps), channels


class TextAtlas(Atlas):
    """The hidden states of a text in a model: one point per token, one frame per layer."""

    fits_last = False  # the axes are fitted on all layers together

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__({"states": "hidden states of the text"})
        self.model, self.tokenizer = model, tokenizer
        self.stages: tuple[str, ...] = ()

    def read(self, text: str) -> None:
        """Read a new text, preceded by <|bos|> and cut to the model's context.

        Raises:
            ConfigError: the text has fewer than five tokens.
        """
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)][: self.model.sequence_len]
        if len(ids) < 6:
            raise ConfigError(
                f"text={text[:40]!r} has {len(ids) - 1} tokens and must have five; write more."
            )
        self.stages, states = tables.read_states(self.model, ids)
        self.ids, self.surprise = np.array(ids), tables.measure_surprise(self.model, ids)
        self.vectors, self.clouds = {"states": states}, {}

    def load(self, space: str) -> np.ndarray:
        """Raise ConfigError, as no text has been read."""
        raise ConfigError("No text has been read; call read(text) first.")

    def describe(self, space: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Channel, ...]]:
        """Return the labels and channels of a text's tokens, with one frame per stage."""
        kinds = tables.sort_kinds(self.tokenizer)
        channels = (
            Channel(
                key="place", title="place in the text", values=np.arange(len(self.ids)), whole=True
            ),
            Channel(key="surprise", title="surprise, nats", values=self.surprise),
            Channel(key="kind", title="kind of token", values=kinds[self.ids], names=tables.KINDS),
        )
        labels = tuple(tables.name_token(self.tokenizer, i) for i in self.ids)
        return labels, tuple(map(name_stage, self.stages)), channels


def name_stage(stage: str) -> str:
    """Return a description of a stage of the stream."""
    words = {"embed": "entering layer 0", "last": "before the output"}
    return words.get(stage) or f"after layer {stage.split('.')[1]}"
