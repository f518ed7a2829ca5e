import { asking, button, commit, frame, h, number, select, tabs, whenSeen } from "../kit.js";
import { TINTS, countCharacters, findBorders, ground, groupTokens } from "./chips.js";

const MEASURES = [
  ["density", "Tokens a 100 characters"],
  ["ratio", "Times the English count"],
  ["tokens", "Tokens"],
];

function render({ model, el }) {
  const ui = frame({ model, el }, "fertility"),
    { root } = ui,
    ask = asking(model, ui.later);
  const passages = model
    .get("passages")
    .map(([name, group, text]) => ({
      name,
      group,
      text,
      characters: countCharacters(findBorders(text)),
    }));
  const columns = new Map(model.get("start").columns.map((column) => [column.key, column]));
  let shown = [...model.get("shown")],
    measure = "density",
    open = -1;
  const head = h("div", { class: "pc-row pc-between" }),
    body = h("div", { class: "pc-rows" });
  root.append(h("div", { class: "pc-stack" }, head, body));

  const valueOf = (column, i) => {
    const tokens = column.cuts[i].length;
    return measure === "tokens"
      ? tokens
      : measure === "density"
        ? (100 * tokens) / passages[i].characters
        : tokens / column.cuts[0].length;
  };
  const write = (value) =>
    measure === "tokens"
      ? number(value)
      : measure === "density"
        ? number(value, 1)
        : `${number(value, 2)} ×`;
  async function choose(next) {
    shown = next;
    commit(model, { shown: [...shown] });
    draw();
    for (const key of shown) {
      if (columns.get(key)?.cuts) continue;
      try {
        columns.set(key, await ask("measure", { key }, 60000));
      } catch (error) {
        columns.set(key, { key, fault: error.message });
      }
      draw();
    }
  }
  function draw() {
    const options = model.get("choices").map(([key, label]) => [key, label]),
      unused = options.find(([key]) => !shown.includes(key));
    head.replaceChildren(
      h(
        "div",
        { class: "pc-row" },
        shown.map((key, i) =>
          h(
            "span",
            { class: "pc-row pc-pick" },
            h("i", { class: "pc-dot", style: { background: `var(--pc-series-${i})` } }),
            select({
              label: "",
              options,
              value: key,
              input: (next) => choose(shown.map((old, j) => (j === i ? next : old))),
            }),
            i
              ? button("×", () => choose(shown.filter((_, j) => j !== i)), { title: "Take it out" })
              : null,
          ),
        ),
        shown.length < 3 && unused ? button("Compare", () => choose([...shown, unused[0]])) : null,
      ),
      tabs({
        label: "Measure",
        options: MEASURES,
        value: measure,
        input: (next) => {
          measure = next;
          draw();
        },
      }),
    );
    const sound = shown.map((key) => columns.get(key)).filter((column) => column?.cuts);
    const most = Math.max(
      1e-9,
      ...sound.flatMap((column) => passages.map((_, i) => valueOf(column, i))),
    );
    const nodes = shown
      .map((key) => columns.get(key))
      .filter((column) => column?.fault)
      .map((column) => h("div", { class: "pc-note", text: column.fault }));
    let group = "";
    passages.forEach((passage, i) => {
      if (passage.group !== group)
        nodes.push(h("div", { class: "pc-group", text: (group = passage.group) }));
      nodes.push(
        h(
          "button",
          {
            type: "button",
            class: i === open ? "pc-passage pc-open" : "pc-passage",
            "aria-expanded": String(i === open),
            onclick: () => {
              open = open === i ? -1 : i;
              draw();
            },
          },
          h("span", { class: "pc-name", text: passage.name }),
          h(
            "span",
            { class: "pc-bars" },
            shown.map((key, c) => {
              const column = columns.get(key);
              if (column?.fault) return null;
              if (!column) return h("span", { class: "pc-muted", text: "…" });
              const value = valueOf(column, i);
              return h(
                "span",
                { class: "pc-line-of" },
                h("span", {
                  class: "pc-fill",
                  style: { width: `${(100 * value) / most}%`, background: `var(--pc-series-${c})` },
                }),
                h("span", { class: "pc-number", text: write(value) }),
              );
            }),
          ),
        ),
      );
      if (i === open)
        nodes.push(
          h(
            "div",
            { class: "pc-shown" },
            sound.map((column) => drawChips(passage, column, i)),
          ),
        );
    });
    body.replaceChildren(...nodes);
    root.dataset.columns = String(sound.length);
  }
  function drawChips(passage, column, i) {
    const sizes = column.cuts[i],
      label = model.get("choices").find(([key]) => key === column.key)?.[1] ?? column.key;
    return h(
      "div",
      {},
      h("div", { class: "pc-muted", text: `${label}: ${number(sizes.length)} tokens` }),
      h(
        "div",
        { class: "pc-text-of" },
        groupTokens(passage.text, sizes).map((group) => {
          const tints = [];
          for (let t = group.a; t < group.b; t++) tints.push(t % TINTS);
          return h("span", {
            style: { background: ground(tints) },
            text: passage.text.slice(group.from, group.to),
          });
        }),
      ),
    );
  }
  ui.listen("choices", draw);
  draw();
  whenSeen(root, () => choose(shown), ui.later);
  root.dataset.ready = "true";
  return ui.end;
}

export default { render };
