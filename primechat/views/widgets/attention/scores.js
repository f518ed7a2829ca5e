// What heads are like: a strip for each score, with the same heads on random numbers; and one score taken apart.
import { commit, frame, h, number } from "../kit.js";
import { card, complain, percent, signed, soon, spell, tokenText } from "./draw.js";

const SVG = "http://www.w3.org/2000/svg";
function s(tag, props, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

/** Strips: a dot for each head of the model above, of the control below. */
function showScores({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "scores");
  const strips = h("div", { class: "pc-stack" }),
    say = h("p", {
      class: "pc-muted pc-tight",
      "aria-live": "polite",
      text: "Each dot is a mean over held-out passages, not of your text alone. A number such as 2.3 is layer 2, head 3. Point at a dot for its name; click it to enlarge that head at the top.",
    });
  card({ model, root }, "More: what every head is like, beside random numbers", strips, say);
  const W = 640,
    H = 74,
    L = 118,
    R = 24;
  function strip({ name, meaning, unit, values, halves, control, lo, hi }, passages) {
    const x = (v) => L + ((v - lo) / (hi - lo || 1)) * (W - L - R);
    const show = (v) => (unit === "%" ? percent(v) : `${number(v, 1)} ${unit}`);
    const picture = s("svg", {
      viewBox: `0 0 ${W} ${H}`,
      class: "pc-strip",
      role: "group",
      "aria-label": name,
    });
    for (const [y, label] of [
      [22, "this model"],
      [48, "random"],
    ]) {
      picture.append(
        s("text", { x: 0, y: y + 4, class: "pc-strip-label" }, label),
        s("line", { x1: L, x2: W - R, y1: y, y2: y, class: "pc-rule" }),
      );
    }
    picture.append(
      s("text", { x: L, y: 70, class: "pc-strip-label" }, show(lo)),
      s("text", { x: W - R, y: 70, class: "pc-strip-label pc-end" }, show(hi)),
    );
    const [layer, head] = model.get("head"),
      best = values.flat().indexOf(Math.max(...values.flat()));
    values.forEach((row, i) =>
      row.forEach((v, j) => {
        if (v === null) return;
        const dot = s("circle", {
          cx: x(v),
          cy: 22,
          r: 6.5,
          class: i === layer && j === head ? "pc-dot pc-on" : "pc-dot",
          tabindex: 0,
          role: "button",
          "aria-label": `layer ${i}, head ${j}: ${show(v)}`,
        });
        const tell = () => {
          say.textContent = `Layer ${i}, head ${j}: ${name.toLowerCase()} ${show(v)} ± ${show(halves[i][j])} (mean over ${passages} held-out passages, 95 % interval); with random numbers ${control ? show(control[i][j]) : "not computed"}.`;
        };
        dot.addEventListener("pointerenter", tell);
        dot.addEventListener("focus", tell);
        dot.addEventListener("click", () => commit(model, { head: [i, j] }));
        dot.addEventListener("keydown", (event) => {
          if (event.key === "Enter") commit(model, { head: [i, j] });
        });
        picture.append(dot);
        if (i * row.length + j === best)
          picture.append(
            s("text", { x: x(v), y: 10, class: "pc-strip-label pc-mid" }, `${i}.${j}`),
          );
      }),
    );
    control?.forEach((row) =>
      row.forEach((v) => {
        if (v !== null)
          picture.append(s("circle", { cx: x(v), cy: 48, r: 4.5, class: "pc-dot pc-random" }));
      }),
    );
    return h(
      "div",
      {},
      h(
        "div",
        {},
        h("span", { class: "pc-title", text: name }),
        h("span", { class: "pc-muted", text: `  ${meaning}` }),
      ),
      picture,
    );
  }
  const draw = soon(() => {
    const d = model.get("data");
    if (!complain(root, d)) strips.replaceChildren(...(d.strips ?? []).map((x) => strip(x, d.passages)));
  });
  listen(["data", "head"], draw);
  draw();
  return end;
}

/** One score of one head: query, key, their product channel by channel. */
function showNeurons({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "neurons");
  const text = tokenText({
    label: "Your text; click the token that is read",
    pick: (i) => commit(model, { key: i }),
  });
  const say = h("p", { class: "pc-say", "aria-live": "polite" }),
    rows = h("div", { class: "pc-bands" }),
    sum = h("p", { class: "pc-say" });
  card({ model, root }, "More: one attention score, channel by channel", say, text, rows, sum);
  const draw = soon(() => {
    const d = model.get("data");
    if (complain(root, d)) return;
    if (!d.bands) return;
    text.put(d.tokens);
    text.mark(model.get("key"));
    text.tint(d.tokens.map((_, i) => (i === d.at ? 0.5 : 0)));
    say.textContent = `Layer ${d.layer}, head ${d.head}. The token “${spell(d.tokens[d.at])}” asks, the outlined one answers: click any token up to it.`;
    rows.replaceChildren(
      ...d.bands.map(({ name, values }) => {
        const most = Math.max(...values.map(Math.abs), 1e-9);
        return h(
          "div",
          { class: "pc-band" },
          h("span", { class: "pc-label", text: name }),
          h(
            "span",
            { class: "pc-channels" },
            ...values.map((v, i) =>
              h("i", {
                title: `channel ${i}: ${v.toFixed(3)}`,
                style: {
                  background: `color-mix(in srgb, ${v >= 0 ? "var(--pc-accent)" : "var(--pc-series-1)"} ${Math.round((100 * Math.abs(v)) / most)}%, transparent)`,
                },
              }),
            ),
          ),
        );
      }),
    );
    sum.textContent = `The products add up to ${signed(d.product)}; times ${d.scale.toFixed(3)} that is a score of ${signed(d.score)}. Against the scores of all other tokens it gets ${percent(d.weight)} of the attention.`;
  });
  listen(["data", "key"], draw);
  draw();
  return end;
}

const KINDS = { scores: showScores, neurons: showNeurons };
export default { render: (context) => KINDS[context.model.get("kind")](context) };
