import { asking, button, commit, debounce, frame, h, number, select } from "../kit.js";
import { TINTS, hex, readBytes } from "./chips.js";

const CARD = 132,
  ROW = 66,
  CHUNK = 120;

function render({ model, el }) {
  const ui = frame({ model, el }, "vocabulary"),
    { root } = ui,
    ask = asking(model, ui.later);
  const start = model.get("start");
  let found = start,
    chunks = new Map([[0, start.rows]]),
    count = 0,
    columns = 6,
    pending = new Set(),
    query = { query: "", kind: "", order: "id" },
    lit = -1;
  const kinds = () => [
    ["", "all kinds"],
    ...model.get("kinds").map((kind) => [kind, kind]),
    ...(found.never === null ? [] : [["never seen", `never seen (${number(found.never)})`]]),
  ];
  const orders = () =>
    model
      .get("orders")
      .filter((order) => found.never !== null || !order.endsWith("seen"))
      .map((order) => [order, order]);
  const choice = select({
    label: "Tokenizer",
    options: [],
    value: model.get("key"),
    input: (key) => {
      commit(model, { key });
      said.hidden = true;
      query.kind = query.kind === "never seen" ? "" : query.kind;
      if (query.order.endsWith("seen")) query.order = "id";
      search();
    },
  });
  const fill = () =>
    choice.fill(
      model.get("choices").map(([key, label]) => [key, label]),
      model.get("key"),
    );
  const words = h("input", {
    class: "pc-input pc-words pc-mono",
    type: "search",
    placeholder: "part of a token, or an id",
    spellcheck: "false",
    "aria-label": "Search",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => {
      query.query = words.value;
      searchSoon();
    },
  });
  const kind = select({
    label: "Kind",
    options: kinds(),
    value: "",
    input: (value) => {
      query.kind = value;
      search();
    },
  });
  const order = select({
    label: "Order",
    options: orders(),
    value: "id",
    input: (value) => {
      query.order = value;
      search();
    },
  });
  const counter = button("Find tokens that training never saw", () => tally(), {
    title: start.about,
  });
  const facts = h("span", { class: "pc-muted", role: "status" }),
    said = h("div", { class: "pc-note", hidden: true }),
    fault = h("div", { class: "pc-error", role: "alert", hidden: true });
  const detail = h("div", { class: "pc-detail pc-mono", role: "status" });
  const room = h("div", { class: "pc-spacer" }),
    grid = h(
      "div",
      { class: "pc-grid", tabindex: "0", "aria-label": "Tokens found", onscroll: () => draw() },
      room,
    );
  root.append(
    h(
      "div",
      { class: "pc-stack pc-tight" },
      h(
        "div",
        { class: "pc-row" },
        choice,
        h(
          "label",
          { class: "pc-field pc-grow" },
          h("span", { class: "pc-label", text: "Search" }),
          words,
        ),
        kind,
        order,
      ),
      h(
        "div",
        { class: "pc-row pc-between" },
        facts,
        h(
          "span",
          { class: "pc-row" },
          h("span", { class: "pc-muted", text: start.about }),
          counter,
        ),
      ),
      fault,
      said,
      grid,
      detail,
    ),
  );

  async function fetchChunk(i, mine = count) {
    if (chunks.has(i) || pending.has(i)) return;
    pending.add(i);
    try {
      const answer = await ask("find", {
        key: choice.box.value,
        ...query,
        offset: i * CHUNK,
        limit: CHUNK,
      });
      if (mine !== count) return;
      chunks.set(i, answer.rows);
      found = answer;
      fault.hidden = true;
      pending.delete(i);
      layOut();
    } catch (error) {
      if (mine === count) {
        pending.delete(i);
        fault.textContent = error.message;
        fault.hidden = false;
      }
    }
  }
  function search() {
    count++;
    chunks = new Map();
    pending = new Set();
    grid.scrollTop = 0;
    root.dataset.ready = "false";
    return fetchChunk(0, count);
  }
  const searchSoon = debounce(search, 80);
  async function tally() {
    counter.disabled = true;
    counter.textContent = "Counting …";
    try {
      const answer = await ask("count", { key: choice.box.value }, 120000);
      said.textContent = answer.said;
      said.hidden = false;
      found = { ...found, never: answer.never };
      query.kind = "never seen";
      query.order = "longest"; // learned pieces first, bytes last
      await search();
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
    counter.disabled = false;
    counter.textContent = "Find tokens that training never saw";
  }
  function layOut() {
    columns = Math.max(1, Math.floor((grid.clientWidth - 20) / CARD));
    room.style.height = `${Math.ceil(found.total / columns) * ROW}px`;
    facts.textContent =
      found.total === found.vocab_size
        ? `${number(found.vocab_size)} tokens`
        : `${number(found.total)} of ${number(found.vocab_size)} tokens`;
    kind.fill(kinds(), query.kind);
    order.fill(orders(), query.order);
    root.dataset.total = String(found.total);
    root.dataset.never = String(found.never);
    root.dataset.ready = "true";
    draw();
  }
  function draw() {
    const first = Math.max(0, Math.floor(grid.scrollTop / ROW) - 1) * columns,
      last = Math.min(
        found.total,
        (Math.ceil((grid.scrollTop + grid.clientHeight) / ROW) + 1) * columns,
      );
    const nodes = [];
    for (let i = first; i < last; i++) {
      const chunk = chunks.get(Math.floor(i / CHUNK)),
        entry = chunk?.[i % CHUNK];
      if (!chunk) {
        fetchChunk(Math.floor(i / CHUNK));
        continue;
      }
      if (!entry) continue;
      const [id, bytes, what, seen] = entry,
        special = what === "special";
      const text = special ? new TextDecoder().decode(Uint8Array.from(bytes)) : readBytes(bytes);
      nodes.push(
        h(
          "div",
          {
            class: "pc-entry",
            style: {
              left: `calc(${i % columns} * 100% / ${columns})`,
              width: `calc(100% / ${columns})`,
              top: `${Math.floor(i / columns) * ROW}px`,
            },
          },
          h(
            "button",
            {
              type: "button",
              class: i === lit ? "pc-lit" : "",
              onclick: () => point(i, entry),
              onfocus: () => point(i, entry),
              onpointerenter: () => point(i, entry),
            },
            h("span", {
              class: special ? "pc-text-of pc-special" : "pc-text-of",
              style: special ? {} : { background: `var(--tint-${id % TINTS})` },
              text,
            }),
            h(
              "span",
              { class: "pc-below" },
              h("span", { text: String(id) }),
              seen === null
                ? null
                : h("span", {
                    class: seen ? "" : "pc-never",
                    text: seen ? `${number(seen)} ×` : "never",
                  }),
            ),
          ),
        ),
      );
    }
    room.replaceChildren(...nodes);
    if (!found.total)
      room.replaceChildren(
        h("div", {
          class: "pc-muted",
          text: "No token is like that. The letters of it then are in several tokens: try it in the playground.",
        }),
      );
  }
  function point(i, [id, bytes, what, seen]) {
    lit = i;
    detail.replaceChildren(
      ...[
        ["id ", number(id)],
        ["bytes ", what === "special" ? "none: it stands for no text" : hex(bytes)],
        ["kind ", what],
        ...(seen === null
          ? []
          : [
              [
                "in the training text ",
                seen ? `${number(seen)} times` : "never as a token of its own",
              ],
            ]),
      ].map(([label, value]) =>
        h("span", {}, h("span", { class: "pc-muted", text: label }), value),
      ),
    );
  }
  const resized = new ResizeObserver(debounce(layOut, 60));
  resized.observe(grid);
  ui.later(() => resized.disconnect());
  ui.listen("choices", fill);
  fill();
  if (model.get("key") !== start.key) search();
  layOut();
  return ui.end;
}

export default { render };
