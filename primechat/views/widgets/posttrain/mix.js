// Dialogue sets: cards with weights, one conversation with what is learned from lit, the shares of the mixture.
import { asking, button, commit, frame, h, number, slider, whenGuessed } from "../kit.js";

function render({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "mix", { partly: true });
  const ask = asking(model, later);
  const cards = h("div", { class: "pc-mix-cards" }),
    page = h("div", { class: "pc-card pc-mix-page" });
  const bar = h("div", { class: "pc-mix-bar", role: "img" }),
    legend = h("div", { class: "pc-row pc-mix-legend" });
  const line = h("code", { class: "pc-mono pc-mix-line" });
  let place = 0,
    guessed = false;
  const here = () => model.get("sets").filter((set) => set.here);
  const weigh = (name) => Number(model.get("weights")[name] ?? 0);
  const size = (v) => (v >= 1e6 ? `${number(v / 1e6, 1)} million` : number(v));

  function card(set) {
    const facts = set.here
      ? `${size(set.conversations)} talks · ${size(set.tokens)} tokens · ${number(set.messages / set.conversations, 1)} messages each`
      : `about ${number(set.megabytes)} MB to fetch`;
    const head = h(
      "button",
      {
        type: "button",
        class: "pc-mix-name",
        "aria-pressed": String(set.name === model.get("chosen")),
        onclick: () => {
          place = 0;
          commit(model, { chosen: set.name });
        },
      },
      h("span", { class: "pc-title", text: set.name }),
      h("span", { class: "pc-muted", text: facts }),
    );
    const weight =
      set.here &&
      slider({
        label: "passes",
        min: 0,
        max: 2,
        step: 0.25,
        value: weigh(set.name),
        show: (v) => (v ? `× ${v}` : "out"),
        input: (v) => commit(model, { weights: { ...model.get("weights"), [set.name]: v } }),
      });
    return h(
      "div",
      { class: `pc-card pc-mix-card${set.here ? "" : " pc-mix-far"}`, dataset: { name: set.name } },
      head,
      h("div", {
        class: "pc-muted pc-mix-about",
        text: `${set.about}. Licence: ${set.licence}${set.warning ? ` (${set.warning})` : ""}.`,
      }),
      weight,
    );
  }

  async function open() {
    const set = model.get("sets").find((one) => one.name === model.get("chosen"));
    if (!set) return;
    for (const node of cards.querySelectorAll(".pc-mix-name"))
      node.setAttribute("aria-pressed", String(node.parentNode.dataset.name === set.name));
    if (!set.here) {
      page.replaceChildren(
        h("h3", { class: "pc-title", text: set.name }),
        h("p", {
          class: "pc-prose",
          text: `${set.about}. It is not on this machine. To fetch it, after reading its licence, run:`,
        }),
        h("code", { class: "pc-mono", text: `primechat finetune --dialogues ${set.name}` }),
      );
      return;
    }
    if (!page.firstChild) page.append(h("p", { class: "pc-muted", text: "Reading its talks …" }));
    let found;
    try {
      found = await ask("read", { name: set.name, number: place });
    } catch (error) {
      page.replaceChildren(h("p", { class: "pc-error", text: error.message }));
      return;
    }
    const turns = found.parts.map((part) =>
      h(
        "div",
        { class: `pc-turn pc-turn-${part.role}` },
        h("span", { class: "pc-muted", text: part.role }),
        h(
          "p",
          { class: "pc-mono" },
          ...part.pieces.map(([text, on]) => h("span", { class: on ? "pc-lit" : "pc-dim", text })),
        ),
      ),
    );
    page.replaceChildren(
      h(
        "div",
        { class: "pc-row" },
        h("h3", { class: "pc-title", text: `${set.name}, talk ${place + 1} of ${found.of}` }),
        button(
          "Back",
          () => {
            place = Math.max(0, place - 1);
            open();
          },
          { disabled: place === 0 },
        ),
        button("Next", () => {
          place = (place + 1) % found.of;
          open();
        }),
      ),
      h(
        "p",
        { class: "pc-muted pc-mix-key" },
        h("span", { class: "pc-lit pc-mono", text: "lit" }),
        " is learned from, the rest is only read",
        guessed ? `: ${number(found.learned)} of ${number(found.tokens)} tokens.` : ".",
      ),
      h("div", { class: "pc-mix-turns" }, ...turns),
    );
  }

  function weighAll() {
    const parts = here()
      .map((set) => [set, weigh(set.name) * set.tokens])
      .filter(([, v]) => v > 0);
    const total = parts.reduce((sum, [, v]) => sum + v, 0);
    bar.replaceChildren(
      ...parts.map(([set, v], i) =>
        h("div", { style: { flex: String(v / total), background: `var(--pc-series-${i % 6})` } }),
      ),
    );
    legend.replaceChildren(
      ...parts.map(([set, v], i) =>
        h(
          "span",
          {},
          h("span", { class: "pc-mix-dot", style: { background: `var(--pc-series-${i % 6})` } }),
          `${set.name} ${number((100 * v) / total)} %`,
        ),
      ),
    );
    bar.setAttribute(
      "aria-label",
      parts.map(([set, v]) => `${set.name} ${number((100 * v) / total)} %`).join(", ") || "nothing",
    );
    const text = parts
      .map(([set]) => (weigh(set.name) === 1 ? set.name : `${set.name}*${weigh(set.name)}`))
      .join(", ");
    line.textContent = text
      ? `dialogues = "${text}"   (${size(total)} tokens a pass)`
      : "Nothing is in the mixture yet: give a set a weight.";
  }
  cards.append(...model.get("sets").map(card));
  root.append(
    h("div", { class: "pc-mix" }, cards, page),
    h(
      "div",
      { class: "pc-card pc-stack" },
      h("span", { class: "pc-label", text: "Your mixture, by tokens" }),
      bar,
      legend,
      line,
    ),
  );
  listen("chosen", open);
  listen("weights", weighAll);
  whenGuessed(
    model.get("gate"),
    () => {
      if (!guessed) {
        guessed = true;
        open();
      }
    },
    later,
  );
  if (!guessed) open();
  weighAll();
  return end;
}
export default { render };
