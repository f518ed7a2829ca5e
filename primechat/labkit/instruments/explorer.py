"""The instruments of lab 03: a model's tables under a map and under measures, all following the picker.

Hides: what must be drawn anew when the model changes. Figures are drawn as they come into being, once for
each table. Reference: primechat.interp.embeddings, primechat.views.widgets.atlas.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from primechat.errors import ConfigError, PrimechatError
from primechat.interp.embeddings import maps, tables
from primechat.interp.embeddings.atlas import N_NEAR, TextAtlas, TimeAtlas, TokenAtlas, name_stage
from primechat.interp.hooks import capture
from primechat.labkit import start_stop
from primechat.labkit.instruments.timelapse import find_run
from primechat.text.corpora import read_documents
from primechat.views import geometry
from primechat.views.widgets.atlas import AtlasView
from primechat.views.widgets.controls import Live

TEXT = "My sister has a small dog. My sister has a big cat. I like the dog, but I love the cat."
TRENDS = ("those of frequent tokens", "those of rare tokens", "neither")
WISHES = (
    " good",
    " happy",
    " music",
    " day",
)  # tokens to begin with, where the vocabulary has them


class Explorer:
    """A model's tables under every view of lab 03."""

    def __init__(self, picker: Any) -> None:
        self.picker = getattr(picker, "widget", picker)  # marimo wraps a widget
        self.followers: list[Callable[[], Any]] = []
        self.open_named(self.picker.identifier)
        self.view = AtlasView(self.atlas, colour="kind", picked=self.choose_token())
        self.picker.observe(lambda change: self.change_model(), "identifier")

    def open_named(self, identifier: str) -> None:
        """Open a model; raises PrimechatError."""
        from primechat.labkit.lab import borrow_model

        self.model, self.tokenizer, _ = borrow_model(identifier)
        self.atlas = TokenAtlas(self.model, self.tokenizer)
        if (
            start_stop.still or not start_stop.in_notebook()
        ):  # no page will ask for what the first picture leaves out
            self.atlas.complete()

    def change_model(self) -> None:
        """Follow the picker; what cannot be opened is told beside the map."""
        self.view.notice = f"Opening {self.picker.identifier} …"
        try:
            self.open_named(self.picker.identifier)
            self.view.take_source(self.atlas, picked=self.choose_token())
        except PrimechatError as error:
            self.view.problem = str(error)
            return
        finally:
            self.view.notice = ""
        for follow in self.followers:
            follow()

    def choose_token(self) -> int:
        """Return a token to begin with: one of WISHES, else a frequent long word."""
        for text in WISHES:
            if len(ids := self.tokenizer.encode(text)) == 1:
                return ids[0]
        long = np.array([len(label) > 4 for label in self.atlas.labels]) & (self.atlas.kinds == 0)
        return int(np.where(long, self.atlas.counts, -1).argmax())

    def find_token(self, text: str) -> int:
        """Return the one token that a word is, with a space before it or without.

        Raises:
            ConfigError: it is several.
        """
        for form in (text.replace("·", " "), " " + text):
            if form.strip() and len(ids := self.tokenizer.encode(form)) == 1:
                return ids[0]
        pieces = " | ".join(
            tables.name_token(self.tokenizer, i) for i in self.tokenizer.encode(" " + text)
        )
        raise ConfigError(
            f"{text!r} is not one token of this model but {pieces}; take a word from the map."
        )

    def live(self, function: Callable[..., Any], **controls: Any) -> Live:
        """Return a control over a function, drawn when the page comes to it and when the model changes."""
        made = Live(function, lazy=start_stop.in_notebook() and not start_stop.still, **controls)
        self.followers.append(made.refresh)
        return made

    # ---- how far the map lies

    @property
    def kept(self) -> float:
        """Of ten true neighbours of a token, how many the flat PCA map of the input embeddings keeps."""
        return N_NEAR * self.atlas.show("input").kept[-1]

    def compare_maps(self) -> Live:
        """Return a figure of what each kind of map keeps, beside chance and a cloud without any structure."""

        def draw(table: str) -> Any:
            space = self.find_space(table)
            vectors = self.atlas.fetch(space)[-1]
            noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
            flat = maps.fit_basis(noise, 2).project(noise)
            blind, chance = maps.measure_neighbour_overlap(noise, flat, N_NEAR, 256)
            controls = (("random places", chance), ("PCA, 2-D, of random numbers", blind))
            rows = [(name, N_NEAR * kept, True) for name, kept in controls]
            for method, n_axes in (("PCA", 2), ("PCA", 3), ("UMAP", 2), ("UMAP", 3)):
                if method == "PCA" or (space, method, n_axes) in self.atlas.clouds:
                    kept = self.atlas.show(space, method, n_axes).kept[-1]
                    rows.append((f"{method}, {n_axes}-D", N_NEAR * kept, False))
            title = "True neighbours that are neighbours on the map too"
            return geometry.draw_bars(rows, title=title, unit=f"of {N_NEAR} nearest", digits=2)

        made = self.live(draw, table=list(self.atlas.spaces.values()))
        self.view.observe(lambda change: made.refresh(), "method")
        return made

    def find_space(self, title: str) -> str:
        """Return the key of a space; the first where this model has no such one."""
        keys = {text: key for key, text in self.atlas.spaces.items()}
        return keys.get(title, next(iter(self.atlas.spaces)))

    # ---- relations

    def ask_analogy(self) -> Live:
        """Return a form for a : b = c : ?, with the answers beside those that need no analogy."""
        pairs = [
            pair
            for rule in ("-ing", "plural", "capital letter")
            for pair in self.pick_pairs(rule, 2)
        ]
        (a, b), (c, _) = pairs[:2] if len(pairs) > 1 else [("a", "b"), ("c", "d")]

        def answer(question: str) -> Any:
            words = [word.strip(" ?") for word in re.split("[:=]", question)]
            if len(words) < 3 or len([w for w in words if w]) != 3:
                raise ConfigError(
                    f"{question[:60]!r} must be like {a} : {b} = {c}, three words in all."
                )
            rows = [self.find_token(word) for word in words if word]
            table = self.atlas.fetch("input")[-1]
            real, near = tables.answer_analogy(table, *rows)
            rng = np.random.default_rng(rows)
            likely = np.flatnonzero(self.atlas.counts > np.median(self.atlas.counts))
            other = int(rng.choice(likely[~np.isin(likely, rows)]))
            shuffled, _ = tables.answer_analogy(table, rows[0], other, rows[2])
            name = self.atlas.labels
            return [
                {
                    "c + b − a": f"{name[i]}  ({x:.2f})",
                    "nearest to c alone": f"{name[j]}  ({y:.2f})",
                    f"control: {name[other]} in the place of b": f"{name[k]}  ({z:.2f})",
                }
                for (i, x), (j, y), (k, z) in zip(real, near, shuffled, strict=True)
            ]

        return self.live(
            answer, question=f"{a} : {b} = {c} : ?", labels={"question": "a : b = c : ?"}
        )

    def pick_pairs(self, rule: str, n: int) -> list[tuple[str, str]]:
        """Return the n pairs of a rule whose second word is seen most."""
        pairs = tables.find_pairs(self.tokenizer, rule)
        pairs.sort(key=lambda pair: -int(self.atlas.counts[list(pair)].min()))
        text = self.tokenizer.decode
        return [(text([i]).strip(), text([j]).strip()) for i, j in pairs[:n]]

    def score_rules(self) -> Live:
        """Return a figure of how often each relation is answered right, beside both controls."""

        def draw(table: str) -> Any:
            vectors = self.atlas.fetch(self.find_space(table))[-1]
            found = [
                tables.score_analogies(self.tokenizer, vectors, rule, max_questions=600)
                for rule in tables.RULES
            ]
            rows = []
            for s in (score for score in found if score is not None):
                a, b = (text.replace(" ", "·") for text in s.pairs[-1])
                rows.append(
                    (f"{s.rule}\n{a} → {b}", [100 * s.offset, 100 * s.near, 100 * s.shuffled])
                )
            if not rows:
                return "This vocabulary has too few pairs of related tokens."
            names = ("c + b − a", "nearest to c alone", "a random step")
            title = "a : b = c : ?   answered with the right token of all"
            return geometry.draw_groups(rows, names, title=title, unit="% of questions")

        return self.live(draw, table=list(self.atlas.spaces.values()))

    # ---- lengths and directions

    def find_trend(self, table: str = "input") -> tuple[str, str]:
        """Return which of TRENDS holds for a table, and the measure in words."""
        real, shuffled = self.correlate(table)
        trend = TRENDS[2] if abs(real) < 0.15 else TRENDS[0] if real > 0 else TRENDS[1]
        return (
            trend,
            f"Rank correlation of length with frequency {real:+.2f}; with shuffled lengths {shuffled:+.2f}.",
        )

    def correlate(self, space: str) -> tuple[float, float]:
        """Return the rank correlation of frequency and length, and the same of shuffled lengths."""
        self.atlas.fetch(space)
        counts, norms = self.atlas.counts, self.atlas.norms[space]
        mixed = np.random.default_rng(0).permutation(norms)
        return maps.rank_correlation(counts, norms), maps.rank_correlation(counts, mixed)

    def describe_lengths(self, space: str) -> str:
        """Return how long the rows are of tokens that the sample never holds, and of all others; of a table
        that scores the next token also whether a long row means a high score.
        """
        self.atlas.fetch(space)
        norms, unseen = self.atlas.norms[space], self.atlas.counts == 0
        said = []
        if unseen.any() and not unseen.all():
            never, others = (float(np.median(norms[rows])) for rows in (unseen, ~unseen))
            said.append(
                f"Median length: {never:.1f} for the {unseen.sum():,} tokens that the sample never holds, "
                f"{others:.1f} for the others."
            )
        if "output" in self.atlas.spaces[space]:
            ids = self.draw_text()
            scores = self.measure_scores(ids)
            real = maps.rank_correlation(norms, scores)
            mixed = maps.rank_correlation(np.random.default_rng(0).permutation(norms), scores)
            said.append(
                f"Rank correlation of length with the mean score (logit) of the token over {len(ids)} "
                f"tokens of held-out text: {real:+.2f}; with shuffled lengths {mixed:+.2f}."
            )
        return " ".join(said)

    def measure_scores(self, ids: list[int]) -> np.ndarray:
        """Return the mean logit (V,) that each token gets over the places of a text."""
        logits = capture(self.model, ids, points=("logits",))["logits"]
        return logits.mean(axis=0)[: len(self.atlas.labels)]

    def draw_lengths(self) -> Live:
        """Return a figure of length against frequency beside shuffled lengths, and what it shows in words."""

        def draw(table: str) -> Any:
            space = self.find_space(table)
            real, shuffled = self.correlate(space)
            figure = geometry.draw_norms(
                self.atlas.counts,
                self.atlas.norms[space],
                self.atlas.labels,
                real=real,
                shuffled=shuffled,
                title="length of the vector",
            )
            return [figure, self.describe_lengths(space)]

        return self.live(draw, table=list(self.atlas.spaces.values()))

    def draw_evenness(self) -> Live:
        """Return figures of how evenly each table's vectors point, beside random numbers."""

        def draw() -> Any:
            shape = self.atlas.fetch("input")[-1].shape
            noise = maps.measure_isotropy(np.random.default_rng(0).normal(size=shape))
            cosines, widths = ([("random numbers", x, True)] for x in (noise.cosine, noise.n_axes))
            for key, title in self.atlas.spaces.items():
                found = maps.measure_isotropy(self.atlas.fetch(key)[-1])
                cosines.append((title, found.cosine, False))
                widths.append((title, found.n_axes, False))
            for name, states in zip(*tables.read_states(self.model, self.draw_text()), strict=True):
                title = f"states of a text, {name_stage(name)}"
                cosines.append((title, maps.measure_isotropy(states).cosine, False))
            lean, use = (
                "Do all vectors lean one way?",
                f"How many of {shape[1]} axes carry the differences?",
            )
            return [
                geometry.draw_bars(cosines, title=lean, unit="mean cosine of two tokens", digits=2),
                geometry.draw_bars(widths, title=use, unit="axes in use", digits=0),
            ]

        return self.live(draw)

    # ---- time and text

    def draw_text(self) -> list[int]:
        """Return the ids of a text that the model was not trained on, as long as its context, at most 256."""
        text = "\n".join(islice(read_documents("chitchat", "val"), 8))
        return self.tokenizer.encode(text)[: min(256, self.model.sequence_len)]

    def travel(self) -> tuple[Any, Any]:
        """Return the map over the snapshots of a run, and a figure of how related tokens find each other."""
        run, steps = find_run(self.picker.identifier)
        if not steps:
            told = Live(lambda: "No run here has snapshots; train one with `primechat pretrain`.")
            return told, Live(lambda: None)
        time = TimeAtlas([f"{run}@snap:{step}" for step in steps])
        frames = time.fetch("input")
        related = [
            pair for rule in tables.RULES for pair in tables.find_pairs(time.tokenizer, rule)
        ]
        a, b = np.array(related, dtype=np.int64).reshape(-1, 2).T
        mixed = np.random.default_rng(0).permutation(b)

        def course() -> Any:
            lines = {
                "related": [float((x[a] * x[b]).sum(1).mean()) for x in frames],
                "shuffled pairs": [float((x[a] * x[mixed]).sum(1).mean()) for x in frames],
            }
            title = (
                f"{len(a)} related pairs, such as “{time.labels[a[-1]]}” and “{time.labels[b[-1]]}”"
            )
            return geometry.draw_course(
                time.steps,
                lines,
                title=title,
                x_label="step of training",
                y_label="mean cosine",
                controls=["shuffled pairs"],
            )

        film = AtlasView(
            time, colour="kind", picked=self.choose_token(), frame=0, frame_word="Step"
        )
        return film, self.live(course)

    def read_text(self, text: str = TEXT) -> AtlasView:
        """Return the map of a text's hidden states, layer by layer."""
        source = TextAtlas(self.model, self.tokenizer)
        made = AtlasView(source, text=text, colour="place", frame_word="Stage")

        def follow() -> None:
            source.model, source.tokenizer = self.model, self.tokenizer
            try:
                made.answer_read(made.text)
            except PrimechatError as error:
                made.problem = str(error)

        self.followers.append(follow)
        return made
