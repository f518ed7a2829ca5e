// Heads at work: all of them small, one of them large, and the token that is pointed at.
import { commit, debounce, frame, h, toggle } from "../kit.js";
import {
  complain,
  onTheme,
  paintHeat,
  percent,
  readBytes,
  soon,
  spell,
  tokenText,
} from "./draw.js";

/** The prompt. */
function showPrompt({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "prompt");
  const send = debounce(() => commit(model, { text: box.value }), 250);
  const box = h("textarea", {
    class: "pc-text pc-mono pc-prompt",
    spellcheck: "false",
    rows: 3,
    value: model.get("text"),
    oninput: send,
    "data-lm-suppress-shortcuts": "true",
  });
  const status = h("span", { class: "pc-muted", "aria-live": "polite" }),
    problem = h("div", { class: "pc-error", role: "alert" });
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "label",
        { class: "pc-stack pc-close" },
        h("span", { class: "pc-title", text: "Your text" }),
        box,
      ),
      status,
      problem,
    ),
  );
  const draw = soon(() => {
    status.textContent = model.get("status");
    problem.textContent = model.get("problem");
    problem.hidden = !model.get("problem");
    if (document.activeElement !== box) box.value = model.get("text");
  });
  listen(["status", "problem", "text"], draw);
  draw();
  return end;
}

