import {
  asking,
  button,
  commit,
  debounce,
  frame,
  h,
  number,
  select,
  tabs,
  toggle,
} from "../kit.js";
import {
  countCharacters,
  encodeText,
  findBorders,
  ground,
  groupTokens,
  hex,
  readBytes,
  showSpaces,
  tintRun,
} from "./chips.js";

const DRAWN = 3000; // units of text around the visible part that are drawn as chips; a shorter text is drawn whole
const MAX_SHOWN = 3,
  MAX_TEXT = 200000,
  MAX_CARD_CHARS = 28,
  MAX_CARD_BYTES = 16;

/** The one run in which two texts differ, with no emoji cut in half: {at, cut, put}. */
function findEdit(old, now) {
  const most = Math.min(old.length, now.length);
  let at = 0,
    tail = 0;
  while (at < most && old.charCodeAt(at) === now.charCodeAt(at)) at++;
  while (
    tail < most - at &&
    old.charCodeAt(old.length - 1 - tail) === now.charCodeAt(now.length - 1 - tail)
  )
    tail++;
  if (/[\ud800-\udbff]/.test(old.charAt(at - 1))) at--;
  if (tail && /[\udc00-\udfff]/.test(old.charAt(old.length - tail))) tail--;
  return { at, cut: old.length - at - tail, put: now.slice(at, now.length - tail) };
}

