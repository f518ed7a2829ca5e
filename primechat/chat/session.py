"""A conversation that a page shows: a tree of messages, the model behind it, and a thread that writes.

Hides: time. What the page asks for is answered at once; replies are written on a worker thread that reports
by `push`, and `stop` is heard within one token. Each session has its own tree and settings, so people on one
server do not see each other; only models are shared, and nothing here changes them.
Reference: primechat.views.widgets.chat, the page; primechat.infer.engine.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from primechat.chat.tree import (
    Advice,
    ChatSettings,
    Message,
    Talk,
    is_base,
    read_jsonl,
    write_jsonl,
)
from primechat.config.runtime import SAMPLING
from primechat.errors import ConfigError, explain_error
from primechat.events import Token
from primechat.seeds import derive_seed

if TYPE_CHECKING:
    from primechat.infer.reply import Reply

Opener = Callable[
    [str], tuple[Any, Any, dict[str, Any]]
]  # identifier -> model, tokenizer, metadata
Push = Callable[[dict[str, Any]], bool]  # to the page; False once nobody listens any more

MAX_COMPARED = 4
N_ALTERNATIVES = 8
FLUSH_S = 0.04  # between two reports of a reply: 25 a second are smooth
logger = logging.getLogger(__name__)


class ChatSession:
    """What one page talks to.

    Args:
        push: sends a message to the page; returns False once the page is gone.
        opener: opens a model by its identifier; it is called on the worker thread.
        find_models: returns [{"identifier", "about", "by_product"}] of the models that can be chosen.
    """

    def __init__(
        self,
        push: Push,
        opener: Opener,
        find_models: Callable[[], list[dict[str, Any]]],
        model: str,
        settings: ChatSettings | None = None,
    ) -> None:
        self.push, self.opener, self.find_models = push, opener, find_models
        self.settings = settings or ChatSettings()
        self._nodes: dict[int, Message] = {}
        self._worker: threading.Thread | None = None
        self._advice: dict[str, Advice] = {}  # of the models that have been opened
        self.busy = False  # a reply is being written
        self._cancel = threading.Event()
        self.talks = [Talk(self._add(None, "root"), [model], self.settings.system or None)]
        self.at = 0

    # what the page asks for; each returns its answer

    def act(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Do what the page asks for.

        Raises:
            PrimechatError: it cannot be done; a sentence for the reader.
        """
        acts: dict[str, Callable[..., dict[str, Any] | None]] = {
            "ready": self.show_all,
            "send": self.send,
            "stop": self.stop,
            "edit": self.edit,
            "regenerate": self.regenerate,
            "go_on": self.go_on,
            "branch": self.branch,
            "choose": self.choose,
            "alternatives": self.list_alternatives,
            "models": self.choose_models,
            "settings": self.change,
            "new": self.begin,
            "open": self.open_talk,
            "save": self.save,
            "load": self.load,
        }
        if name not in acts:
            raise ConfigError(f"act={name!r} must be one of {', '.join(acts)}; reload the page.")
        return acts[name](**given) or {}

    @property
    def talk(self) -> Talk:
        """The conversation that is shown."""
        return self.talks[self.at]

    def show_all(self) -> dict[str, Any]:
        """Return everything that the page shows, and open the model meanwhile."""
        if not self.busy:
            self._start([])
        return self.show_first()

    def show_first(self) -> dict[str, Any]:
        """Return what `show_all` does, and open nothing yet."""
        return {**self._draw(), "models": self.find_models()}

    def send(self, text: str) -> None:
        """Add the reader's message and let the chosen models answer."""
        self._refuse_busy()
        if not text.strip():
            raise ConfigError("The message is empty; write something.")
        last = [self.talk.root, *self.talk.walk()][-1]
        asked = last.parent or last
        last = asked if all(x.state == "failed" and not x.content for x in asked.children) else last
        if (
            last.role == "user"
        ):  # no reply came, as it may be too long: the new text takes its place
            last = last.parent or self.talk.root
        self._ask(self._add(last, "user", text))

    def edit(self, id: int, text: str) -> None:
        """Put another message beside one of the reader's, and let it be answered."""
        self._refuse_busy()
        node = self._find(id, "user")
        if not text.strip():
            raise ConfigError("The message is empty; write something.")
        self._ask(self._add(node.parent, "user", text))

    def regenerate(self, id: int) -> None:
        """Let the model answer once more, from other random numbers, beside a reply that is there."""
        self._refuse_busy()
        node = self._find(id, "assistant")
        self._start([self._add(node.parent, "assistant", model=self.talk.chosen[0])])

    def go_on(self, id: int) -> None:
        """Let the model write on where a reply ended."""
        self._refuse_busy()
        node = self._find(id, "assistant")
        node.state = "waiting"
        self._start([node], keep=len(node.tokens))

    def branch(self, id: int, index: int, token: int) -> None:
        """Write a reply anew from its token `index` on, which becomes `token`."""
        self._refuse_busy()
        node = self._find(id, "assistant")
        measured = self._measure(node, index)
        logprobs = dict(measured.alternatives)
        if token not in logprobs:
            raise ConfigError(
                f"token={token} must be one of the {len(logprobs)} alternatives; choose one."
            )
        rank = list(logprobs).index(token)
        forced = Token(
            **{**asdict(measured), "id": token, "logprob": logprobs[token], "rank": rank}
        )
        new = self._add(node.parent, "assistant", model=node.model)
        new.tokens, new.measures = [*node.tokens[:index], token], [*node.measures[:index], forced]
        self._start([new], keep=index + 1)

    def list_alternatives(self, id: int, index: int) -> dict[str, Any]:
        """Return what the model could have written at a token, with probabilities."""
        node = self._find(id, "assistant")
        measured = self._measure(node, index)
        _, tokenizer, _ = self.opener(node.model)
        rows = [
            {
                "id": i,
                "text": tokenizer.token_bytes(i).decode("utf-8", "replace"),
                "p": math.exp(logprob),
            }
            for i, logprob in measured.alternatives
        ]
        return {
            "rows": rows,
            "taken": measured.id,
            "p": math.exp(measured.logprob),
            "rank": measured.rank,
        }

    def choose(self, id: int) -> dict[str, Any]:
        """Show the branch of a message."""
        node = self._find(id)
        assert node.parent, "only the root has none"
        node.parent.pick = node.parent.children.index(node)
        return self._draw()

    def stop(self) -> None:
        """Stop within one token; the text stays."""
        self._cancel.set()

    def choose_models(self, chosen: Sequence[str]) -> dict[str, Any]:
        """Talk to other models from the next message on; several answer side by side."""
        names = list(dict.fromkeys(map(str, chosen)))
        if not 1 <= len(names) <= MAX_COMPARED:
            raise ConfigError(f"{len(names)} models are chosen; 1 to {MAX_COMPARED} can answer.")
        self.talk.chosen = names
        if not self.busy:
            self._start([])
        return self._describe()

    def change(self, **values: Any) -> dict[str, Any]:
        """Change settings; replies from the next on follow them.

        The system message is that of the conversation that is shown; the others keep theirs.
        """
        self.settings = ChatSettings(**{**asdict(self.settings), **values})
        if values.get("system", self.talk.told) != self.talk.told:
            self.talk.system = self.settings.system or None
        return self._describe()

    def begin(self) -> dict[str, Any]:
        """Begin a new conversation; the others stay."""
        self._refuse_busy()
        if self.talk.root.children:
            root = self._add(None, "root")
            self.talks.append(Talk(root, list(self.talk.chosen), self.talk.system))
            self.at = len(self.talks) - 1
        return self._draw()

    def open_talk(self, index: int) -> dict[str, Any]:
        """Show another conversation of this session."""
        self._refuse_busy()
        self.at = min(max(int(index), 0), len(self.talks) - 1)
        return self._draw()

    def save(self) -> dict[str, Any]:
        """Return the session as JSON lines for finetune, one conversation each, the branch that is shown."""
        lines = write_jsonl(self.talks)
        if not lines:
            raise ConfigError("Nothing has been said yet; write a message first.")
        return {"text": "\n".join(lines) + "\n", "name": "conversations.jsonl", "count": len(lines)}

    def load(self, text: str) -> dict[str, Any]:
        """Add conversations from JSON lines, each as it was saved, and show the first of them."""
        self._refuse_busy()
        found = read_jsonl(text)
        at, chosen = len(self.talks), list(self.talk.chosen)
        for messages in found:
            node = root = self._add(None, "root")
            talk = Talk(root, chosen)
            for message in messages:
                if message["role"] == "system":
                    talk.system = message["content"]
                else:
                    node = self._add(node, message["role"], message["content"])
                    node.state = "done"  # also an empty reply
            self.talks.append(talk)
        self.talks = self.talks[at if not self.talk.root.children and at == 1 else 0 :]
        self.at = len(self.talks) - len(found)
        return self._draw()

    # the tree

    def _add(
        self, parent: Message | None, role: str, content: Any = "", model: str = ""
    ) -> Message:
        node = Message(id=len(self._nodes), role=role, content=content, parent=parent, model=model)
        self._nodes[node.id] = node
        if role == "assistant" and not content:
            node.state = "waiting"
        if parent is not None:
            parent.children.append(node)
            parent.pick = len(parent.children) - 1
        return node

    def _find(self, id: int, role: str = "") -> Message:
        node = self._nodes.get(id)
        if node is None or node.role == "root" or (role and node.role != role):
            raise ConfigError(
                f"message {id!r} must be one of this page's {role} messages; reload the page."
            )
        return node

    def _measure(self, node: Message, index: int) -> Token:
        if not 0 <= index < len(node.measures):
            raise ConfigError(
                "This text was not written here, so its alternatives are unknown; regenerate it."
            )
        return node.measures[index]

    def _draw(self) -> dict[str, Any]:
        """Return what the page draws: the branch, and the replies beside those of it."""
        nodes = []
        for node in self.talk.walk():
            nodes += [node, *(self._nodes[id] for id in node.beside if id != node.id)]
        return {**self._describe(), "nodes": [node.view() for node in nodes]}

    def _describe(self) -> dict[str, Any]:
        return {
            "path": [node.id for node in self.talk.walk()],
            "chosen": self.talk.chosen,
            "settings": {**asdict(self.settings), "system": self.talk.told},
            "advice": self._advice,
            "talks": [talk.title for talk in self.talks],
            "at": self.at,
            "busy": self.busy,
        }

    def _ask(self, asked: Message) -> None:
        """Make an empty reply of each chosen model below a message, and have them written."""
        replies = [self._add(asked, "assistant", model=name) for name in self.talk.chosen]
        if len(replies) > 1:
            for reply in replies:
                reply.beside = [node.id for node in replies]
        asked.pick = 0
        self._start(replies)

    # the worker

    def _refuse_busy(self) -> None:
        if self.busy:
            raise ConfigError("A reply is being written; stop it first.")

    def _start(self, replies: list[Message], keep: int = 0) -> None:
        """Write replies on a thread; `keep` tokens of each stand already. Without any, open the models."""
        before = self._worker
        self.busy, self._cancel = bool(replies), threading.Event()
        self._worker = threading.Thread(
            target=self._work, args=(replies, keep, before), daemon=True
        )
        self._worker.start()

    def _work(self, replies: list[Message], keep: int, before: threading.Thread | None) -> None:
        if replies:  # seen at once, also where a model is being opened
            asked = [node for node in [replies[0].parent] if node and node.role != "root"]
            self._tell(
                kind="update",
                nodes=[node.view() for node in [*asked, *replies]],
                **self._describe(),
            )
        if before is not None:
            before.join()
        for name in () if replies else self.talk.chosen:  # before they are needed
            if self._worker is not threading.current_thread():
                break  # a question came: of these models it waits for those alone that are being opened
            try:
                self._open(name)
            except Exception as error:  # told again where it is used
                self._tell(kind="status", text=explain_error(error), fault=True)
        for node in replies:
            if self._cancel.is_set():
                node.state, node.note = "stopped", "Stopped before its first token."
            else:
                try:
                    self._write(node, keep)
                except Exception as error:  # of any model: the page says it, the notebook lives on
                    logger.debug("a reply failed", exc_info=True)
                    node.state, node.note = "failed", explain_error(error)
            self._tell(kind="update", nodes=[node.view()])
        if replies:
            self.busy = False
            self._tell(kind="update", nodes=[], busy=False)

    def _open(self, model: str) -> tuple[Any, Any, dict[str, Any]]:
        is_new = model not in self._advice
        if is_new:
            self._tell(
                kind="status", text=f"Opening {model}{', some ten seconds' * ('hf:' in model)} …"
            )
        opened = self.opener(
            set_dial(model, self.settings.alpha)
        )  # it chooses the threads of this thread
        self._advice[model] = opened[2].get("sampling") or ({}, "")
        if is_new:
            self._tell(kind="update", nodes=[], advice=self._advice)  # takes the line away too
        return opened

    def _write(self, node: Message, keep: int) -> None:
        from primechat.infer.engine import Engine

        model, tokenizer, meta = self._open(node.model)
        node.is_base = is_base({"identifier": node.model, **meta})
        engine = Engine(model, tokenizer)
        prefix = node.tokens[:keep]
        while prefix and prefix[-1] in tokenizer.stop_ids:
            prefix.pop()
        if not node.tokens and node.content and keep == 0 and node.state == "waiting":
            prefix = tokenizer.encode(node.text)  # a loaded reply goes on from its text
        seed, take = self._pick_seed(node, len(prefix))
        options = self.settings.fit(self._advice[node.model], seed, self._cancel)
        reply = engine.reply(self._render(node, tokenizer), prefix, N_ALTERNATIVES, **options)
        node.state, node.note, node.pieces = "writing", "", reply.pieces
        begun, measured = len(reply.pieces), node.measures[: len(prefix)]
        sent, t_flush = 0, 0.0
        for _ in reply:
            if time.perf_counter() - t_flush >= FLUSH_S:
                node.measures = merge_measures(measured, reply, begun)
                rows = node.list_tokens(sent)
                if not self._tell(
                    kind="tokens", id=node.id, at=sent, tokens=rows, stats=asdict(reply.stats)
                ):
                    self._cancel.set()
                sent, t_flush = len(reply.pieces), time.perf_counter()
        node.tokens, node.pieces = [*prefix, *reply.tokens], list(reply.pieces)
        node.measures, node.content = (
            merge_measures(measured, reply, begun),
            reply.message["content"],
        )
        ends = {"stop": "done", "cancelled": "stopped"}
        node.state = ends.get(reply.stats.stop_reason, reply.stats.stop_reason)
        own = reply.measures
        node.stats = {
            **asdict(reply.stats),
            "seed": self.settings.seed,
            "take": take,
            **{name: options[name] for name in SAMPLING},
            "entropy": sum(token.entropy for token in own) / len(own) if own else 0.0,
        }

    def _list_above(self, node: Message) -> list[Message]:
        """Return the messages of the branch above one, first to last."""
        above: list[Message] = []
        asked = node.parent
        while asked is not None and asked.role != "root":
            above.insert(0, asked)
            asked = asked.parent
        return above

    def _pick_seed(self, node: Message, written: int) -> tuple[int, int]:
        """Return the seed of a reply, and how many replies to the same message there were before it.

        Each place in a conversation has a stream of its own, but replies that are asked for side by side
        share theirs: they are compared.
        """
        take = node.parent.children.index(node) if node.parent and not node.beside else 0
        depth = len(self._list_above(node)) // 2
        place = (depth, take, written)
        seed = self.settings.seed
        return (derive_seed(seed, "reply", *place) if any(place) else seed), take

    def _render(self, node: Message, tokenizer: Any) -> list[int]:
        """Return the ids before a reply: the branch above it as a chat, or as plain text for a base model."""
        above = self._list_above(node)
        if node.is_base:
            return [tokenizer.bos_id, *tokenizer.encode("".join(message.text for message in above))]
        said = [{"role": message.role, "content": message.content} for message in above]
        return tokenizer.render_for_completion({"messages": [*self.talk.list_system(), *said]})

    def _tell(self, **message: Any) -> bool:
        try:
            return self.push(message)
        except Exception:  # the page or its kernel is gone
            return False


