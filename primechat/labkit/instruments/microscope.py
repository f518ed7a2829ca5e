"""The instruments of lab 02: one model and one text under many views that move together.

Hides: which view must hear of which change. Each view is a widget that gets plain data; what the reader does
to it comes back as a changed trait. Views behind a summary are worked for once they are opened.
Reference: primechat.views.widgets, heads, switches, stream and scores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from primechat.errors import ConfigError, PrimechatError
from primechat.interp import circuits
from primechat.interp.hooks import capture
from primechat.labkit import start_stop
from primechat.labkit.instruments import survey
from primechat.labkit.instruments.scene import Scene, save_copying, spell_tokens
from primechat.views.widgets.attention.heads import HeadView, PromptBar
from primechat.views.widgets.attention.scores import NeuronView, ScoreView
from primechat.views.widgets.attention.stream import LensView, PatchView, ShareView, TimeView
from primechat.views.widgets.attention.switches import SwitchView
from primechat.views.widgets.kit import Widget

TEXT = "My sister has a small dog. My sister has a big cat. I like the dog, but I love the cat."
CLEAN, CORRUPT = "I have a dog. My", "I am a dog. My"
SLICE_S = 0.4  # work between two answers to the page
SMALL = 50_000_000  # parameters up to which a control is tried unasked


class Microscope:
    """A model and a text under every view of lab 02; the `identifier` of `picker` is read and observed."""

    def __init__(self, picker: Any, text: str = TEXT) -> None:
        self.picker = getattr(picker, "widget", picker)  # marimo wraps a widget
        self.prompt = PromptBar(text=text)
        self.followers: list[tuple[str, Callable[[], None]]] = []
        self.open_named(self.picker.identifier)
        self.read_text()
        self.picker.observe(lambda change: self.change_model(), "identifier")
        self.prompt.observe(lambda change: self.change_text(), "text")

    # ---- the model and the text

    def open_named(self, identifier: str) -> None:
        """Open a model; raises PrimechatError."""
        from primechat.labkit.lab import borrow_model

        self.model, self.tokenizer, self.meta = borrow_model(identifier)
        self._control: Any = None
        self._passages: np.ndarray | None = None
        self._strips: list[dict[str, Any]] | None = None
        self.head = [0, 0]

    def encode_text(self, text: str) -> np.ndarray:
        """Return bos and the tokens of a text, cut at the context."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        return np.array(ids[: self.model.sequence_len], dtype=np.int64)

    def read_text(self) -> None:
        """Read the prompt's text; one that is too short leaves what was read before."""
        n, room = len(self.tokenizer.encode(self.prompt.text)) + 1, self.model.sequence_len
        cut = f"; only the first {room} are read" if n > room else ""
        self.prompt.status = f"{n} of {room} tokens, the mark that begins every text included{cut}"
        self.prompt.problem = "" if n > 2 else "Type at least two tokens."
        if n > 2 or not hasattr(self, "scene"):
            ids = self.encode_text(self.prompt.text if n > 2 else TEXT)
            self.scene = Scene(self.model, self.tokenizer, ids)
            self.at = len(ids) - 1
            self._control_scene: Scene | None = None
            self._copy: Scene | None = None

    def change_model(self) -> None:
        """Open the model that the reader chose; the old one stays if that fails."""
        self.prompt.status = f"opening {self.picker.identifier} …"
        try:
            self.open_named(self.picker.identifier)
        except PrimechatError as error:
            self.prompt.problem = str(error)
            return
        self.scene = Scene(self.model, self.tokenizer, self.encode_text(TEXT))
        self.change_text()

    def change_text(self) -> None:
        """Read the new text and tell every view."""
        self.read_text()
        self.update_views()

    def update_views(self, changed: str = "") -> None:
        """Bring every view up to date that heeds what changed: at, head, or empty for model or text."""
        for heeds, follower in self.followers:
            if changed in heeds:
                follower()

    @property
    def control(self) -> Scene:
        """The same text read by the same model with random numbers in its blocks."""
        if self._control is None:
            self._control = circuits.shuffle_blocks(self.model)
        if self._control_scene is None:
            self._control_scene = Scene(self._control, self.tokenizer, self.scene.ids)
        return self._control_scene

    @property
    def is_small(self) -> bool:
        """Whether every part of the model can be tried on many passages in a few seconds."""
        return bool(self.scene.body.n_params <= SMALL)

    @property
    def passages(self) -> np.ndarray:
        """Held-out passages (N, T): what is said of a head is said of all of them."""
        if self._passages is None:
            self._passages = survey.draw_passages(self.model, self.tokenizer)
        return self._passages

    @property
    def strips(self) -> list[dict[str, Any]]:
        """What every head is like, means over the passages, beside random numbers."""
        if self._strips is None:
            control = self.control.model
            copies = [repeat_passage(row) for row in self.passages]
            plain, copied = (
                (survey.average_scores(self.model, texts), survey.average_scores(control, texts))
                for texts in (list(self.passages), copies)
            )
            self._strips = list(list_strips(plain, copied, self.passages.shape[1]))
        return self._strips

    @property
    def mixed_rows(self) -> np.ndarray:
        """The control of copying (N, T): as `copy_scene`, but each second half in an order of its own."""
        bos, words = self.copy_scene.ids[:1], self.copy_scene.ids[1:]
        return np.stack([np.concatenate([bos, row]) for row in circuits.mix_second(words)])

    @property
    def copy_scene(self) -> Scene:
        """The text's words in a random order, and once more."""
        if self._copy is None:
            room = (self.model.sequence_len - 1) // 2
            words = circuits.repeat_text(self.scene.ids[1:], n_tokens=min(40, room))
            self._copy = Scene(
                self.model, self.tokenizer, np.concatenate([self.scene.ids[:1], words])
            )
        return self._copy

    def save_mixed(self, off: list[str]) -> dict[str, float]:
        """Return what words said again in another order save, with everything on and with parts off."""

        def save(parts: list[str]) -> float:
            losses = circuits.measure_losses(self.model, self.mixed_rows, parts)
            return float(np.mean([save_copying(row) for row in losses]))

        return {"mixed_base": save([]), "mixed": save(off)}

    # ---- the views

    def follow(
        self, view: Widget, refresh: Callable[[], None], names: list[str], heeds: str = "at head"
    ) -> Any:
        """Refresh a view now, and when the text, the model, one of `heeds` or one of its `names` changes."""
        busy: list[bool] = []

        def run(change: Any = None) -> None:
            if busy or not getattr(view, "opened", True):
                return
            busy.append(True)  # what the refresh itself sets is no wish of the reader's
            try:
                refresh()
            except PrimechatError as error:  # this model has not what the view needs: it says so
                view.data = {"problem": str(error)}
            finally:
                busy.clear()

        self.followers.append((heeds, run))
        if start_stop.still and view.has_trait("opened"):
            view.set_trait("opened", True)  # a page to read has nobody to open it later
        view.observe(run, [*names, *(["opened"] if view.has_trait("opened") else [])])
        run()
        return view

    def link(self, view: Any, name: str) -> None:
        """Make a trait of a view and the microscope's value one."""

        def share(change: Any) -> None:
            if change["new"] != getattr(self, name):
                setattr(self, name, change["new"])
                self.update_views(name)

        view.observe(share, name)

    def look(self) -> HeadView:
        """Return the view of all heads."""
        view = HeadView(at=self.at, head=self.head)

        def refresh() -> None:
            scene = self.control if view.control else self.scene
            thumbs, _ = scene.overview
            weights = scene.read_head(*self.head)
            with view.hold_sync():
                view.head, view.at, view.tokens = list(self.head), self.at, scene.tokens
                view.thumbs = thumbs.tobytes()
                view.pattern = np.rint(65535 * weights).astype(np.uint16).tobytes()
                view.data = {
                    "n_layer": scene.body.n_layer,
                    "n_head": scene.body.n_head,
                    "side": thumbs.shape[-1],
                    "head": list(self.head),
                }

        self.follow(view, refresh, ["control"])
        self.link(view, "at")
        self.link(view, "head")
        return view

    def ablate(self) -> SwitchView:
        """Return the board of switches."""
        view, trial = SwitchView(at=self.at), Trial(self)

        def refresh() -> None:
            scene = self.copy_scene if view.test == "copy" else self.scene
            known = set(circuits.list_parts(scene.body))
            view.off = [part for part in view.off if part in known]
            cut = capture(scene.model, scene.ids, points=("last",), ablate=view.off)
            at = self.at if view.test == "text" else min(self.at, len(scene.ids) - 1)
            before = scene.guess_next(at)
            after = scene.guess_next(at, cut)
            places = np.argsort(-np.maximum(before, after), kind="stable")[:8]
            names = spell_tokens(scene.tokenizer, places)
            with view.hold_sync():
                view.at = at
                view.data = {
                    "n_layer": scene.body.n_layer,
                    "n_head": scene.body.n_head,
                    "tokens": scene.tokens,
                    "base": scene.loss,
                    "loss": float(cut.losses.mean()),
                    "deltas": [0.0, *(cut.losses - scene.seen.losses).astype(float).tolist()],
                    "saved_base": save_copying(scene.seen.losses),
                    "saved": save_copying(cut.losses),
                    **(self.save_mixed(view.off) if view.test == "copy" else {}),
                    "guesses": [
                        {"label": name, "value": float(after[i]), "before": float(before[i])}
                        for i, name in zip(places, names, strict=True)
                    ],
                    **trial.report(scene, view.wish, view.test == "copy"),
                }

        self.follow(view, refresh, ["off", "test", "wish"], "at")
        self.link(view, "at")
        return view

    def lens(self) -> LensView:
        """Return the logit lens."""
        view = LensView(at=self.at)

        def refresh() -> None:
            scene = self.control if view.control else self.scene
            with view.hold_sync():
                view.at = self.at
                view.data = scene.lens_table

        self.follow(view, refresh, ["control"], "at")
        self.link(view, "at")
        return view

    def shares(self) -> ShareView:
        """Return the attribution of a logit to parts."""
        view = ShareView(at=self.at)

        def refresh() -> None:
            scene = self.scene
            probs = scene.guess_next(self.at)
            guesses = scene.name_guesses(probs, 6)
            token = view.token if view.token in [i for i, _, _ in guesses] else guesses[0][0]
            found = circuits.attribute(scene.model, scene.seen, self.at, token)
            cap = getattr(scene.body, "softcap", 0.0)
            with view.hold_sync():
                view.at, view.token = self.at, token
                view.data = {
                    "tokens": scene.tokens,
                    "parts": list(found.parts),
                    "values": found.values.tolist(),
                    "words": [say_part(part) for part in found.parts],
                    "logit": found.logit,
                    "capped": cap * math.tanh(found.logit / cap) if cap else found.logit,
                    "label": next(text for i, text, _ in guesses if i == token),
                    "guesses": [{"id": i, "label": text, "value": p} for i, text, p in guesses],
                }

        self.follow(view, refresh, ["token"], "at")
        self.link(view, "at")
        return view

    def scores(self) -> ScoreView:
        """Return the strips of head scores over held-out passages, with those of random numbers."""
        view = ScoreView(head=self.head)

        def refresh() -> None:
            with view.hold_sync():
                view.head = list(self.head)
                view.data = {"strips": self.strips, "passages": len(self.passages)}

        self.follow(view, refresh, [], "head")
        self.link(view, "head")
        return view

    def neurons(self) -> NeuronView:
        """Return one attention score taken apart."""
        view = NeuronView(key=0)

        def refresh() -> None:
            scene, (layer, head) = self.scene, self.head
            body, at = scene.body, self.at
            if "attn.q" not in body.layer_points:
                raise ConfigError(
                    "Queries and keys can be seen in models of ours only; choose one above."
                )
            key = view.key if view.key <= at else at
            names = [
                f"layer.{layer}.attn.{part}" for part in ("q_raw", "k_raw", "q", "k", "weights")
            ]
            seen = capture(scene.model, scene.ids, points=names)
            group = head // (body.n_head // body.n_kv_head)
            asks, offers = seen[names[0]][at, head], seen[names[1]][key, group]
            q, k = seen[names[2]][at, head], seen[names[3]][key, group]
            bands = [
                (f"query as projected{say_length(asks)}", asks),
                (f"turned by place, normed{say_length(q)}", q),
                (f"key as projected{say_length(offers)}", offers),
                (f"turned by place, normed{say_length(k)}", k),
                ("query times key", q * k),
            ]
            product = float((q * k).sum())
            with view.hold_sync():
                view.key = key
                view.data = {
                    "tokens": scene.tokens,
                    "at": at,
                    "layer": layer,
                    "head": head,
                    "product": product,
                    "bands": [{"name": name, "values": values.tolist()} for name, values in bands],
                    "scale": body.scale,
                    "score": body.scale * product,
                    "weight": float(seen[names[4]][head, at, key]),
                }

        return self.follow(view, refresh, ["key"])

    def patching(self) -> PatchView:
        """Return the view of states carried between two prompts."""
        view = PatchView(clean=CLEAN, corrupt=CORRUPT)

        def refresh() -> None:
            view.data = {**patch_prompts(self, view.clean, view.corrupt)}

        return self.follow(view, refresh, ["clean", "corrupt"], "")

    def time_machine(self) -> TimeView:
        """Return the slider over snapshots."""
        from primechat.labkit.instruments.timelapse import Timelapse

        return Timelapse(self).view


