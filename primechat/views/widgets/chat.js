// The chat's page. Python holds the conversations; this draws them and says what the reader did.

import {
  asking,
  button,
  commit,
  debounce,
  frame,
  h,
  listModels,
  more,
  MORE,
  number,
  select,
  slider,
  throttle,
  toggle,
} from "./kit.js";
import { drawMarkdown } from "./markdown.js";

const ENDS = {
  stopped: "Stopped.",
  length: "Cut at the longest reply that the settings allow. Continue goes on.",
  context: "The model can read no further; begin a new chat.",
};
const LONG =
  "This talk is longer than any that the model was trained on: its replies get worse. A new chat begins afresh.";
const COLOURS = [
  ["", "Nothing"],
  ["p", "Probability: how likely it held the token"],
  ["entropy", "Entropy: how open the choice was"],
  ["rank", "Rank: how many tokens were likelier"],
];
const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "new line"],
  ["Esc", "stop a reply, close what is open"],
  ["↑", "in the empty line: edit the last message"],
  ["Alt N", "new chat"],
  ["Alt R", "answer anew"],
  ["Alt C", "copy the last reply"],
  ["Alt T", "show tokens; arrow keys walk, Enter opens"],
  ["Alt ←  Alt →", "the other answers"],
];
const STARTERS = ["Hi! How was your day?", "What did you have for dinner?", "I have a small dog."];
const MARK = 3;
const KEPT = "primechat conversations",
  MOST_KEPT = 50; // in this browser, newest first: a page that is loaded again has a session of its own
const WORDS = {
  temperature: "temperature",
  top_k: "top-k",
  top_p: "top-p",
  repetition_penalty: "repetition penalty",
};
const SAMPLING = Object.keys(WORDS); // what a model's makers may advise

