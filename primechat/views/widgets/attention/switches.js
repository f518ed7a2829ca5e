// A board of switches, one for each head and MLP, and what the model loses when one is off.
import { button, commit, frame, h, number, tabs } from "../kit.js";
import { complain, sayPart, shareBars, signed, soon, spell, tokenText } from "./draw.js";

function render({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "switches");
  const test = tabs({
    label: "The text that is read",
    value: model.get("test"),
    options: [
      ["text", "your text"],
      ["copy", "its words shuffled, twice"],
    ],
    input: (value) => commit(model, { test: value }),
  });
  const board = h("div", {
    class: "pc-board",
    role: "group",
    "aria-label": "Switches of heads and MLPs",
  });
  let running = false;
  const scan = button("Try each one alone", () => {
    running = !model.get("data").scanning;
    commit(model, { wish: running ? Math.max(0, model.get("wish")) + 1 : -1 });
  });
  const reset = button("All on", () => commit(model, { off: [] }));
  const state = h("p", { class: "pc-muted pc-tight", "aria-live": "polite" });
  const sums = h("dl", { class: "pc-stats" });
  const say = h("p", { class: "pc-say", "aria-live": "polite" });
  const bars = h("div", {});
  const heading = h("h4", { class: "pc-title" });
  const note = h("p", { class: "pc-muted pc-tight" });
  const text = tokenText({
    label: "Your text; click a token to see what the model expects after it",
    pick: (i) => commit(model, { at: i }),
  });
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-row" },
        h("span", { class: "pc-muted", text: "The model reads" }),
        test,
      ),
      h(
        "div",
        { class: "pc-two" },
        h(
          "div",
          {},
          h("h4", { class: "pc-title", text: "Switches" }),
          state,
          board,
          h("div", { class: "pc-row pc-gap" }, scan, reset),
        ),
        h(
          "div",
          {},
          h("h4", { class: "pc-title", text: "Loss" }),
          h("p", {
            class: "pc-muted pc-tight",
            text: "How surprised the model is by each next token, in nats: less is better.",
          }),
          sums,
          say,
        ),
      ),
      h(
        "div",
        { class: "pc-two" },
        h(
          "div",
          {},
          heading,
          h("p", {
            class: "pc-muted pc-tight",
            text: "Bars: with your switches. Thin marks: everything on.",
          }),
          bars,
        ),
        h("div", {}, h("h4", { class: "pc-title", text: "Where it got worse" }), note, text),
      ),
    ),
  );

  function flip(part) {
    const off = model.get("off");
    commit(model, {
      off: off.includes(part) ? off.filter((name) => name !== part) : [...off, part],
    });
  }
  const stat = (value, label) =>
    h("div", { class: "pc-stat" }, h("dd", { text: value }), h("dt", { text: label }));

  const draw = soon(() => {
    const d = model.get("data"),
      off = model.get("off");
    if (complain(root, d)) return;
    if (!d.n_layer) return;
    test.put(model.get("test"));
    const shape = `${d.n_layer}x${d.n_head}`;
    if (board.dataset.shape !== shape) {
      board.dataset.shape = shape;
      board.style.gridTemplateColumns = `auto repeat(${d.n_head}, minmax(38px, 64px)) minmax(52px, 76px)`;
      board.replaceChildren(
        h("span"),
        ...Array.from({ length: d.n_head }, (_, j) =>
          h("span", { class: "pc-label pc-mid", text: `head ${j}` }),
        ),
        h("span", { class: "pc-label pc-mid", text: "MLP" }),
      );
      for (let i = 0; i < d.n_layer; i++) {
        board.append(h("span", { class: "pc-label", text: `layer ${i}` }));
        for (const part of [
          ...Array.from({ length: d.n_head }, (_, j) => `layer.${i}.head.${j}`),
          `layer.${i}.mlp`,
        ]) {
          board.append(
            h("button", {
              type: "button",
              class: "pc-switch",
              role: "switch",
              dataset: { part },
              title: sayPart(part),
              "aria-label": sayPart(part),
              onclick: () => flip(part),
            }),
          );
        }
      }
    }
    const worst = Math.max(0.02, ...Object.values(d.scan ?? {}).map(Math.abs));
    for (const node of board.querySelectorAll(".pc-switch")) {
      const on = !off.includes(node.dataset.part),
        change = d.scan?.[node.dataset.part];
      node.setAttribute("aria-checked", String(on));
      node.textContent = !on ? "off" : change === undefined ? "on" : signed(change);
      const shade =
        change === undefined ? 0 : Math.round(60 * Math.min(1, Math.abs(change) / worst));
      node.style.background =
        on && shade
          ? `color-mix(in srgb, ${change > 0 ? "var(--pc-bad)" : "var(--pc-good)"} ${shade}%, var(--pc-raised))`
          : "";
    }
    state.textContent = d.scanning
      ? d.scanning
      : d.scan
        ? `Each number: ${model.get("test") === "copy" ? "how many nats less the same order saves" : "how much the loss grows"} with that part alone off.${d.control === null ? "" : model.get("test") === "copy" ? ` With random numbers in the blocks the same order saves ${d.control > 0.15 ? signed(d.control) : `nothing (${signed(d.control)})`}.` : ` With random numbers in the blocks: at most ${d.control.toFixed(2)}.`}`
        : "Click a head or an MLP to switch it off; its output becomes zero.";
    running = running && Boolean(d.scanning);
    scan.textContent = d.scanning ? "Stop" : "Try each one alone";
    if (running && d.turn === model.get("wish")) commit(model, { wish: d.turn + 1 }); // the next slice
    reset.disabled = !off.length;
    const change = d.loss - d.base,
      copied = d.saved_base - d.mixed_base,
      copiedNow = d.saved - d.mixed;
    const rows = [
      stat(number(d.base, 2), "everything on"),
      stat(number(d.loss, 2), "with your switches"),
      stat(signed(change), "change"),
    ];
    if (model.get("test") === "copy")
      rows.push(
        stat(number(d.saved_base, 2), "same order saves, all on"),
        stat(number(d.saved, 2), "same order saves now"),
        stat(number(d.mixed_base, 2), "in other orders, all on"),
        stat(number(d.mixed, 2), "in other orders now"),
      );
    sums.replaceChildren(...rows);
    say.textContent =
      model.get("test") === "copy"
        ? `The same words come twice, so the second half is easy for whoever looks back. In other orders (the mean of several) nothing can be copied: what they save comes from knowing which words occur. Only the rest is copying: ${signed(copied)} nats with everything on${off.length ? `, ${signed(copiedNow)} now` : ""}. ${copied < 0.15 ? "This model hardly copies even with everything on." : copiedNow < 0.5 * copied ? "With these switches its copying has mostly stopped." : off.length ? "It still copies." : "Which head does the copying?"}`
        : !off.length
          ? "Everything is on: this is the model as it is."
          : Math.abs(change) < 0.02
            ? "The model hardly notices."
            : change > 0
              ? `${off.length === 1 ? sayPart(off[0]) : `${off.length} parts`} off, and the text is harder to predict.`
              : "Without it the model does better here; on one text that can be chance.";
    heading.textContent = `What comes after “${spell(d.tokens[model.get("at")] ?? "")}”?`;
    shareBars(bars, d.guesses);
    text.put(d.tokens);
    text.mark(model.get("at"));
    const most = Math.max(0.5, ...d.deltas.map(Math.abs));
    text.tint(
      d.deltas.map((x) => Math.abs(x) / most),
      (i) => (d.deltas[i] > 0 ? "var(--pc-bad)" : "var(--pc-good)"),
    );
    note.textContent = off.length
      ? "Red: this token surprises the model more than before. Green: less."
      : "Switch something off, and the tokens that suffer turn red.";
  });
  listen(["data", "off", "at", "test"], draw);
  draw();
  return end;
}

export default { render };
