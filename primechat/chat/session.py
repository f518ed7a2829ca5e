"""The conversation behind a chat page: a tree of messages, the models, and a thread that writes replies.

Every request of the page is answered at once. Replies are written on a worker thread that reports through
`push`, and `stop` takes effect within one token. Each session has its own tree and settings, so that people
on one server do not see each other; only models are shared, and nothing here changes them.
Reference: primechat.views.widgets.chat (the page), primechat.infer.engine.
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
    Conversation,
    Message,
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

# identifier -> model, tokenizer, metadata
Opener = Callable[[str], tuple[Any, Any, dict[str, Any]]]
# message to the page -> whether the page is still there
Push = Callable[[dict[str, Any]], bool]

MAX_COMPARED = 4
N_ALTERNATIVES = 8
FLUSH_S = 0.04  # between two reports of a reply: 25 per second look smooth
logger = logging.getLogger(__name__)


class ChatSession:
    """The server side of one chat page.

    Args:
        push: sends a message to the page; returns False once the page is gone.
        opener: opens a model by its identifier; called on the worker thread.
        find_models: returns [{"identifier", "about", "by_product"}], the models that can be chosen.
        model: identifier of the model to begin with.
        settings: sampling settings and system message to begin with.
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
        self._advice: dict[str, Advice] = {}  # by model, for those that have been opened
        self.busy = False  # True while a reply is being written
        self._cancel = threading.Event()
        self.conversations = [
            Conversation(self._add(None, "root"), [model], self.settings.system or None)
        ]
        self.at = 0

    # Requests of the page; each returns its answer.

    def act(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request of the page and return the answer.

        Args:
            name: name of the request.
            given: its arguments.

        Raises:
            PrimechatError: the request cannot be carried out; its text is for the reader.
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
            "open": self.open_conversation,
            "save": self.save,
            "load": self.load,
        }
        if name not in acts:
            raise ConfigError(f"act={name!r} must be one of {', '.join(acts)}; reload the page.")
        return acts[name](**given) or {}

    @property
    def conversation(self) -> Conversation:
        """The conversation on display."""
        return self.conversations[self.at]

    def show_all(self) -> dict[str, Any]:
        """Return everything that the page shows, and start opening the model in the background."""
        if not self.busy:
            self._start([])
        return self.show_first()

    def show_first(self) -> dict[str, Any]:
        """Return everything that the page shows, without opening the model yet."""
        return {**self._draw(), "models": self.find_models()}

    def send(self, text: str) -> None:
        """Add the reader's message and have the chosen models answer it."""
        self._refuse_busy()
        if not text.strip():
            raise ConfigError("The message is empty; write something.")

        # A message that got no reply, perhaps because it was too long, is replaced by the new one.
        last = [self.conversation.root, *self.conversation.walk()][-1]
        asked = last.parent or last
        last = asked if all(x.state == "failed" and not x.content for x in asked.children) else last
        if last.role == "user":
            last = last.parent or self.conversation.root
        self._ask(self._add(last, "user", text))

    def edit(self, id: int, text: str) -> None:
        """Add a new version of one of the reader's messages and have it answered."""
        self._refuse_busy()
        node = self._find(id, "user")
        if not text.strip():
            raise ConfigError("The message is empty; write something.")
        self._ask(self._add(node.parent, "user", text))

    def regenerate(self, id: int) -> None:
        """Generate another reply to the same message, with different random numbers."""
        self._refuse_busy()
        node = self._find(id, "assistant")
        self._start([self._add(node.parent, "assistant", model=self.conversation.chosen[0])])

    def go_on(self, id: int) -> None:
        """Have the model continue a reply from where it ended."""
        self._refuse_busy()
        node = self._find(id, "assistant")
        node.state = "waiting"
        self._start([node], keep=len(node.tokens))

    def branch(self, id: int, index: int, token: int) -> None:
        """Generate a new version of a reply from token `index` on, with that token replaced by `token`."""
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
        """Return the alternatives to a token with their probabilities."""
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
        """Show the branch that contains a message."""
        node = self._find(id)
        assert node.parent, "only the root has none"
        node.parent.pick = node.parent.children.index(node)
        return self._draw()

    def stop(self) -> None:
        """Stop within one token; the text so far is kept."""
        self._cancel.set()

    def choose_models(self, chosen: Sequence[str]) -> dict[str, Any]:
        """Set which models answer from the next message on; several answer side by side."""
        names = list(dict.fromkeys(map(str, chosen)))
        if not 1 <= len(names) <= MAX_COMPARED:
            raise ConfigError(f"{len(names)} models are chosen; 1 to {MAX_COMPARED} can answer.")
        self.conversation.chosen = names
        if not self.busy:
            self._start([])
        return self._describe()

    def change(self, **values: Any) -> dict[str, Any]:
        """Change settings; they apply from the next reply on.

        The system message is changed for the conversation on display; the others keep theirs.
        """
        self.settings = ChatSettings(**{**asdict(self.settings), **values})
        if values.get("system", self.conversation.told) != self.conversation.told:
            self.conversation.system = self.settings.system or None
        return self._describe()

    def begin(self) -> dict[str, Any]:
        """Start a new conversation; the others are kept."""
        self._refuse_busy()
        if self.conversation.root.children:
            root = self._add(None, "root")
            self.conversations.append(
                Conversation(root, list(self.conversation.chosen), self.conversation.system)
            )
            self.at = len(self.conversations) - 1
        return self._draw()

    def open_conversation(self, index: int) -> dict[str, Any]:
        """Show another conversation of this session."""
        self._refuse_busy()
        self.at = min(max(int(index), 0), len(self.conversations) - 1)
        return self._draw()

    def save(self) -> dict[str, Any]:
        """Return the session as JSON lines for finetune: the visible branch of each conversation."""
        lines = write_jsonl(self.conversations)
        if not lines:
            raise ConfigError("Nothing has been said yet; write a message first.")
        return {"text": "\n".join(lines) + "\n", "name": "conversations.jsonl", "count": len(lines)}

    def load(self, text: str) -> dict[str, Any]:
        """Add conversations from JSON lines as they were saved, and show the first of them."""
        self._refuse_busy()
        found = read_jsonl(text)
        at, chosen = len(self.conversations), list(self.conversation.chosen)
        for messages in found:
            node = root = self._add(None, "root")
            conversation = Conversation(root, chosen)
            for message in messages:
                if message["role"] == "system":
                    conversation.system = message["content"]
                else:
                    node = self._add(node, message["role"], message["content"])
                    node.state = "done"  # even if the reply is empty
            self.conversations.append(conversation)

        # An untouched first conversation is dropped.
        self.conversations = self.conversations[
            at if not self.conversation.root.children and at == 1 else 0 :
        ]
        self.at = len(self.conversations) - len(found)
        return self._draw()

    # The tree.

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
        """Return what the page draws: the visible branch and the replies beside it."""
        nodes = []
        for node in self.conversation.walk():
            nodes += [node, *(self._nodes[id] for id in node.beside if id != node.id)]
        return {**self._describe(), "nodes": [node.view() for node in nodes]}

    def _describe(self) -> dict[str, Any]:
        return {
            "path": [node.id for node in self.conversation.walk()],
            "chosen": self.conversation.chosen,
            "settings": {**asdict(self.settings), "system": self.conversation.told},
            "advice": self._advice,
            "conversations": [conversation.title for conversation in self.conversations],
            "at": self.at,
            "busy": self.busy,
        }

    def _ask(self, asked: Message) -> None:
        """Add an empty reply by each chosen model below a message, and have the replies written."""
        replies = [self._add(asked, "assistant", model=name) for name in self.conversation.chosen]
        if len(replies) > 1:
            for reply in replies:
                reply.beside = [node.id for node in replies]
        asked.pick = 0
        self._start(replies)

    # The worker.

    def _refuse_busy(self) -> None:
        if self.busy:
            raise ConfigError("A reply is being written; stop it first.")

    def _start(self, replies: list[Message], keep: int = 0) -> None:
        """Write replies on a thread, keeping the first `keep` tokens; without replies, open the models."""
        before = self._worker
        self.busy, self._cancel = bool(replies), threading.Event()
        self._worker = threading.Thread(
            target=self._work, args=(replies, keep, before), daemon=True
        )
        self._worker.start()

    def _work(self, replies: list[Message], keep: int, before: threading.Thread | None) -> None:
        # Show the question at once, even if a model is still being opened.
        if replies:
            asked = [node for node in [replies[0].parent] if node and node.role != "root"]
            self._send(
                kind="update",
                nodes=[node.view() for node in [*asked, *replies]],
                **self._describe(),
            )
        if before is not None:
            before.join()

        # Open the chosen models before they are needed.
        for name in () if replies else self.conversation.chosen:
            if self._worker is not threading.current_thread():
                break  # a question has come, which opens the models that it needs
            try:
                self._open(name)
            except Exception as error:  # shown again when the model is used
                self._send(kind="status", text=explain_error(error), fault=True)

        # Write the replies.
        for node in replies:
            if self._cancel.is_set():
                node.state, node.note = "stopped", "Stopped before its first token."
            else:
                try:
                    self._write(node, keep)
                except Exception as error:  # shown on the page; the notebook must survive it
                    logger.debug("a reply failed", exc_info=True)
                    node.state, node.note = "failed", explain_error(error)
            self._send(kind="update", nodes=[node.view()])
        if replies:
            self.busy = False
            self._send(kind="update", nodes=[], busy=False)

    def _open(self, model: str) -> tuple[Any, Any, dict[str, Any]]:
        is_new = model not in self._advice
        if is_new:
            self._send(
                kind="status", text=f"Opening {model}{', some ten seconds' * ('hf:' in model)} …"
            )
        # The opener also sets how many threads PyTorch uses on this thread.
        opened = self.opener(scale_adapters(model, self.settings.alpha))
        self._advice[model] = opened[2].get("sampling") or ({}, "")
        if is_new:
            self._send(kind="update", nodes=[], advice=self._advice)  # also clears the status line
        return opened

    def _write(self, node: Message, keep: int) -> None:
        from primechat.infer.engine import Engine

        model, tokenizer, meta = self._open(node.model)
        node.is_base = is_base({"identifier": node.model, **meta})
        engine = Engine(model, tokenizer)

        # The tokens that the reply begins with.
        prefix = node.tokens[:keep]
        while prefix and prefix[-1] in tokenizer.stop_ids:
            prefix.pop()
        if not node.tokens and node.content and keep == 0 and node.state == "waiting":
            prefix = tokenizer.encode(node.text)  # a loaded reply is continued from its text

        # Write, and report a few times per second; stop if the page is gone.
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
                if not self._send(
                    kind="tokens", id=node.id, at=sent, tokens=rows, stats=asdict(reply.stats)
                ):
                    self._cancel.set()
                sent, t_flush = len(reply.pieces), time.perf_counter()

        # Store the reply.
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
        """Return the messages above a node on its branch, first to last."""
        above: list[Message] = []
        asked = node.parent
        while asked is not None and asked.role != "root":
            above.insert(0, asked)
            asked = asked.parent
        return above

    def _pick_seed(self, node: Message, written: int) -> tuple[int, int]:
        """Return the seed of a reply, and how many earlier replies there are to the same message.

        Each place in a conversation has its own random stream, but replies generated side by side share one,
        because they are compared.
        """
        take = node.parent.children.index(node) if node.parent and not node.beside else 0
        depth = len(self._list_above(node)) // 2
        place = (depth, take, written)
        seed = self.settings.seed
        return (derive_seed(seed, "reply", *place) if any(place) else seed), take

    def _render(self, node: Message, tokenizer: Any) -> list[int]:
        """Return the prompt ids of a reply: the branch above it as a chat, or as text for a base model."""
        above = self._list_above(node)
        if node.is_base:
            return [tokenizer.bos_id, *tokenizer.encode("".join(message.text for message in above))]
        said = [{"role": message.role, "content": message.content} for message in above]
        return tokenizer.render_for_completion(
            {"messages": [*self.conversation.list_system(), *said]}
        )

    def _send(self, **message: Any) -> bool:
        try:
            return self.push(message)
        except Exception:  # the page or its kernel is gone
            return False