function render({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "chat");
  const ask = asking(model, later);
  const nodes = new Map(),
    drawn = new Map(); // by id: what Python sent, what is on the page
  let state = { path: [], chosen: [], models: [], conversations: [], at: 0, settings: {}, busy: false };
  let pending = {}; // settings that were changed and not sent yet
  let earlier = ""; // what this browser has kept of other pages, as JSON lines
  try {
    earlier = localStorage.getItem(KEPT) ?? "";
  } catch {
    /* the browser forbids it here */
  }
  let colour = "",
    showTokens = false,
    follows = true,
    alive = true,
    ready = false,
    early = false; // ready: Python has answered; early: sent before that
  later(() => {
    alive = false;
  });

  const act = (name, given = {}) => (
    name === "settings" || flush(),
    ask("act", { name, given }).then(
      (answer) => {
        if (status.classList.contains("pc-chat-fault")) tell("");
        take(answer);
        return answer;
      },
      (error) => {
        tell(error.message, true);
        throw error;
      },
    )
  );
  const quietly = (name, given) => act(name, given).catch(() => {});

  // ---- the frame

  const picks = h("div", { class: "pc-row pc-chat-picks" });
  const conversations = select({
    label: "Conversation",
    options: [],
    value: "",
    input: (value) => quietly("open", { index: Number(value) }),
  });
  const status = h("div", { class: "pc-chat-status pc-muted", role: "status" });
  const list = h("div", {
    class: "pc-chat-list",
    role: "log",
    "aria-label": "Conversation",
    tabindex: "-1",
  });
  let top = 0;
  const scroll = h(
    "div",
    {
      class: "pc-chat-scroll",
      onscroll: () => {
        // only who scrolls up stops following: an event of ours may be heard after the text has grown
        if (scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40) follows = true;
        else if (scroll.scrollTop < top - 2) follows = false;
        top = scroll.scrollTop;
        scroll.style.overflowAnchor = follows ? "none" : "";
      },
    },
    list,
  );
  const input = h("textarea", {
    class: "pc-text pc-chat-input",
    rows: 1,
    "aria-label": "Message",
    "data-lm-suppress-shortcuts": "true",
    placeholder: "Write a message …",
    oninput: grow,
    onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      } else if (event.key === "ArrowUp" && !input.value) {
        event.preventDefault();
        editLast();
      }
    },
  });
  const go = button("Send", () => (state.busy ? stop() : submit()), { primary: true });
  go.classList.add("pc-chat-go");
  const settingsButton = button("Settings", () => openPanel(panel.hidden));
  settingsButton.setAttribute("aria-expanded", "false");
  const panel = h("aside", { class: "pc-chat-panel", "aria-label": "Settings", hidden: true });
  const popup = h("div", {
    class: "pc-chat-popup",
    role: "dialog",
    "aria-label": "What else could stand here",
    hidden: true,
  });
  root.append(
    h(
      "header",
      { class: "pc-chat-bar" },
      picks,
      h(
        "div",
        { class: "pc-row pc-chat-tools" },
        conversations,
        button("New chat", begin, { title: "Alt N" }),
        button("Copy all", copyAll, { title: "Copy the conversation" }),
        settingsButton,
      ),
    ),
    h(
      "div",
      { class: "pc-chat-main" },
      h(
        "div",
        { class: "pc-chat-column" },
        scroll,
        status,
        h("div", { class: "pc-chat-line" }, input, go),
      ),
      panel,
    ),
    popup,
  );
  root.style.setProperty("--pc-chat-height", model.get("height"));
  root.addEventListener("keydown", hearKeys);
  root.addEventListener("pointerdown", (event) => {
    if (!popup.hidden && !popup.contains(event.target)) closePopup();
  });

  function grow() {
    input.style.height = "0";
    input.style.height = `${Math.min(input.scrollHeight + 2, 180)}px`;
  }
  function tell(text, fault = false) {
    status.textContent = text;
    status.classList.toggle("pc-chat-fault", fault && Boolean(text));
  }
  function stop() {
    quietly("stop");
  }
  function submit() {
    const text = input.value;
    if (!text.trim() || state.busy) return;
    early = !ready; // it stays in the line, and goes off as soon as Python answers
    if (early) return tell("Sent as soon as the model is open.");
    input.value = "";
    grow();
    follows = true;
    act("send", { text }).catch(() => {
      input.value = [text, input.value].filter(Boolean).join("\n");
      grow();
    });
  }
  function begin() {
    act("new").then(
      () => input.focus(),
      () => {},
    );
  }

  function hearKeys(event) {
    event.stopPropagation(); // the notebook has its own keys
    const key = event.key.toLowerCase();
    if (key === "escape") {
      if (!popup.hidden) closePopup();
      else if (state.busy) stop();
      else if (!panel.hidden) openPanel(false);
      return;
    }
    if (!event.altKey || event.ctrlKey || event.metaKey) return;
    const last = lastReply(),
      plain = event.code.replace("Key", "").toLowerCase();
    const found = {
      n: begin,
      r: () => last && quietly("regenerate", { id: last.id }),
      c: () => last && copy(textOf(last), null),
      t: () => putTokens(!showTokens, true),
      arrowleft: () => last && turn(last, -1),
      arrowright: () => last && turn(last, 1),
    }[plain];
    if (found) {
      event.preventDefault();
      found();
    }
  }

  /** Do work that may take the focused node off the page; the line then gets the focus, so that keys are heard. */
  function keepFocus(work) {
    const here = root.getRootNode().activeElement,
      inside = here && root.contains(here);
    work();
    const now = root.getRootNode().activeElement;
    if (inside && (!now || !root.contains(now))) input.focus({ preventScroll: true });
  }

  // ---- what Python says

  function take(message) {
    if (alive) keepFocus(() => takeIn(message));
  }
  function takeIn(message, answered = true) {
    for (const node of message.nodes ?? []) {
      nodes.set(node.id, node);
      drawn.get(node.id)?.redraw();
    }
    if (!ready && answered) {
      ready = true;
      tell(model.get("first")?.note ?? "");
      if (early) setTimeout(submit);
    }
    const was = state;
    state = {
      ...state,
      ...message,
      settings: { ...state.settings, ...message.settings, ...pending },
    };
    if (message.advice && !message.conversations)
      tell(advise() === advice.textContent ? "" : advise("primechat")); // a model was opened
    if (message.models || message.chosen) {
      drawPicks();
      if (!message.settings) putSettings();
    }
    if (message.conversations) {
      conversations.hidden = state.conversations.length < 2;
      conversations.fill(
        state.conversations.map((title, i) => [String(i), title]),
        String(state.at),
      );
    }
    if (message.settings || message.advice) putSettings();
    if (message.path) drawPath();
    if (was.busy && !state.busy) keep();
    if (was.busy !== state.busy || message.path) {
      go.textContent = state.busy ? "Stop" : "Send";
      root.classList.toggle("pc-chat-busy", state.busy);
      for (const id of state.path) drawn.get(id)?.redraw();
    }
  }
  /** Have the browser keep what was said, so that loading the page again loses nothing. */
  function keep() {
    ask("act", { name: "save", given: {} })
      .then(({ text }) =>
        localStorage.setItem(KEPT, (text + earlier).split("\n").slice(0, MOST_KEPT).join("\n")),
      )
      .catch(() => {});
  }
  function putEarlier(text) {
    earlier = "";
    if (text) act("load", { text }).catch(() => {});
    else {
      localStorage.removeItem(KEPT);
      keepFocus(() => list.replaceChildren(greeting()));
    }
  }
  function hear({ push } = {}) {
    if (!push) return;
    const { kind, ...message } = push;
    if (kind === "update") take(message);
    else if (kind === "status") tell(message.text, message.fault);
    else if (kind === "tokens") {
      const node = nodes.get(message.id);
      if (!node || message.at > node.tokens.length) return; // a report was lost: the end of a reply brings all of it
      node.tokens.length = message.at;
      node.tokens.push(...message.tokens);
      Object.assign(node, { stats: message.stats, state: "writing" });
      drawn.get(message.id)?.redraw();
    }
  }
  model.on("msg:custom", hear);
  later(() => model.off("msg:custom", hear));
  listen("height", () => root.style.setProperty("--pc-chat-height", model.get("height")));

  // ---- the models

  let showsAll = false; // by-products of labs too
  function drawPicks() {
    const usual = state.models.filter((entry) => !entry.by_product).map((one) => one.identifier);
    const options = (chosen) => {
      const listed = listModels(state.models, state.chosen, showsAll);
      return listed.some(([id]) => id === chosen) ? listed : [...listed, [chosen, chosen]];
    };
    const put = (i, value) => {
      if (value === MORE) {
        showsAll = true;
        drawPicks();
        return;
      }
      const next = [...state.chosen];
      if (value === null) next.splice(i, 1);
      else next[i] = value;
      quietly("models", { chosen: next });
    };
    picks.replaceChildren(
      ...[
        ...state.chosen.map((chosen, i) =>
          h(
            "span",
            { class: "pc-chat-pick" },
            h(
              "select",
              {
                class: "pc-select",
                "aria-label": i ? `Model ${i + 1}` : "Model",
                title: state.models.find((entry) => entry.identifier === chosen)?.about,
                onchange: (event) => put(i, event.target.value),
              },
              ...options(chosen).map(([id, text]) =>
                h("option", { value: id, text, selected: id === chosen }),
              ),
            ),
            state.chosen.length > 1 &&
              h("button", {
                type: "button",
                class: "pc-chat-x",
                "aria-label": `Leave out ${chosen}`,
                text: "×",
                onclick: () => put(i, null),
              }),
          ),
        ),
        state.chosen.length < Math.min(4, usual.length) &&
          button(
            "+ Compare",
            () => {
              const others = usual
                .filter((id) => !state.chosen.includes(id))
                .sort((a, b) => a.includes("@snap") - b.includes("@snap"));
              const free = ["sft/", "shipped/sft", ""]
                .map((kind) => others.find((id) => id.startsWith(kind)))
                .find(Boolean); // one that chats, else any that is done
              if (free) put(state.chosen.length, free);
            },
            { title: "Ask another model the same, side by side" },
          ),
      ].filter(Boolean),
    );
    for (const box of picks.querySelectorAll("select"))
      box.value = state.chosen[[...picks.querySelectorAll("select")].indexOf(box)];
    alpha.hidden = !state.chosen.some((id) => id.startsWith("lora:"));
  }

  // ---- the conversation

  const lastReply = () => {
    const node = nodes.get(state.path.at(-1));
    return node?.role === "assistant" ? node : null;
  };
  const textOf = (node) =>
    node.role === "user" ? node.text : node.tokens.map((token) => token[0]).join("");

  function drawPath() {
    const wanted = state.path
      .map((id) => {
        const node = nodes.get(id);
        if (!node) return null;
        if ((node.beside?.length ?? 0) > 1 && node.beside.includes(id)) return group(node);
        return card(id).el;
      })
      .filter(Boolean);
    if (!wanted.length) wanted.push(greeting());
    let at = list.firstChild;
    for (const node of wanted) {
      if (node === at) at = at.nextSibling;
      else list.insertBefore(node, at);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    toEnd();
  }
  function greeting() {
    return h(
      "div",
      { class: "pc-chat-empty" },
      h("p", { class: "pc-title", text: "Say something." }),
      h(
        "div",
        { class: "pc-row" },
        STARTERS.map((text) =>
          button(text, () => {
            input.value = text;
            submit();
          }),
        ),
      ),
      h("p", {
        class: "pc-muted",
        text: "The reply appears as it is written. Under it stand its speed and its length; Tokens there shows the pieces it is made of. Click one to see what else the model could have said, and go on from there.",
      }),
      (earlier &&
        ready &&
        h(
          "div",
          { class: "pc-row" },
          h("span", {
            class: "pc-muted",
            text: `Conversations from before that this browser has kept: ${earlier.trim().split("\n").length}`,
          }),
          button("Bring back", () => putEarlier(earlier)),
          button("Forget", () => putEarlier("")),
        )) ||
        "",
    );
  }
  function card(id) {
    if (!drawn.has(id)) drawn.set(id, nodes.get(id).role === "user" ? drawUser(id) : drawReply(id));
    return drawn.get(id);
  }
  function group(node) {
    const key = `g${node.beside[0]}`;
    if (!drawn.has(key))
      drawn.set(key, {
        el: h("div", {
          class: "pc-chat-group",
          role: "group",
          "aria-label": "Answers side by side",
        }),
        redraw() {},
      });
    const { el } = drawn.get(key),
      inPath = new Set(state.path);
    const cards = node.beside
      .filter((id) => nodes.has(id))
      .map((id) => {
        const { el: one } = card(id);
        one.classList.toggle("pc-chat-taken", inPath.has(id));
        return one;
      });
    if (cards.some((one, i) => el.children[i] !== one) || el.children.length !== cards.length)
      el.replaceChildren(...cards);
    node.beside.forEach((id) => drawn.get(id)?.redraw());
    return el;
  }
  const toEnd = throttle(() => {
    if (follows) {
      scroll.style.overflowAnchor = "none";
      scroll.scrollTop = scroll.scrollHeight;
    }
  }, 30);
  const size = new ResizeObserver(toEnd);
  size.observe(list);
  size.observe(scroll);
  later(() => size.disconnect());

  function switcher(node) {
    if ((node.siblings?.length ?? 0) < 2) return null;
    const at = node.siblings.indexOf(node.id);
    const arrow = (step, text, name) =>
      h("button", {
        type: "button",
        class: "pc-chat-act",
        text,
        "aria-label": name,
        disabled: at + step < 0 || at + step >= node.siblings.length,
        onclick: () => turn(node, step),
      });
    return h(
      "span",
      { class: "pc-chat-turn" },
      arrow(-1, "‹", "The answer before"),
      h("span", { class: "pc-value", text: `${at + 1} / ${node.siblings.length}` }),
      arrow(1, "›", "The next answer"),
    );
  }
  function turn(node, step) {
    const next = node.siblings[node.siblings.indexOf(node.id) + step];
    if (next !== undefined && !state.busy) quietly("choose", { id: next });
  }
  const tokensAct = () => {
    const act = action(
      "Tokens",
      () => putTokens(!showTokens),
      "Show its tokens; click one for its alternatives (Alt T)",
    );
    act.setAttribute("aria-pressed", String(showTokens));
    return act;
  };
  const action = (text, onclick, title) =>
    h("button", { type: "button", class: "pc-chat-act", text, title, onclick });

  function drawUser(id) {
    const el = h("article", { class: "pc-chat-message pc-chat-user", dataset: { id } });
    const redraw = () => {
      const node = nodes.get(id);
      const text = h("div", { class: "pc-chat-said", text: node.text });
      const copyIt = action("Copy", () => copy(node.text, copyIt));
      el.replaceChildren(
        text,
        h(
          "footer",
          {},
          switcher(node),
          copyIt,
          !state.busy &&
            action(
              "Edit",
              () => edit(node),
              "Change it and ask again; the old answer stays beside",
            ),
        ),
      );
    };
    const edit = (node) => {
      const box = h("textarea", {
        class: "pc-text",
        "aria-label": "Edit message",
        value: node.text,
        "data-lm-suppress-shortcuts": "true",
        onkeydown: (event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            send();
          }
          if (event.key === "Escape") {
            event.stopPropagation();
            redraw();
            input.focus();
          }
        },
      });
      const send = () => {
        if (box.value.trim()) {
          redraw();
          follows = true;
          quietly("edit", { id, text: box.value });
          input.focus();
        }
      };
      el.replaceChildren(
        box,
        h(
          "footer",
          {},
          button("Send", send, { primary: true }),
          button("Cancel", () => {
            redraw();
            input.focus();
          }),
        ),
      );
      box.focus();
      el.scrollIntoView({ block: "nearest" }); // its buttons too
    };
    redraw();
    return { el, redraw, edit: () => edit(nodes.get(id)) };
  }
  function editLast() {
    const id = state.path.findLast((one) => nodes.get(one)?.role === "user");
    if (id !== undefined && !state.busy) drawn.get(id)?.edit();
  }

  function drawReply(id) {
    const name = h("div", { class: "pc-chat-model" }),
      body = h("div", { class: "pc-chat-body" }),
      footer = h("footer", {});
    const el = h(
      "article",
      { class: "pc-chat-message pc-chat-reply", dataset: { id } },
      name,
      body,
      footer,
    );
    let mode = "",
      shown = -1,
      open = false,
      queued = false,
      seen = "";
    const paint = () => {
      queued = false;
      if (!alive) return;
      const node = nodes.get(id),
        text = textOf(node),
        writing = node.state === "writing" || node.state === "waiting";
      el.classList.toggle("pc-chat-writing", writing);
      el.setAttribute("aria-busy", String(writing));
      name.textContent = node.model;
      name.hidden = !node.model;
      const next = showTokens || colour ? `tokens ${colour}` : "text";
      if (next !== mode) {
        body.replaceChildren();
        body.classList.toggle("pc-chat-tokens", next !== "text");
        mode = next;
        shown = -1;
        seen = "";
      }
      const key = `${node.tokens.length}:${text.length}`;
      if (next !== "text") {
        if (key !== seen) shown = drawTokens(body, node, shown);
      } else if (key !== seen) drawParts(body, node);
      seen = key;
      drawFooter(node, writing);
      if (writing) toEnd();
    };
    const drawFooter = (node, writing) => {
      const last = state.path.at(-1) === id,
        taken = state.path.includes(id);
      const stats = node.stats?.new_tokens
        ? statsLine(node.stats)
        : node.state === "waiting"
          ? "waiting …"
          : "";
      const copyIt = action("Copy", () => copy(textOf(node), copyIt));
      const parts = [
        (showTokens || colour) &&
          last &&
          node.tokens.length &&
          h("div", {
            class: "pc-muted",
            text: "Click a token to see what else it might have said. Keys: ← and → walk, Enter opens.",
          }),
        node.state === "failed" && h("div", { class: "pc-error", text: node.note }),
        ENDS[node.state] &&
          h("div", {
            class: "pc-muted",
            text:
              node.note ||
              (node.base && node.state === "length"
                ? "A base model goes on for as long as it may."
                : ENDS[node.state]),
          }),
        last &&
          !writing &&
          node.stats?.context_used > 1 &&
          h("div", { class: "pc-muted", text: LONG }),
        stats &&
          h(
            "div",
            { class: "pc-chat-stats" },
            h("span", { class: "pc-chat-figures", text: stats }),
            node.stats?.final &&
              h("button", {
                type: "button",
                class: "pc-chat-act",
                text: open ? "less" : "more",
                "aria-expanded": String(open),
                onclick: () => {
                  open = !open;
                  paint();
                  footer.querySelector("[aria-expanded]")?.focus();
                },
              }),
          ),
        open && node.stats?.final && statsTable(node),
        !writing &&
          h(
            "div",
            { class: "pc-chat-acts" },
            switcher(node),
            copyIt,
            !state.busy &&
              action(
                "Regenerate",
                () => {
                  follows = true;
                  quietly("regenerate", { id });
                },
                "Answer again with other random numbers (Alt R)",
              ),
            !state.busy &&
              last &&
              node.state !== "failed" &&
              action(
                "Continue",
                () => {
                  follows = true;
                  quietly("go_on", { id });
                },
                "Write on where the reply ended",
              ),
            tokensAct(),
            !taken && !state.busy && action("Go on with this one", () => quietly("choose", { id })),
          ),
      ].filter(Boolean);
      const within = footer.contains(root.getRootNode().activeElement);
      const held = within ? root.getRootNode().activeElement.textContent : "";
      footer.replaceChildren(...parts);
      if (held)
        [...footer.querySelectorAll("button")].find((one) => one.textContent === held)?.focus();
    };
    const redraw = () => {
      if (!queued) {
        queued = true;
        requestAnimationFrame(() => keepFocus(paint));
      }
    };
    paint();
    return { el, redraw };
  }

  /** Draw a reply for reading: markdown, and the calculator's calls as chips. */
  function drawParts(body, node) {
    const parts = [];
    for (const [text, kind] of node.tokens) {
      if (kind === MARK) continue;
      if (parts.at(-1)?.kind === kind) parts.at(-1).text += text;
      else parts.push({ kind, text });
    }
    parts.forEach((part, i) => {
      const name = ["pc-md", "pc-chat-call", "pc-chat-result"][part.kind];
      let box = body.children[i];
      if (!box || box.className !== name) {
        const fresh = h("div", { class: name });
        if (box) box.replaceWith(fresh);
        else body.append(fresh);
        box = fresh;
      }
      if (part.kind === 0) drawMarkdown(box, part.text);
      else if (box.textContent !== part.text) box.textContent = part.text;
    });
    while (body.children.length > parts.length) body.lastChild.remove();
  }

  function strength([, , logprob, entropy, rank]) {
    if (logprob === undefined) return 0;
    if (colour === "entropy") return Math.min(1, entropy / 5);
    if (colour === "rank") return Math.min(1, Math.log1p(rank) / 5);
    return colour === "p" ? Math.min(1, -logprob / 6) : 0;
  }
  /** Draw a reply as tokens, from the last one drawn on; return how many are drawn. */
  function drawTokens(body, node, shown) {
    const keep = Math.max(0, Math.min(shown, node.tokens.length) - 1); // the last may have grown
    while (body.childNodes.length > keep) body.lastChild.remove();
    node.tokens.slice(keep).forEach((token, i) => {
      const [text, kind] = token,
        level = strength(token);
      body.append(
        h("span", {
          class: kind === MARK ? "pc-chat-token pc-chat-special" : "pc-chat-token",
          dataset: { index: keep + i },
          tabindex: keep + i ? "-1" : "0",
          role: "button",
          "aria-haspopup": "dialog",
          "aria-expanded": "false",
          text: text || (kind === MARK ? "·" : ""),
          style: level ? { "--pc-level": `${Math.round(level * 62)}%` } : undefined,
          title:
            token.length > 2
              ? `p ${Math.exp(token[2]).toFixed(3)} · rank ${token[4] + 1} · entropy ${token[3].toFixed(2)} nats`
              : undefined,
        }),
      );
    });
    return node.tokens.length;
  }
  list.addEventListener("click", (event) => {
    const token = event.target.closest(".pc-chat-token");
    if (token) openPopup(token);
  });
  list.addEventListener("keydown", (event) => {
    const token = event.target.closest?.(".pc-chat-token");
    if (!token) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      openPopup(token);
    }
    const next = {
      ArrowRight: token.nextElementSibling,
      ArrowLeft: token.previousElementSibling,
      Home: token.parentNode.firstElementChild,
      End: token.parentNode.lastElementChild,
    }[event.key];
    if (next && !event.altKey) {
      event.preventDefault();
      token.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  });

  // ---- a token's alternatives

  let opener = null;
  async function openPopup(token) {
    const id = Number(token.closest("article").dataset.id),
      index = Number(token.dataset.index);
    let found;
    try {
      found = await ask("act", { name: "alternatives", given: { id, index } });
    } catch (error) {
      tell(error.message, true);
      return;
    }
    opener = token;
    token.setAttribute("aria-expanded", "true");
    const most = Math.max(...found.rows.map((row) => row.p), 1e-9);
    const rows = found.rows.map((row) =>
      h(
        "button",
        {
          type: "button",
          class: "pc-chat-option",
          disabled: state.busy || row.id === found.taken,
          "aria-label": `${row.text}, probability ${row.p.toFixed(3)}`,
          onclick: () => {
            closePopup();
            follows = true;
            quietly("branch", { id, index, token: row.id });
          },
        },
        h("span", { class: "pc-mono", text: visible(row.text) }),
        h("span", { class: "pc-chat-share", style: { "--pc-share": `${(100 * row.p) / most}%` } }),
        h("span", { class: "pc-value", text: row.p < 0.001 ? "<0.001" : row.p.toFixed(3) }),
        h("span", { class: "pc-muted", text: row.id === found.taken ? "taken" : "" }),
      ),
    );
    const low = !found.rows.some((row) => row.id === found.taken);
    popup.replaceChildren(
      h("p", {
        class: "pc-muted",
        text: "The model's choices here. Take another, and the reply goes on from it.",
      }),
      ...rows,
      (low &&
        h("p", {
          class: "pc-muted",
          text: `Taken: rank ${found.rank + 1}, probability ${found.p.toExponential(1)}.`,
        })) ||
        "",
    );
    popup.hidden = false;
    const at = token.getBoundingClientRect(),
      base = root.getBoundingClientRect();
    popup.style.left = `${Math.max(8, Math.min(at.left - base.left, base.width - popup.offsetWidth - 8))}px`;
    const below = at.bottom - base.top + 6,
      fits = below + popup.offsetHeight < base.height;
    popup.style.top = `${fits ? below : Math.max(8, at.top - base.top - popup.offsetHeight - 6)}px`;
    (popup.querySelector("button:not(:disabled)") ?? popup).focus();
  }
  popup.tabIndex = -1;
  popup.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...popup.querySelectorAll("button:not(:disabled)")];
    all[(all.indexOf(root.getRootNode().activeElement) + step + all.length) % all.length]?.focus();
  });
  function closePopup() {
    popup.hidden = true;
    opener?.setAttribute("aria-expanded", "false");
    (opener?.isConnected ? opener : input).focus({ preventScroll: true });
  }
  function visible(text) {
    return text.replace(/ /g, "␣").replace(/\n/g, "⏎") || "(end)";
  }
  /** Show tokens or text; by the key, the last reply's first token gets the focus, so that arrows walk from it. */
  function putTokens(on, byKey = false) {
    showTokens = on;
    tokensBox.box.checked = on;
    if (!on) {
      colour = "";
      colourBox.box.value = "";
    }
    redrawAll();
    if (on && byKey)
      requestAnimationFrame(() =>
        [...list.querySelectorAll(".pc-chat-token[tabindex='0']")].at(-1)?.focus(),
      );
  }
  function redrawAll() {
    for (const part of drawn.values()) part.redraw();
  }

  // ---- figures

  function statsLine(stats) {
    const about = stats.final ? "" : "~",
      total = stats.new_tokens;
    const speed = stats.decode_tok_s
      ? `${about}${number(stats.decode_tok_s, stats.decode_tok_s < 10 ? 1 : 0)} tokens/s`
      : `${about}… tokens/s`;
    return `${speed} · first token ${stats.ttft_s < 1 ? `${number(1000 * stats.ttft_s)} ms` : `${number(stats.ttft_s, 2)} s`} · ${about}${number(total)} tokens`;
  }
  function statsTable({ stats, model: name }) {
    const rows = [
      ["Reading the prompt", `${number(stats.prefill_tok_s)} tokens/s`],
      ["Writing", `${number(stats.decode_tok_s)} tokens/s`],
      ["Tokens", `${number(stats.prompt_tokens)} read + ${number(stats.new_tokens)} written`],
      ["Context used", `${number(100 * stats.context_used)} % of what it was trained on`],
      [
        "Mean entropy",
        `${number(stats.entropy, 2)} nats a token, as if it chose among ${number(Math.exp(stats.entropy), 1)} equally likely ones`,
      ],
      ["Whole reply", `${number(stats.total_s, 2)} s`],
      [
        "Drawn with",
        `temperature ${stats.temperature}, top-k ${stats.top_k || "off"}, top-p ${stats.top_p}, repetition penalty ${stats.repetition_penalty}, seed ${stats.seed}${stats.take ? `, take ${stats.take + 1}` : ""}`,
      ],
      ["Model", name],
    ];
    return h(
      "table",
      { class: "pc-table pc-chat-more" },
      h(
        "tbody",
        {},
        ...rows.map(([what, value]) =>
          h("tr", {}, h("td", { class: "pc-muted", text: what }), h("td", { text: value })),
        ),
      ),
    );
  }

  // ---- copy, save, load

  async function copy(text, from) {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const box = h("textarea", { value: text, style: { position: "fixed", opacity: 0 } });
      root.append(box);
      box.select();
      done = document.execCommand("copy");
      box.remove();
    }
    const said = done ? "Copied" : "Copying was refused by the browser";
    tell(done ? "" : said, !done);
    if (from && done) {
      from.textContent = said;
      setTimeout(() => {
        from.textContent = "Copy";
      }, 1200);
    } else if (done) {
      tell(said);
      setTimeout(() => {
        if (status.textContent === said) tell("");
      }, 1200);
    }
  }
  function copyAll() {
    const said = state.path
      .map((id) => nodes.get(id))
      .filter(Boolean)
      .map(
        (node) => `${node.role === "user" ? "You" : node.model || "Assistant"}: ${textOf(node)}`,
      );
    copy(said.join("\n\n"), null);
  }
  async function saveAll() {
    const found = await act("save").catch(() => null);
    if (!found) return;
    const url = URL.createObjectURL(new Blob([found.text], { type: "application/jsonl" }));
    const link = h("a", { href: url, download: found.name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    tell(
      found.count > 1
        ? `Saved ${found.count} conversations; primechat finetune reads them.`
        : "Saved one conversation. primechat finetune needs two or more in a file.",
    );
  }
  const file = h("input", {
    type: "file",
    accept: ".jsonl,.json",
    hidden: true,
    onchange: async () => {
      const [one] = file.files;
      file.value = "";
      if (one)
        act("load", { text: await one.text() }).then(
          () => tell(`Loaded ${one.name}.`),
          () => {},
        );
    },
  });

  // ---- settings

  function flush() {
    const values = pending;
    pending = {};
    if (Object.keys(values).length) quietly("settings", values);
  }
  const soon = debounce(flush, 150);
  const choose = (name, value) => {
    const values = {
      [name]: value,
      ...(SAMPLING.includes(name) && {
        chosen: [...new Set([...(state.settings.chosen ?? []), name])],
      }),
    };
    Object.assign(state.settings, values);
    Object.assign(pending, values);
    soon();
  };
  const brought = (id) => state.advice?.[id]?.[0] ?? {};
  /** The value in force for the first model: what the reader chose, else what its makers advise. */
  const inForce = (name) =>
    (state.settings.chosen?.includes(name) ? undefined : brought(state.chosen[0])[name]) ??
    state.settings[name];
  /** In words, what the makers of the chosen models advise, but for one of them. */
  function advise(but = "") {
    const own = state.settings.chosen ?? [];
    return state.chosen
      .filter((id) => Object.keys(brought(id)).length && state.advice[id][1] !== but)
      .map((id) => {
        const listed = Object.entries(brought(id)).map(
          ([name, value]) =>
            `${WORDS[name]} ${value}${own.includes(name) ? " (you chose otherwise)" : ""}`,
        );
        return `${state.advice[id][1]} advises ${listed.join(", ")}: ${id} follows it.`;
      })
      .join(" ");
  }
  function follow() {
    const usual = model.get("first")?.settings ?? {};
    pending = {
      ...pending,
      ...Object.fromEntries(SAMPLING.map((name) => [name, usual[name]])),
      chosen: [],
    };
    Object.assign(state.settings, pending);
    putSettings();
    flush();
  }
  const settingSlider = (name, label, range, show) =>
    Object.assign(
      slider({ label, ...range, value: range.min, input: (value) => choose(name, value), show }),
      { trait: name },
    );
  const sliders = [
    settingSlider("temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, (value) =>
      value === 0 ? "0, always the likeliest" : number(value, 2),
    ),
    settingSlider("top_k", "Top k", { min: 0, max: 200 }, (value) =>
      value ? `the ${value} likeliest` : "all tokens",
    ),
    settingSlider("top_p", "Top p", { min: 0.05, max: 1, step: 0.01 }, (value) =>
      value === 1 ? "all" : number(value, 2),
    ),
    settingSlider(
      "repetition_penalty",
      "Repetition penalty",
      { min: 1, max: 2, step: 0.05 },
      (value) => (value === 1 ? "off" : number(value, 2)),
    ),
    settingSlider(
      "max_new_tokens",
      "Longest reply",
      { min: 8, max: 1024, step: 8 },
      (value) => `${value} tokens`,
    ),
  ];
  const seed = h("input", {
    type: "number",
    min: 0,
    step: 1,
    class: "pc-input",
    "aria-label": "Seed",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => choose("seed", Math.max(0, Math.floor(Number(seed.value) || 0))),
  });
  const system = h("textarea", {
    class: "pc-text",
    "aria-label": "System prompt",
    rows: 3,
    placeholder: "For example: You are a pirate.",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => choose("system", system.value),
  });
  const colourBox = select({
    label: "Colour tokens by",
    options: COLOURS,
    value: "",
    input: (value) => {
      colour = value;
      if (value) {
        showTokens = true;
        tokensBox.box.checked = true;
      }
      redrawAll();
    },
  });
  const tokensBox = toggle({ label: "Show tokens", value: false, input: putTokens });
  const alpha = settingSlider(
    "alpha",
    "Adapter strength",
    { min: 0, max: 2, step: 0.05 },
    (value) => (value === 0 ? "off" : number(value, 2)),
  );
  const advice = h("p", { class: "pc-muted" }),
    advised = button("Back to the usual settings", follow);
  alpha.hidden = true;
  sliders.push(alpha);
  panel.append(
    h("h3", { class: "pc-title", text: "How the next token is drawn" }),
    advice,
    ...sliders,
    h("label", { class: "pc-field" }, h("span", { class: "pc-label", text: "Seed" }), seed),
    h("p", { class: "pc-muted", text: "The same seed and settings give the same reply again." }),
    advised,
    h("h3", { class: "pc-title", text: "System prompt" }),
    system,
    h("p", {
      class: "pc-muted",
      text: "Stands before the first message. Small models hardly follow it.",
    }),
    h("h3", { class: "pc-title", text: "Tokens" }),
    tokensBox,
    colourBox,
    h("p", {
      class: "pc-muted",
      text: "Strong colour: the model was unsure, or took a token that it held unlikely.",
    }),
    h("h3", { class: "pc-title", text: "Conversations" }),
    h(
      "div",
      { class: "pc-row" },
      button("Save", saveAll),
      button("Load", () => file.click()),
      file,
    ),
    h("p", {
      class: "pc-muted",
      text: "JSON lines, as primechat finetune reads them. This browser also keeps the last 50 conversations, for when the page is loaded again.",
    }),
    more(
      "Keys",
      h(
        "table",
        { class: "pc-table" },
        h(
          "tbody",
          {},
          ...KEYS.map(([key, what]) =>
            h("tr", {}, h("td", { class: "pc-mono", text: key }), h("td", { text: what })),
          ),
        ),
      ),
    ),
  );
  function openPanel(on) {
    panel.hidden = !on;
    settingsButton.setAttribute("aria-expanded", String(on));
    if (on) panel.querySelector("input").focus();
    else input.focus();
  }
  function putSettings() {
    advice.textContent = advise();
    advice.hidden = !advice.textContent;
    advised.hidden = !state.settings.chosen?.length;
    const here = root.getRootNode().activeElement;
    for (const one of sliders) if (here !== one.bar) one.put(inForce(one.trait));
    if (here !== seed) seed.value = String(state.settings.seed);
    if (here !== system) system.value = state.settings.system;
  }

  conversations.hidden = true;
  tell("Looking up the models: some seconds. You can write meanwhile.");
  const first = model.get("first");
  if (first?.chosen) {
    // the models are known; only sending waits until the notebook's other cells are done
    takeIn(first, false);
    tell("The model is being opened. You can write meanwhile.");
  }
  ask("act", { name: "ready", given: {} }).then(take, (error) => tell(error.message)); // a picture of a lab says that it is one
  return end;
}

export default { render };
