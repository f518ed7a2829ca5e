// The residual stream: what it would say at each layer, what each part adds, what carries over, how it grew.
import {
  button,
  commit,
  debounce,
  frame,
  h,
  number,
  slider,
  tabs,
  throttle,
  toggle,
} from "../kit.js";
import {
  card,
  complain,
  onTheme,
  paintHeat,
  percent,
  readBytes,
  sayPart,
  shareBars,
  signed,
  soon,
  spell,
  tokenText,
} from "./draw.js";

/** Logit lens: a table, a row a stage, a column a token. */
function showLens({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "lens");
  const control = toggle({
    label: "random numbers in the blocks instead",
    value: model.get("control"),
    input: (on) => commit(model, { control: on }),
  });
  const table = h("table", { class: "pc-grid" });
  const scroll = h(
    "div",
    {
      class: "pc-scroll",
      tabindex: 0,
      "aria-label": "Guesses by layer and token; arrow keys move",
      "data-lm-suppress-shortcuts": "true",
    },
    table,
  );
  const detail = h("div", { class: "pc-detail", "aria-live": "polite" });
  let spot = null;
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-row pc-spread" },
        h("span", {
          class: "pc-muted",
          text: "Each cell: the next token the model would say if it stopped there. The stronger the colour, the surer.",
        }),
        control,
      ),
      scroll,
      detail,
    ),
  );
  function explain() {
    const d = model.get("data");
    if (!d.stages) return;
    const [r, t] = spot ?? [d.stages.length - 1, model.get("at")];
    const cell = d.cells[r]?.[t];
    if (!cell) return;
    detail.replaceChildren(
      h("h4", { class: "pc-title", text: `${d.stages[r]}, after “${spell(d.tokens[t])}”` }),
      h("p", {
        class: "pc-muted pc-tight",
        text: `Unsure by ${number(cell.bits, 1)} bits. The whole model's own favourite has ${percent(cell.target)} here.`,
      }),
    );
    const bars = h("div", {});
    shareBars(
      bars,
      cell.top.map(([label, value]) => ({ label: spell(label), value })),
    );
    detail.append(bars);
  }
  const draw = soon(() => {
    const d = model.get("data");
    if (complain(root, d) || !d.stages) return;
    const head = h(
      "tr",
      {},
      h("th", { class: "pc-corner", text: "after reading" }),
      ...d.tokens.map((token, t) =>
        h("th", {
          class: t === model.get("at") ? "pc-mono pc-here" : "pc-mono",
          text: spell(token),
        }),
      ),
    );
    const rows = d.cells.map((cells, r) =>
      h(
        "tr",
        {},
        h("th", { text: d.stages[r] }),
        ...cells.map((cell, t) =>
          h("td", {
            class: "pc-mono",
            text: spell(cell.top[0][0]),
            dataset: { r, t },
            title: `${percent(cell.top[0][1])}`,
            style: {
              background: `color-mix(in srgb, var(--pc-accent) ${Math.round(62 * Math.sqrt(cell.top[0][1]))}%, transparent)`,
            },
          }),
        ),
      ),
    );
    const next = h(
      "tr",
      { class: "pc-truth" },
      h("th", { text: "what really comes" }),
      ...d.tokens.map((_, t) =>
        h("td", {
          class: "pc-mono",
          text: d.tokens[t + 1] === undefined ? "?" : spell(d.tokens[t + 1]),
        }),
      ),
    );
    table.replaceChildren(h("thead", {}, head), h("tbody", {}, ...rows, next));
    control.box.checked = model.get("control");
    explain();
  });
  const locate = (event) => {
    const cell = event.target.closest("td[data-r]");
    return cell && [Number(cell.dataset.r), Number(cell.dataset.t)];
  };
  table.addEventListener("pointerover", (event) => {
    const at = locate(event);
    if (at) {
      spot = at;
      explain();
    }
  });
  table.addEventListener("pointerleave", () => {
    spot = null;
    explain();
  });
  table.addEventListener("click", (event) => {
    const at = locate(event);
    if (at) commit(model, { at: at[1] });
  });
  scroll.addEventListener("keydown", (event) => {
    const [down, right] =
      { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ??
      [];
    const d = model.get("data");
    if (down === undefined || !d.stages) return;
    event.preventDefault();
    event.stopPropagation();
    const [r, t] = spot ?? [d.stages.length - 1, model.get("at")];
    spot = [
      Math.min(Math.max(r + down, 0), d.stages.length - 1),
      Math.min(Math.max(t + right, 0), d.tokens.length - 1),
    ];
    explain();
    const cell = table.querySelector(`td[data-r="${spot[0]}"][data-t="${spot[1]}"]`);
    table.querySelector(".pc-spot")?.classList.remove("pc-spot");
    cell.classList.add("pc-spot");
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  listen(["data", "at", "control"], draw);
  draw();
  return end;
}

/** Direct logit attribution: a bar for each part. */
function showShares({ model, el }) {
  const { root, listen, end } = frame({ model, el }, "shares");
  const text = tokenText({
    label: "Your text; click the token after which the model guesses",
    pick: (i) => commit(model, { at: i }),
  });
  const choices = h("div", {}),
    bars = h("div", { class: "pc-parts" }),
    sum = h("p", { class: "pc-say", "aria-live": "polite" });
  card(
    { model, root },
    "More: which part speaks for which token",
    text,
    h(
      "div",
      { class: "pc-two pc-wide" },
      h(
        "div",
        {},
        h("h4", { class: "pc-title", text: "Its guesses" }),
        h("p", { class: "pc-muted pc-tight", text: "Click one to see who speaks for it." }),
        choices,
      ),
      h(
        "div",
        {},
        h("h4", { class: "pc-title", text: "Who adds to its logit" }),
        h("p", {
          class: "pc-muted pc-tight",
          text: "Right: speaks for the token. Left: against it.",
        }),
        bars,
        sum,
      ),
    ),
  );
  const draw = soon(() => {
    const d = model.get("data");
    if (complain(root, d) || !d.parts) return;
    text.put(d.tokens);
    text.mark(model.get("at"));
    shareBars(
      choices,
      d.guesses.map(({ label, value }) => ({ label, value })),
      {
        chosen: d.label,
        pick: (label) =>
          commit(model, { token: d.guesses.find((guess) => guess.label === label).id }),
      },
    );
    const most = Math.max(...d.values.map(Math.abs), 1e-9);
    bars.replaceChildren(
      ...d.parts.map((part, i) => {
        const x = d.values[i],
          wide = `${(50 * Math.abs(x)) / most}%`;
        return h(
          "div",
          { class: part.endsWith("head.0") ? "pc-part pc-first" : "pc-part" },
          h("span", { class: "pc-label", text: d.words[i] }),
          h(
            "span",
            { class: "pc-axis" },
            h("span", {
              class: x >= 0 ? "pc-for" : "pc-against",
              style: x >= 0 ? { left: "50%", width: wide } : { right: "50%", width: wide },
            }),
          ),
          h("span", { class: "pc-value pc-share-value", text: signed(x) }),
        );
      }),
    );
    sum.textContent = `Together ${signed(d.logit)}: the logit of “${d.label}”${d.capped === d.logit ? "" : ` before the softcap, which bends it to ${signed(d.capped)}`}.`;
  });
  listen(["data", "at"], draw);
  draw();
  return end;
}

/** Patching: which state, carried from one prompt into the other, brings the answer with it. */
function showPatch({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "patch");
  const send = debounce(() => commit(model, { clean: one.value, corrupt: two.value }), 350);
  const field = (label, value) =>
    h("input", {
      class: "pc-input pc-wide-input",
      type: "text",
      "aria-label": label,
      value,
      oninput: send,
      "data-lm-suppress-shortcuts": "true",
    });
  const one = field("first prompt", model.get("clean")),
    two = field("second prompt", model.get("corrupt"));
  const table = h("table", { class: "pc-grid" }),
    say = h("p", { class: "pc-say", "aria-live": "polite" });
  const tip = h("p", { class: "pc-muted pc-tight" }),
    scroll = h("div", { class: "pc-scroll" }, table);
  card(
    { model, root },
    "More: carry one state from a prompt into another",
    h(
      "label",
      { class: "pc-line-field", "data-keep": true },
      h("span", { class: "pc-label", text: "states are taken from" }),
      one,
    ),
    h(
      "label",
      { class: "pc-line-field", "data-keep": true },
      h("span", { class: "pc-label", text: "and put, one at a time, into" }),
      two,
    ),
    say,
    scroll,
    tip,
  );
  const draw = soon(() => {
    const d = model.get("data");
    if (complain(root, d) || !d.grid) return;
    say.textContent = `The first prompt speaks more for “${spell(d.answers[0])}”, the second for “${spell(d.answers[1])}”. Each cell: how far carrying that one state over moves the second to the first.`;
    const head = h(
      "tr",
      {},
      h("th", { class: "pc-corner", text: "state after" }),
      ...d.tokens.map((pair) =>
        h(
          "th",
          { class: "pc-mono" },
          h("div", { text: spell(pair[0]) }),
          pair[0] !== pair[1] && h("div", { class: "pc-swap", text: spell(pair[1]) }),
        ),
      ),
    );
    table.replaceChildren(
      h("thead", {}, head),
      h(
        "tbody",
        {},
        ...d.grid.map((cells, r) =>
          h(
            "tr",
            {},
            h("th", { text: d.stages[r] }),
            ...cells.map((share) => {
              const ink = Math.round(62 * Math.sqrt(Math.min(1, Math.abs(share))));
              return h("td", {
                class: "pc-cell",
                text: Math.abs(share) < 0.05 ? "" : percent(share),
                style: {
                  background: `color-mix(in srgb, ${share < 0 ? "var(--pc-warn)" : "var(--pc-accent)"} ${ink}%, transparent)`,
                },
              });
            }),
          ),
        ),
      ),
    );
    tip.textContent =
      "0 %: nothing changed. 100 %: the two tokens stand to each other as in the first prompt.";
  });
  listen("data", draw);
  onTheme(root, later, draw);
  draw();
  return end;
}

/** Time machine: one slider moves attention, lens and guesses. */
function showTime({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "time");
  const holder = h("div", { class: "pc-row" });
  const heads = h("div", { class: "pc-tiles" }),
    lens = h("div", {}),
    bars = h("div", {}),
    sums = h("dl", { class: "pc-stats" });
  const heading = h("h4", { class: "pc-title" });
  const text = tokenText({
    label: "Your text; click a token to follow what is expected after it",
    pick: (i) => commit(model, { at: i }),
  });
  const note = h("p", { class: "pc-muted pc-tight" });
  let timer = 0,
    bar = null;
  const send = throttle((value) => commit(model, { moment: value }), 60);
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const play = button("Play", () => {
    if (timer) return stop();
    play.textContent = "Pause";
    if (model.get("moment") >= model.get("steps").length - 1) move(0);
    timer = setInterval(() => {
      const next = Number(bar.bar.value) + 1;
      if (next >= model.get("steps").length) stop();
      else move(next);
    }, 700);
  });
  later(stop);
  const move = (value) => {
    bar.put(value);
    send(value);
  };
  const body = h("div", { class: "pc-stack" });
  card({ model, root }, "More: the time machine", holder, note, body);
  body.append(
    text,
    h(
      "div",
      { class: "pc-three" },
      h(
        "div",
        {},
        h("h4", { class: "pc-title", text: "Attention" }),
        h("p", { class: "pc-muted pc-tight", text: "Every head; rows read columns." }),
        heads,
      ),
      h(
        "div",
        {},
        h("h4", { class: "pc-title", text: "Lens" }),
        h("p", { class: "pc-muted pc-tight", text: "First guess at each stage." }),
        lens,
      ),
      h(
        "div",
        {},
        heading,
        h("p", { class: "pc-muted pc-tight", text: "Guesses of the whole model." }),
        bars,
        sums,
      ),
    ),
  );
  const draw = soon(() => {
    const d = model.get("data"),
      steps = model.get("steps");
    if (complain(root, d) || !steps.length || !d.n_layer) return;
    if (!bar || holder.dataset.steps !== String(steps)) {
      holder.dataset.steps = String(steps);
      bar = slider({
        label: "training step",
        min: 0,
        max: steps.length - 1,
        value: model.get("moment"),
        show: (i) => number(steps[i]),
        input: send,
      });
      holder.replaceChildren(bar, play);
    }
    note.textContent = d.note;
    text.put(d.tokens);
    text.mark(model.get("at"));
    const small = readBytes(model.get("thumbs"), Uint8Array),
      n = d.side;
    if (heads.children.length !== d.n_layer * d.n_head) {
      heads.style.gridTemplateColumns = `repeat(${d.n_head}, 1fr)`;
      heads.replaceChildren(
        ...Array.from({ length: d.n_layer * d.n_head }, (_, k) =>
          h("canvas", {
            role: "img",
            title: `layer ${Math.floor(k / d.n_head)}, head ${k % d.n_head}`,
            "aria-label": `layer ${Math.floor(k / d.n_head)}, head ${k % d.n_head}`,
          }),
        ),
      );
    }
    [...heads.children].forEach((canvas, k) =>
      paintHeat(
        canvas,
        Float32Array.from(small.subarray(k * n * n, (k + 1) * n * n), (w) => w / 255),
        n,
        n,
      ),
    );
    lens.replaceChildren(
      ...d.lens.map(([stage, token, share]) =>
        h(
          "div",
          {
            class: "pc-rung",
            style: {
              background: `color-mix(in srgb, var(--pc-accent) ${Math.round(62 * Math.sqrt(share))}%, transparent)`,
            },
          },
          h("span", { class: "pc-label", text: stage }),
          h("span", { class: "pc-mono", text: spell(token) }),
          h("span", { class: "pc-value", text: percent(share) }),
        ),
      ),
    );
    heading.textContent = `After “${spell(d.tokens[model.get("at")] ?? "")}”`;
    shareBars(bars, d.guesses);
    sums.replaceChildren(
      h(
        "div",
        { class: "pc-stat" },
        h("dd", { text: number(d.loss, 2) }),
        h("dt", { text: "mean loss on your text, nats" }),
      ),
    );
  });
  listen(["data", "thumbs", "steps", "at"], draw);
  onTheme(root, later, draw);
  draw();
  return end;
}

const KINDS = { lens: showLens, shares: showShares, patch: showPatch, time: showTime };
export default { render: (context) => KINDS[context.model.get("kind")](context) };