def merge_measures(before: list[Token], reply: Reply, begun: int) -> list[Token]:
    """Return the measures of all tokens of a reply, or [] if those of the first `begun` are unknown."""
    return [*before, *reply.measures] if len(before) == begun else []


def scale_adapters(identifier: str, alpha: float) -> str:
    """Return an identifier with its adapters, if any, set to strength `alpha`.

    >>> scale_adapters("lora:pirate*2+sft/d4", 0.5), scale_adapters("sft/d4", 0.5)
    ('lora:pirate*0.5+sft/d4', 'sft/d4')
    """
    scale = "" if alpha == 1 else f"*{alpha:g}"
    return re.sub(r"(lora:[^*+]+)(?:\*[\d.]+)?\+", lambda found: f"{found[1]}{scale}+", identifier)


def open_chat(
    model: str = "",
    *,
    settings: ChatSettings | None = None,
    height: str = "74vh",
    opener: Opener | None = None,
) -> Any:
    """Return a chat page with a session of its own.

    Args:
        model: identifier of the model to begin with; "" takes that of `choose_chat_model`.
        settings: sampling settings and system message to begin with.
        height: CSS height of the page.
        opener: opens a model; None shares the models that other cells of the process have opened.
    """
    from primechat.chat.terminal import choose_chat_model
    from primechat.labkit.lab import borrow_model, find_models
    from primechat.labkit.start_stop import in_notebook
    from primechat.views.widgets.chat import ChatView

    name, why = (model, "") if model else choose_chat_model()
    session = ChatSession(
        lambda said: view.push(said), opener or borrow_model, find_models, name, settings
    )
    # In a notebook the page appears soon, so the model is opened now.
    first = session.show_all() if in_notebook() else session.show_first()
    view = ChatView(session.act, height=height, first={**first, "note": why})
    return view