class Trial:
    """Each part switched off alone, a slice of time at a time: the page stays alive and can stop it."""

    def __init__(self, scope: Microscope) -> None:
        self.scope = scope
        self.scene: Scene | None = None
        self.walk: Iterator[tuple[str, float]] = iter(())
        self.found: dict[str, float] = {}
        self.worst: float | None = None
        self.turn = 0

    def report(self, scene: Scene, wish: int, copying: bool = False) -> dict[str, Any]:
        """Go on if the page wishes so; return what is known by now: loss gained, or copying lost.

        The control with random blocks is the largest change there, or what copying saves there.
        """
        measure: dict[str, Any] = (
            {"measure": lambda losses: -save_copying(losses)} if copying else {}
        )
        if scene is not self.scene:
            self.scene, self.found, self.worst, self.turn = scene, {}, None, wish
        parts = circuits.list_parts(scene.body)
        running = False
        if wish > 0 and wish != self.turn:
            if len(self.found) in (0, len(parts)):
                self.found = {}
                self.walk = circuits.scan_ablations(scene.model, scene.ids, **measure)
            t_start = time.monotonic()
            for part, change in self.walk:
                self.found[part] = change
                if time.monotonic() - t_start > SLICE_S:
                    break
            running = len(self.found) < len(parts)
            if not running and self.worst is None and scene.body.n_params <= SMALL:
                control = self.scope.control.model
                if copying:
                    self.worst = save_copying(capture(control, scene.ids).losses)
                else:
                    changes = circuits.scan_ablations(control, scene.ids)
                    self.worst = max(abs(change) for _, change in changes)
        self.turn = wish
        return {
            "scan": self.found or None,
            "scanning": f"{len(self.found)} of {len(parts)} tried …" if running else "",
            "turn": wish,
            "control": self.worst,
        }