/** Every head small, one large. */
function showHeads({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "heads");
  let over = -1; // the token under the pointer
  const text = tokenText({
    label: "Your text; point at a token to see what it reads",
    hover: (i) => {
      over = i;
      point();
    },
    pick: (i) => commit(model, { at: i }),
  });
  const say = h("p", { class: "pc-say", "aria-live": "polite" });
  const grid = h("div", {
    class: "pc-headgrid",
    role: "group",
    "aria-label": "All heads; rows are layers",
  });
  const large = h("canvas", { class: "pc-large", role: "img" });
  const line = h("div", { class: "pc-line" });
  const tip = h("div", { class: "pc-muted pc-tip" });
  const title = h("h4", { class: "pc-title" });
  const control = toggle({
    label: "random numbers in the blocks instead",
    value: model.get("control"),
    input: (on) => commit(model, { control: on }),
  });
  const plate = h("div", { class: "pc-plate" }, large, line);
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-row pc-spread" },
        h("span", {
          class: "pc-muted",
          text: "Point at a token. The shade of the others is how much it reads of them.",
        }),
        control,
      ),
      text,
      say,
      h(
        "div",
        { class: "pc-two" },
        h(
          "div",
          {},
          h("h4", { class: "pc-title", text: "All heads" }),
          h("p", { class: "pc-muted pc-tight", text: "Click one to enlarge it." }),
          grid,
        ),
        h(
          "div",
          {},
          title,
          h("p", {
            class: "pc-muted pc-tight",
            text: "Each row is a token that reads, each column a token that is read.",
          }),
          plate,
          tip,
        ),
      ),
    ),
  );

  const tokens = () => model.get("tokens");
  let weights = new Uint16Array(0),
    size = 0;
  const row = (t) => Array.from(weights.subarray(t * size, t * size + size), (w) => w / 65535);
  const current = () => (over >= 0 ? over : model.get("at"));

  function point() {
    const t = current();
    if (!size || t >= size) return;
    const shares = row(t);
    text.tint(shares.map(Math.sqrt));
    const best = shares
      .map((w, s) => [w, s])
      .sort((a, b) => b[0] - a[0])
      .slice(0, 3)
      .filter(([w]) => w > 0.05);
    const name = (s) =>
      s === t ? "itself" : s === 0 ? "the first token" : `“${spell(tokens()[s])}”`;
    say.textContent = `“${spell(tokens()[t])}” reads ${best.map(([w, s]) => `${name(s)} (${percent(w)})`).join(", ") || "a little of everything"}.`;
    Object.assign(line.style, { top: `${(100 * t) / size}%`, height: `max(2px, ${100 / size}%)` });
  }
  plate.addEventListener("pointermove", (event) => {
    const box = large.getBoundingClientRect();
    const s = Math.floor(((event.clientX - box.left) / box.width) * size),
      t = Math.floor(((event.clientY - box.top) / box.height) * size);
    if (s < 0 || t < 0 || s >= size || t >= size) return;
    over = t;
    point();
    text.read(s);
    tip.textContent =
      s > t
        ? "Tokens cannot read what comes after them."
        : `“${spell(tokens()[t])}” reads “${spell(tokens()[s])}”: ${percent(row(t)[s])}`;
  });
  plate.addEventListener("pointerleave", () => {
    over = -1;
    tip.textContent = "";
    text.read(-1);
    point();
  });
  plate.addEventListener("click", () => {
    if (over >= 0) commit(model, { at: over });
  });

  const draw = soon(() => {
    const d = model.get("data");
    if (complain(root, d)) return;
    if (!d.n_layer) return;
    text.put(tokens());
    text.mark(model.get("at"));
    weights = readBytes(model.get("pattern"), Uint16Array);
    size = Math.round(Math.sqrt(weights.length));
    const [layer, head] = d.head,
      wanted = model.get("head");
    title.textContent = `Layer ${layer}, head ${head}`;
    large.setAttribute("aria-label", `What each token reads in layer ${layer}, head ${head}`);
    paintHeat(
      large,
      Float32Array.from(weights, (w) => w / 65535),
      size,
      size,
    );
    if (
      grid.children.length !== d.n_layer * (d.n_head + 1) ||
      grid.dataset.heads !== String(d.n_head)
    ) {
      grid.style.gridTemplateColumns = `auto repeat(${d.n_head}, minmax(26px, 92px))`;
      grid.dataset.heads = d.n_head;
      grid.replaceChildren();
      for (let i = 0; i < d.n_layer; i++) {
        grid.append(h("span", { class: "pc-label", text: `layer ${i}` }));
        for (let j = 0; j < d.n_head; j++) {
          grid.append(
            h(
              "button",
              {
                type: "button",
                class: "pc-thumb",
                title: `layer ${i}, head ${j}`,
                "aria-label": `layer ${i}, head ${j}`,
                "data-lm-suppress-shortcuts": "true",
                onclick: () => commit(model, { head: [i, j] }),
                onkeydown: (event) => {
                  const [di, dj] =
                    { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[
                      event.key
                    ] ?? [];
                  if (di === undefined) return;
                  event.preventDefault();
                  event.stopPropagation();
                  const x = Math.min(Math.max(i + di, 0), d.n_layer - 1),
                    y = Math.min(Math.max(j + dj, 0), d.n_head - 1);
                  grid.children[x * (d.n_head + 1) + 1 + y].focus();
                  commit(model, { head: [x, y] });
                },
              },
              h("canvas", {}),
            ),
          );
        }
      }
    }
    const small = readBytes(model.get("thumbs"), Uint8Array),
      n = d.side;
    grid.querySelectorAll(".pc-thumb").forEach((node, k) => {
      const i = Math.floor(k / d.n_head),
        j = k % d.n_head;
      paintHeat(
        node.firstChild,
        Float32Array.from(small.subarray(k * n * n, (k + 1) * n * n), (w) => w / 255),
        n,
        n,
        model.get("control") ? "--pc-muted" : "--pc-accent",
      );
      node.setAttribute("aria-pressed", String(i === wanted[0] && j === wanted[1]));
    });
    control.box.checked = model.get("control");
    point();
  });
  listen(["data", "thumbs", "pattern", "tokens", "head", "at", "control"], draw);
  onTheme(root, later, draw);
  draw();
  return end;
}

const KINDS = { prompt: showPrompt, heads: showHeads };
export default { render: (context) => KINDS[context.model.get("kind")](context) };