/** First index in 0..n at which test holds; test is false, then true. */
function bisect(n, test) {
  let low = 0,
    high = n;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (test(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** A text with its chips as grounds behind the letters; `draw` touches only what differs from the last drawing. */
function makeSheet() {
  const before = document.createTextNode(""),
    after = document.createTextNode(""),
    body = h("span");
  const [head, tail] = [h("div", {}, before), h("div", {}, after)]; // blocks of their own at line ends: not laid out again
  const node = h("div", { class: "pc-sheet", "aria-hidden": "true" }, head, body, tail);
  let drawn = [];
  const build = (text, group, tints, spaces) => {
    const chip = h("span", { class: "pc-chip" });
    if (group.differs) chip.classList.add("pc-differs");
    if (tints.length) chip.style.background = ground(tints);
    else chip.classList.add("pc-waiting");
    for (const part of spaces ? text.split(/([ \t\n\u00a0])/) : [text]) {
      if (!part) continue;
      if (spaces && /^[ \t\n\u00a0]$/.test(part))
        chip.append(
          h("span", { class: "pc-space", dataset: { mark: showSpaces(part) }, text: part }),
        );
      else chip.append(part);
    }
    return chip;
  };
  const draw = (text, groups, tintsOf, first, last, spaces) => {
    const next = [];
    for (let i = first; i < last; i++) {
      const group = groups[i],
        piece = text.slice(group.from, group.to),
        tints = tintsOf(group);
      next.push({
        key: `${tints.join()}|${group.differs ? 1 : 0}${spaces ? 1 : 0}|${piece}`,
        piece,
        tints,
        group,
      });
    }
    const most = Math.min(next.length, drawn.length);
    let lead = 0,
      trail = 0;
    while (lead < most && next[lead].key === drawn[lead].key) {
      next[lead].node = drawn[lead].node;
      lead++;
    }
    while (
      trail < most - lead &&
      next[next.length - 1 - trail].key === drawn[drawn.length - 1 - trail].key
    ) {
      next[next.length - 1 - trail].node = drawn[drawn.length - 1 - trail].node;
      trail++;
    }
    for (let i = lead; i < drawn.length - trail; i++) drawn[i].node.remove();
    const fresh = document.createDocumentFragment();
    for (let i = lead; i < next.length - trail; i++) {
      next[i].node = build(next[i].piece, next[i].group, next[i].tints, spaces);
      fresh.append(next[i].node);
    }
    body.insertBefore(fresh, trail ? next[next.length - trail].node : null);
    next.forEach((entry, i) => {
      entry.node.index = first + i;
    });
    const start = first < groups.length ? groups[first].from : text.length,
      end = last > 0 && last <= groups.length ? groups[last - 1].to : 0;
    if (before.data !== text.slice(0, start)) before.data = text.slice(0, start);
    head.style.display = start === 0 || text[start - 1] === "\n" ? "block" : "inline";
    tail.style.display = end === 0 || text[end - 1] === "\n" ? "block" : "inline";
    const rest = text.slice(Math.max(start, end)) + "\u200b"; // so that a last empty line has a height
    if (after.data !== rest) after.data = rest;
    drawn = next;
  };
  const chipOf = (index) => drawn[index - (drawn[0]?.node.index ?? 0)]?.node;
  const bottomOf = (offset) => {
    // of the character at an offset, wherever it is drawn
    const range = document.createRange();
    if (offset < before.length) range.setStart(before, offset);
    else {
      const chip = drawn[bisect(drawn.length, (i) => drawn[i].group.to > offset)];
      if (chip) {
        range.selectNode(chip.node);
        return range.getBoundingClientRect().bottom;
      }
      range.setStart(
        after,
        Math.min(Math.max(0, offset - (drawn.at(-1)?.group.to ?? before.length)), after.length),
      );
    }
    range.setEnd(
      range.startContainer,
      Math.min(range.startOffset + 1, range.startContainer.length),
    );
    return range.getBoundingClientRect().bottom;
  };
  return { node, draw, chipOf, bottomOf };
}

function render({ model, el }) {
  const ui = frame({ model, el }, "playground"),
    { root } = ui,
    ask = asking(model, ui.later);
  const readChoices = () =>
    new Map(model.get("choices").map(([key, label, context]) => [key, { label, context }]));
  let choices = readChoices();
  const start = model.get("start");
  let text = model.get("text"),
    shown = [...model.get("shown")],
    revision = -1;
  let panes = [],
    panesText = start.text,
    view = "whole",
    spaces = false,
    active = 0,
    busy = false,
    editedAt = 0,
    settled = 0,
    later = 0,
    price = 2.5,
    context = 0;
  let focus = null; // { pane, group }: where the pointer is; else the caret decides

  // ---- the editor
  const area = h("textarea", {
    class: "pc-area",
    spellcheck: "false",
    autocomplete: "off",
    autocapitalize: "off",
    maxlength: MAX_TEXT,
    "aria-label": "Text to cut into tokens",
    placeholder: "Type or paste a text",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => changed(),
  });
  area.value = text;
  const main = makeSheet();
  const editor = h(
    "div",
    { class: "pc-editor", onscroll: () => drawSheets() },
    h("div", { class: "pc-paper" }, main.node, area),
  );
  const detail = h("div", { class: "pc-detail pc-mono", role: "status" });
  const fault = h("div", { class: "pc-error", role: "alert", hidden: true });
  const stats = h("div", { class: "pc-stats" });
  const others = h("div", { class: "pc-others" });
  const chooser = h("div", { class: "pc-row pc-chooser" });
  const cards = h(
    "div",
    {
      class: "pc-cards",
      tabindex: "0",
      "aria-label": "Tokens one by one",
      onscroll: () => {
        scrolled = cards.scrollTop;
        drawCards();
      },
    },
    h("div", { class: "pc-spacer" }),
  );
  const cardTabs = h("div", { class: "pc-row" });
  const how = tabs({
    label: "How to show the tokens",
    options: [
      ["whole", "Whole characters"],
      ["bytes", "Bytes"],
    ],
    value: view,
    input: (next) => {
      view = next;
      layCards();
      drawCards();
      drawDetail();
    },
  });
  const copy = button(
    "Copy ids",
    async () => {
      try {
        await navigator.clipboard.writeText(JSON.stringify(panes[0]?.ids ?? []));
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "The browser forbids it";
      }
      setTimeout(() => {
        copy.textContent = "Copy ids";
      }, 1500);
    },
    { title: "Copy all ids, as a list that Python reads" },
  );
  root.append(
    h(
      "div",
      { class: "pc-stack" },
      h(
        "div",
        { class: "pc-row pc-between" },
        chooser,
        toggle({
          label: "Show white space",
          value: spaces,
          input: (on) => {
            spaces = on;
            drawSheets();
          },
        }),
      ),
      h("div", {}, editor, detail),
      fault,
      stats,
      others,
      h(
        "div",
        {},
        h(
          "div",
          { class: "pc-row pc-between pc-cards-head" },
          h(
            "div",
            { class: "pc-row" },
            h("h3", { class: "pc-title", text: "Every token with its id" }),
            copy,
            cardTabs,
          ),
          how,
        ),
        cards,
      ),
    ),
  );

  function drawChooser() {
    const options = [...choices].map(([key, choice]) => [key, choice.label]);
    const boxes = shown.map((key, i) => {
      const box = select({
        label: i ? "compare with" : "Tokenizer",
        options,
        value: key,
        input: (next) => {
          shown[i] = next;
          reopen();
        },
      });
      return i
        ? h(
            "span",
            { class: "pc-row pc-tight" },
            box,
            button(
              "×",
              () => {
                shown.splice(i, 1);
                reopen();
              },
              { title: "Stop comparing with it" },
            ),
          )
        : box;
    });
    const unused = options.find(([key]) => !shown.includes(key));
    const add =
      shown.length < MAX_SHOWN && unused
        ? button(
            "Compare",
            () => {
              shown.push(unused[0]);
              reopen();
            },
            { title: "Cut the same text with another tokenizer as well" },
          )
        : null;
    chooser.replaceChildren(...boxes, ...(add ? [add] : []));
  }

  // ---- talking to Python: one question at a time, the last text always
  function reopen() {
    commit(model, { shown: [...shown] });
    panes = panes.filter((pane) => shown.includes(pane.key));
    context = 0;
    drawChooser();
    revision = -1;
    pump();
  }
  async function pump() {
    if (busy) return;
    busy = true;
    try {
      while (revision < 0 || panesText !== text) {
        const asked = text,
          since = editedAt,
          names = [...shown];
        const answer =
          revision < 0
            ? await ask("open", { text: asked, shown: names }, 180000)
            : await ask("edit", { revision, ...findEdit(panesText, asked), shown: names });
        if (answer.stale) {
          revision = -1;
          continue;
        }
        take(answer, asked);
        root.dataset.received = String(
          answer.panes.reduce((sum, pane) => sum + (pane.ids?.length ?? 0), 0),
        );
        if (since && since !== settled) {
          settled = since;
          root.offsetHeight;
          root.dataset.settledMs = (performance.now() - since).toFixed(1);
        }
        if (names.join() !== shown.join()) revision = -1;
      }
      fault.hidden = true;
    } catch (error) {
      revision = -1;
      fault.textContent = error.message;
      fault.hidden = false;
      if (error.silent) later = setTimeout(pump, 1000); // a notebook that is busy answers when it is done
    }
    root.dataset.revision = String(revision);
    busy = false;
  }
  function take(answer, asked) {
    const old = new Map(panes.map((pane) => [pane.key, pane]));
    const borders = findBorders(asked);
    panes = answer.panes.map((part) => {
      const pane = old.get(part.key) ?? {
        key: part.key,
        sheet: makeSheet(),
        ids: [],
        sizes: [],
        tints: [],
      };
      pane.fault = part.fault;
      if (part.fault) return Object.assign(pane, { ids: [], sizes: [], tints: [], groups: [] });
      const { at, ids, sizes } = part,
        cut = part.whole ? pane.ids.length : part.cut;
      const tints = tintRun(
        ids.length,
        pane.tints[at - 1],
        pane.tints.slice(at, at + cut),
        pane.tints[at + cut],
      );
      for (const [list, put] of [
        [pane.ids, ids],
        [pane.sizes, sizes],
        [pane.tints, tints],
      ]) {
        const rest = list.slice(at + cut);
        list.length = at;
        for (const piece of [put, rest]) for (const item of piece) list.push(item);
      }
      return Object.assign(pane, {
        groups: groupTokens(asked, pane.sizes, borders),
        vocab_size: part.vocab_size,
      });
    });
    panesText = asked;
    clearTimeout(later); // a tokenizer that is still being opened is asked for again
    if (answer.panes.some((part) => part.pending))
      later = setTimeout(() => {
        revision = -1;
        pump();
      }, 700);
    Object.assign(root.dataset, {
      shown: asked.length,
      keys: panes.map((pane) => pane.key).join(),
    }); // for who waits for it
    revision = answer.revision;
    active = Math.min(active, Math.max(0, panes.length - 1));
    panes.characters = countCharacters(borders);
    panes.bytes = encodeText(asked);
    for (const pane of panes) {
      pane.edges = new Int32Array(pane.sizes.length + 1);
      pane.sizes.forEach((size, i) => {
        pane.edges[i + 1] = pane.edges[i] + size;
      });
    }
    markDifferences();
    focus = null;
    drawStats();
    drawOthers();
    drawSheets();
    layCards();
    drawCards();
    drawDetail();
  }
  function markDifferences() {
    const sound = panes.filter((pane) => !pane.fault),
      votes = new Uint8Array(panes.bytes.length + 1);
    for (const pane of sound) for (const edge of pane.edges) votes[edge]++;
    panes.differing = votes.reduce(
      (sum, vote) => sum + (vote > 0 && vote < sound.length ? 1 : 0),
      0,
    );
    for (const pane of sound)
      for (const group of pane.groups) group.differs = votes[pane.edges[group.a]] < sound.length;
  }
  const echo = debounce(() => {
    if (model.get("text") !== text) commit(model, { text });
  }, 600);
  function changed() {
    text = area.value;
    editedAt = performance.now();
    drawSheets();
    pump();
    echo();
  }
  ui.listen("text", () => {
    const next = model.get("text");
    if (
      next === text ||
      (root.getRootNode().activeElement === area && performance.now() - editedAt < 3000)
    )
      return;
    text = next;
    area.value = next;
    editedAt = 0;
    drawSheets();
    pump();
  });

  ui.listen("choices", () => {
    choices = readChoices();
    drawChooser();
    if (shown.some((key) => !panes.find((pane) => pane.key === key && !pane.fault))) reopen();
  });

  // ---- drawing the texts
  function currentGroups(pane) {
    // those of the last answer, moved by what was typed since
    if (panesText === text) return pane.groups;
    const { at, cut, put } = findEdit(panesText, text),
      shift = put.length - cut,
      end = at + cut;
    const first = bisect(pane.groups.length, (i) => pane.groups[i].to > at),
      groups = pane.groups.slice(0, first);
    const last = bisect(pane.groups.length, (i) => pane.groups[i].from >= end);
    const from = groups.at(-1)?.to ?? 0,
      to = last < pane.groups.length ? pane.groups[last].from + shift : text.length;
    if (to > from) groups.push({ a: -1, b: -1, from, to });
    for (let i = last; i < pane.groups.length; i++) {
      const group = pane.groups[i];
      groups.push({ ...group, from: group.from + shift, to: group.to + shift });
    }
    return groups;
  }
  function drawSheet(pane, sheet, box) {
    const groups = currentGroups(pane),
      tintsOf = (group) => (group.a < 0 ? [] : pane.tints.slice(group.a, group.b));
    let first = 0,
      last = groups.length;
    if (text.length > DRAWN) {
      const view = box.getBoundingClientRect();
      const top = view.height ? bisect(text.length, (i) => sheet.bottomOf(i) > view.top) : 0;
      const lineStart = text.lastIndexOf("\n", Math.max(0, top - DRAWN / 2)) + 1,
        low = lineStart > top - DRAWN ? lineStart : top - DRAWN / 2;
      const line = text.indexOf("\n", top + DRAWN / 2),
        high = line >= 0 && line < top + DRAWN ? line + 1 : top + DRAWN / 2;
      first = bisect(groups.length, (i) => groups[i].to > low);
      last = bisect(groups.length, (i) => groups[i].from >= high);
    }
    pane.drawnGroups = groups;
    sheet.draw(text, groups, tintsOf, first, last, spaces);
  }
  function drawSheets() {
    if (panes.length) drawSheet(panes[0], main, editor);
    for (const pane of panes.slice(1))
      if (!pane.fault) drawSheet(pane, pane.sheet, pane.box ?? editor);
    light();
  }
  function drawOthers() {
    fault.hidden = !panes[0]?.fault;
    if (panes[0]?.fault) fault.textContent = panes[0].fault;
    others.hidden = panes.length < 2;
    if (panes.length < 2 && !others.firstChild) return;
    others.replaceChildren(
      ...panes.slice(1).map((pane) => {
        pane.box ??= h(
          "div",
          {
            class: "pc-editor pc-reading",
            tabindex: "0",
            "aria-label": `The text in tokens of ${choices.get(pane.key)?.label}`,
            onscroll: () => drawSheet(pane, pane.sheet, pane.box),
          },
          h("div", { class: "pc-paper" }, pane.sheet.node),
        );
        const base = panes[0].ids.length,
          more = base ? (100 * (pane.ids.length - base)) / base : 0;
        const said =
          Math.round(more) === 0
            ? "as many as above"
            : `${number(Math.abs(more))} % ${more > 0 ? "more" : "fewer"} than above`;
        return h(
          "div",
          { class: "pc-other" },
          h(
            "div",
            { class: "pc-row" },
            h("strong", { text: choices.get(pane.key)?.label ?? pane.key }),
            pane.fault
              ? null
              : h("span", {
                  class: "pc-muted",
                  text: `${number(pane.ids.length)} tokens, ${said}; ${number((100 * pane.ids.length) / Math.max(1, panes.characters), 1)} a 100 characters`,
                }),
          ),
          pane.fault ? h("div", { class: "pc-note", text: pane.fault }) : pane.box,
        );
      }),
      panes.length > 1 && panes.some((pane, i) => i && !pane.fault)
        ? h("div", {
            class: "pc-muted",
            text: panes.differing
              ? `${number(panes.differing)} borders stand in some of them only: each is marked by a bar.`
              : "All borders are the same.",
          })
        : "",
    );
    cardTabs.replaceChildren(
      ...(panes.length < 2
        ? []
        : [
            tabs({
              label: "Tokens of",
              options: panes
                .map((pane, i) => [String(i), choices.get(pane.key)?.label ?? pane.key])
                .filter((_, i) => !panes[i].fault),
              value: String(active),
              input: (next) => {
                active = Number(next);
                layCards();
                drawCards();
                drawDetail();
              },
            }),
          ]),
    );
  }

  // ---- counts
  const priceBox = h("input", {
    class: "pc-input pc-small",
    type: "number",
    min: 0,
    step: 0.05,
    value: price,
    "aria-label": "Dollars for a million tokens",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => {
      price = Math.max(0, Number(priceBox.value) || 0);
      drawStats();
    },
  });
  const contextBox = h("input", {
    class: "pc-input pc-small pc-wide",
    type: "number",
    min: 1,
    step: 1,
    "aria-label": "Tokens that the context holds",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => {
      context = Math.max(1, Math.round(Number(contextBox.value)) || 1);
      drawStats(true);
    },
  });
  const figures = {};
  for (const [name, label, title] of [
    ["tokens", ["tokens"]],
    [
      "characters",
      ["characters"],
      "As people see them: a letter with its accents, or an emoji of several parts, counts as one",
    ],
    ["bytes", ["bytes"], "In UTF-8, the way text is stored"],
    ["density", ["tokens a 100 characters"]],
    ["share", ["of a context of ", contextBox]],
    ["cost", ["at $ ", priceBox, " a million tokens"]],
  ]) {
    figures[name] = h("span", { dataset: { name } });
    stats.append(
      h(
        "div",
        { class: "pc-stat", title },
        figures[name],
        h("span", { class: "pc-caption" }, ...label),
      ),
    );
  }
  function drawStats(keep = false) {
    const pane = panes[0],
      n = pane?.ids.length ?? 0;
    if (!context) context = choices.get(pane?.key)?.context ?? 2048;
    if (!keep && contextBox.value !== String(context)) contextBox.value = String(context);
    const cost = (n * price) / 1e6;
    const all = {
      tokens: number(n),
      characters: number(panes.characters),
      bytes: number(panes.bytes.length),
      density: panes.characters ? number((100 * n) / panes.characters, 1) : "–",
      share: `${number((100 * n) / context, n / context < 0.1 ? 1 : 0)} %`,
      cost: `$ ${number(cost, cost && cost < 0.01 ? 6 : 2)}`,
    };
    for (const [name, value] of Object.entries(all))
      if (figures[name].textContent !== value) figures[name].textContent = value;
    figures.share.classList.toggle("pc-over", n > context);
  }

  // ---- one card a chip, in rows; only the rows in sight exist
  const pen = document.createElement("canvas").getContext("2d"),
    widths = new Map();
  let rows = [],
    rowOf = [],
    rowHeight = 0,
    liveRows = new Map(),
    room = 0,
    sight = 0,
    scrolled = 0; // reading sizes lays the page out: only when they change
  function measure(piece) {
    let width = widths.get(piece);
    if (width === undefined) widths.set(piece, (width = pen.measureText(shorten(piece)).width));
    return width;
  }
  function shorten(piece) {
    const shownPiece = showSpaces(piece);
    return shownPiece.length > MAX_CARD_CHARS
      ? `${shownPiece.slice(0, MAX_CARD_CHARS)}…`
      : shownPiece;
  }
  function cardText(group) {
    return shorten(panesText.slice(group.from, group.to));
  }
  function cardBytes(pane, token) {
    const bytes = panes.bytes.subarray(pane.edges[token], pane.edges[token + 1]);
    return hex(bytes.subarray(0, MAX_CARD_BYTES)) + (bytes.length > MAX_CARD_BYTES ? " …" : "");
  }
  function layCards() {
    const pane = panes[active];
    rows = [];
    rowOf = [];
    for (const row of liveRows.values()) row.spare = true; // drawCards keeps the rows that look the same
    rowHeight = view === "bytes" ? 74 : 56;
    const height = () => {
      const now = `${rows.length * rowHeight}px`;
      if (cards.firstChild.style.height !== now) cards.firstChild.style.height = now;
    };
    if (!pane || pane.fault) return height();
    const small = measure("0") * (12 / 15);
    let row = null,
      used = 0,
      broken = false;
    pane.groups.forEach((group, i) => {
      let below = 0;
      for (let t = group.a; t < group.b; t++) {
        const digits = 1 + Math.floor(Math.log10(pane.ids[t] || 1));
        below +=
          (view === "bytes"
            ? Math.max(digits, Math.min(pane.sizes[t], MAX_CARD_BYTES + 1) * 3 - 1)
            : digits) *
            small +
          10;
      }
      const width = Math.ceil(
        Math.max(measure(panesText.slice(group.from, group.to)) + 16, below + 2, 26),
      );
      if (!row || used + width > room || broken) {
        rows.push((row = { cards: [] }));
        used = 0;
      }
      row.cards.push([i, Math.min(width, room)]);
      rowOf[i] = rows.length - 1;
      used += width + 5;
      broken = panesText.charCodeAt(group.to - 1) === 10;
    });
    height();
  }
  function lookOf(pane, index) {
    const group = pane.groups[index],
      tokens = [];
    for (let t = group.a; t < group.b; t++)
      tokens.push([String(pane.ids[t]), view === "bytes" ? cardBytes(pane, t) : "", pane.tints[t]]);
    return { text: cardText(group), tokens, differs: Boolean(group.differs) };
  }
  function buildCard(look, width) {
    const tokens = look.tokens.map(([id, bytes]) =>
      h(
        "span",
        { class: "pc-card-token" },
        bytes && h("span", { class: "pc-card-bytes", text: bytes }),
        h("span", { class: "pc-card-id", text: id }),
      ),
    );
    return h(
      "div",
      { class: look.differs ? "pc-token pc-differs" : "pc-token", style: { width: `${width}px` } },
      h("span", {
        class: "pc-card-text",
        style: { background: ground(look.tokens.map((token) => token[2])) },
        text: look.text,
      }),
      h("span", { class: "pc-card-below" }, tokens),
    );
  }
  function drawCards() {
    const pane = panes[active];
    const top = Math.max(0, Math.floor(scrolled / rowHeight) - 1),
      end =
        pane && !pane.fault
          ? Math.min(rows.length, Math.ceil((scrolled + sight) / rowHeight) + 1)
          : 0;
    const spare = new Map();
    for (const [i, row] of liveRows) {
      if (row.spare) spare.set(row.key, row);
      if (row.spare) liveRows.delete(i);
      else if (i < top || i >= end) {
        row.node.remove();
        liveRows.delete(i);
      }
    }
    for (let i = top; i < end; i++) {
      if (liveRows.has(i)) continue;
      const looks = rows[i].cards.map(([index, width]) => [lookOf(pane, index), width]),
        key = JSON.stringify(looks);
      const row = spare.get(key) ?? {
        key,
        node: h(
          "div",
          { class: "pc-card-row" },
          looks.map(([look, width]) => buildCard(look, width)),
        ),
      };
      spare.delete(key);
      row.spare = false;
      rows[i].cards.forEach(([index], c) => {
        row.node.children[c].index = index;
      });
      if (row.node.style.top !== `${i * rowHeight}px`) row.node.style.top = `${i * rowHeight}px`;
      if (!row.node.isConnected) cards.firstChild.append(row.node);
      liveRows.set(i, row);
    }
    for (const row of spare.values()) row.node.remove();
    light();
  }

  // ---- the chip in focus: its letters, card, ids and bytes light up together
  function findFocus() {
    if (focus) return focus;
    const pane = panes[active],
      at = area.selectionEnd;
    if (!pane?.groups?.length || panesText !== text) return null;
    const index = Math.max(
      0,
      bisect(pane.groups.length, (i) => pane.groups[i].to >= at),
    );
    return { pane, index: Math.min(index, pane.groups.length - 1), token: -1 };
  }
  let lit = [];
  function light() {
    lit.forEach((node) => node.classList.remove("pc-lit"));
    lit = [];
    const now = findFocus(),
      group = now?.pane.groups[now.index];
    if (!group || panesText !== text) return;
    panes.forEach((pane, p) => {
      if (pane.fault) return;
      const sheet = p ? pane.sheet : main;
      const first =
        pane === now.pane
          ? now.index
          : bisect(pane.groups.length, (i) => pane.groups[i].to > group.from);
      for (
        let i = first;
        i < pane.groups.length && (i === first || pane.groups[i].from < group.to);
        i++
      ) {
        lit.push(sheet.chipOf(i));
        if (p === active)
          for (const card of liveRows.get(rowOf[i])?.node.children ?? [])
            if (card.index === i) lit.push(card);
      }
    });
    lit = lit.filter(Boolean);
    lit.forEach((node) => node.classList.add("pc-lit"));
  }
  function drawDetail() {
    const now = findFocus(),
      group = now?.pane.groups[now.index];
    if (!group) {
      detail.replaceChildren(
        h("span", { class: "pc-muted", text: "Point at a token, or move the caret into it." }),
      );
      return;
    }
    const { pane } = now,
      list = [];
    for (let t = group.a; t < Math.min(group.b, group.a + 12); t++) {
      const bytes = panes.bytes.subarray(pane.edges[t], pane.edges[t + 1]);
      list.push(
        h(
          "span",
          { class: t === now.token ? "pc-one pc-lit" : "pc-one" },
          h("span", {
            class: "pc-swatch",
            style: { background: ground([pane.tints[t]]) },
            text: readBytes(bytes.subarray(0, 40)),
          }),
          h("span", {}, h("span", { class: "pc-muted", text: "id " }), String(pane.ids[t])),
          h(
            "span",
            {},
            h("span", { class: "pc-muted", text: bytes.length === 1 ? "byte " : "bytes " }),
            hex(bytes.subarray(0, 40)),
          ),
          group.b - group.a === 1
            ? h("span", {
                class: "pc-muted",
                text: `token ${number(t + 1)} of ${number(pane.ids.length)}`,
              })
            : null,
        ),
      );
    }
    const several =
      group.b - group.a > 1
        ? h(
            "span",
            { class: "pc-whole" },
            showSpaces(panesText.slice(group.from, group.to)),
            h("span", { class: "pc-muted", text: ` is ${group.b - group.a} tokens` }),
          )
        : null;
    detail.replaceChildren(...[several, ...list].filter(Boolean));
  }
  function refocus(next) {
    if (focus?.pane === next?.pane && focus?.index === next?.index && focus?.token === next?.token)
      return;
    focus = next;
    light();
    drawDetail();
  }
  function follow(event) {
    if (panesText !== text) return;
    const over = root.getRootNode().elementsFromPoint(event.clientX, event.clientY);
    const card = over.find((node) => node.classList?.contains("pc-token"));
    if (card && cards.contains(card)) {
      const at = [...card.lastChild.children].findIndex((node) => over.includes(node)),
        group = panes[active].groups[card.index];
      return refocus({
        pane: panes[active],
        index: card.index,
        token: at < 0 || group.b - group.a === 1 ? -1 : group.a + at,
      });
    }
    const chip = over.find((node) => node.classList?.contains("pc-chip"));
    const pane = chip && panes.find((pane, p) => (p ? pane.sheet : main).node.contains(chip));
    refocus(
      pane && chip.index < pane.groups.length ? { pane, index: chip.index, token: -1 } : null,
    );
  }
  function followCaret() {
    if (focus || panesText !== text) return;
    light();
    drawDetail();
    const now = findFocus(),
      row = now ? rowOf[now.index] : -1;
    if (row >= 0 && (row * rowHeight < scrolled || (row + 1) * rowHeight > scrolled + sight)) {
      cards.scrollTop = Math.max(0, row * rowHeight - sight / 2);
    }
  }
  let wanted = null;
  root.addEventListener("pointermove", (event) => {
    if (!wanted)
      requestAnimationFrame(() => {
        const last = wanted;
        wanted = null;
        follow(last);
      });
    wanted = event;
  });
  root.addEventListener("pointerleave", () => refocus(null));
  const onSelect = () => {
    if (root.getRootNode().activeElement === area) {
      focus = null;
      followCaret();
    }
  };
  for (const name of ["keyup", "click", "focus", "select"]) area.addEventListener(name, onSelect);
  function readSizes() {
    pen.font = `15px ${getComputedStyle(cards).fontFamily}`;
    room = Math.max(120, cards.clientWidth - 20);
    sight = cards.clientHeight;
  }
  const resized = new ResizeObserver(
    debounce(() => {
      readSizes();
      widths.clear();
      layCards();
      drawCards();
      drawSheets();
    }, 60),
  );
  resized.observe(cards);
  ui.later(() => {
    resized.disconnect();
    clearTimeout(later);
  });

  drawChooser();
  readSizes();
  [text, area.value] = [start.text, start.text];
  take(start, start.text);
  const kept = model.get("text");
  if (kept !== start.text || shown.join() !== start.panes.map((pane) => pane.key).join()) {
    text = area.value = kept;
    revision = -1;
    drawSheets();
    pump();
  }
  root.dataset.ready = "true";
  return ui.end;
}

export default { render };