def say_length(x: np.ndarray) -> str:
    """Return a vector's length as part of a label."""
    return f", length {np.linalg.norm(x):.1f}"


def say_part(part: str) -> str:
    """Return a part's name in words."""
    if not part.startswith("layer."):
        return {"token": "its embedding", "smear": "token before"}.get(part, part)
    _, layer, kind, *head = part.split(".")
    return f"layer {layer}, {'head ' + head[0] if head else kind.upper()}"


def repeat_passage(ids: np.ndarray) -> np.ndarray:
    """Return a passage (T,) as its words in a random order, twice, behind its first mark: at most T long."""
    words = circuits.repeat_text(ids[1:], n_tokens=(len(ids) - 1) // 2)
    return np.concatenate([ids[:1], words])


Averages = tuple[circuits.HeadScores, circuits.HeadScores]  # means over passages, half intervals


def list_strips(
    plain: tuple[Averages, Averages], copied: tuple[Averages, Averages], n_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the strips: what is measured on passages, and copying on their words said twice; each of the
    model and of random numbers.
    """
    bits = float(np.log2(np.arange(2, n_tokens + 1)).mean())  # of reading all that is visible alike
    text = "share of attention on"
    again = f"{text} tokens that followed the same word before, on shuffled words said twice"
    far = "mean distance of what it reads"
    spread = "entropy: 0 is one token, the right end all that it sees alike"
    rows = [
        ("previous", "Looks one back", f"{text} the token before", "%", plain, 1.0),
        ("first", "Rests on the first token", f"{text} the mark that begins a text", "%", plain, 1),
        ("induction", "Looks for what came next last time", again, "%", copied, 1.0),
        ("distance", "Looks far back", far, "tokens", plain, n_tokens / 2),
        ("entropy", "Spreads its attention", spread, "bits", plain, bits),
    ]

    def clean(scores: circuits.HeadScores, field: str) -> list[list[float | None]]:
        values = getattr(scores, field).tolist()
        return [[None if math.isnan(v) else v for v in row] for row in values]

    for field, name, meaning, unit, ((means, halves), (control, _)), hi in rows:
        yield {
            "name": name,
            "meaning": meaning,
            "unit": unit,
            "lo": 0.0,
            "hi": hi,
            "values": clean(means, field),
            "halves": clean(halves, field),
            "control": clean(control, field),
        }


def patch_prompts(scope: Microscope, clean: str, corrupt: str) -> dict[str, Any]:
    """Return the grid of two prompts as shares of the way, or the reason why there is none."""
    rows = [scope.encode_text(text) for text in (clean, corrupt)]
    words = [spell_tokens(scope.tokenizer, row) for row in rows]
    if len(rows[0]) != len(rows[1]) or len(rows[0]) < 2:
        return {
            "problem": f"The prompts have {len(rows[0])} and {len(rows[1])} tokens; they must have equally "
            "many, so that each state has its place. Change a word."
        }
    first, second = (capture(scope.model, row).last.astype(np.float64) for row in rows)
    likely = np.union1d(np.argsort(-first)[:12], np.argsort(-second)[:12])
    lead = (first - second)[likely]
    best = [int(likely[lead.argmax()]), int(likely[lead.argmin()])]
    grid, top, bottom = circuits.patch_grid(scope.model, rows[0], rows[1], *best)
    if abs(top - bottom) < 1e-3:
        return {"problem": "The model expects the same after both prompts; change a word."}
    stages = ["embedding", *(f"layer {i}" for i in range(len(grid) - 1))]
    return {
        "problem": "",
        "grid": ((grid - bottom) / (top - bottom)).tolist(),
        "stages": stages,
        "tokens": [list(pair) for pair in zip(*words, strict=True)],
        "answers": spell_tokens(scope.tokenizer, best),
    }