def merge_measures(before: list[Token], reply: Reply, begun: int) -> list[Token]:
    """Return the measures of a reply's tokens after those of its first `begun` ones, if these are known."""
    return [*before, *reply.measures] if len(before) == begun else []


def set_dial(identifier: str, alpha: float) -> str:
    """Return an identifier with its adapters, if it has any, at a strength.

    >>> set_dial("lora:pirate*2+sft/d4", 0.5), set_dial("sft/d4", 0.5), set_dial("lora:pirate+sft", 1.0)
    ('lora:pirate*0.5+sft/d4', 'sft/d4', 'lora:pirate+sft')
    """
    dial = "" if alpha == 1 else f"*{alpha:g}"
    return re.sub(r"(lora:[^*+]+)(?:\*[\d.]+)?\+", lambda found: f"{found[1]}{dial}+", identifier)


def open_chat(
    model: str = "",
    *,
    settings: ChatSettings | None = None,
    height: str = "74vh",
    opener: Opener | None = None,
) -> Any:
    """Return a chat page with a session of its own; without a model it begins with that of `choose_talker`,
    without an opener it shares what other cells of the process have opened.
    """
    from primechat.chat.terminal import choose_talker
    from primechat.labkit.lab import borrow_model, find_models
    from primechat.labkit.start_stop import in_notebook
    from primechat.views.widgets.chat import ChatView

    name, why = (model, "") if model else choose_talker()
    session = ChatSession(
        lambda said: view.push(said), opener or borrow_model, find_models, name, settings
    )
    first = (
        session.show_all() if in_notebook() else session.show_first()
    )  # a notebook's page comes soon
    view = ChatView(session.act, height=height, first={**first, "note": why})
    return view
