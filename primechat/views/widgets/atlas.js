import {
  asking,
  button,
  commit,
  debounce,
  frame,
  h,
  number,
  select,
  slider,
  tabs,
  throttle,
  whenGuessed,
} from "./kit.js";
import { makeScatter } from "./scatter.js";

const ROWS = 100; // of the table of what was chosen
const MORPH_HINT = "Shift and drag, or the Lasso button, selects points.";

/** A copy of a trait's bytes as an array of floats. */
function floats(view) {
  if (!view || !view.byteLength) return new Float32Array(0);
  const bytes = view.buffer
    ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength)
    : new Uint8Array(view);
  return new Float32Array(bytes.slice().buffer);
}

/** "#rrggbb" to [r, g, b]. */
function rgb(text) {
  const hex = text.trim().replace("#", "");
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
const blend = (a, b, t) => a.map((v, i) => v + (b[i] - v) * t);

/** Frames within about -1..1, on one scale for all axes and frames, the outermost points left out of account; and how far x and y reach. */
function normalise(all, n, f) {
  const center = [0, 0, 0];
  const half = [0, 0, 0];
  for (let axis = 0; axis < 3; axis++) {
    const step = Math.max(1, Math.floor((n * f) / 20000)),
      values = [];
    for (let i = 0; i < n * f; i += step) values.push(all[3 * i + axis]);
    values.sort((a, b) => a - b);
    const trim = values.length > 400 ? 0.004 : 0;
    const low = values[Math.floor(trim * (values.length - 1))],
      high = values[Math.ceil((1 - trim) * (values.length - 1))];
    center[axis] = (low + high) / 2;
    half[axis] = (high - low) / 2;
  }
  const reach = Math.max(...half) || 1;
  const frames = Array.from({ length: f }, (_, k) => {
    const out = new Float32Array(3 * n);
    for (let j = 0; j < out.length; j++) out[j] = (all[3 * n * k + j] - center[j % 3]) / reach;
    return out;
  });
  return { frames, half: half.slice(0, 2).map((x) => Math.max(0.05, x / reach)) };
}

function render(context) {
  const { model } = context;
  const { root, listen, later, end } = frame(context, "atlas", { partly: true });
  const ask = asking(model, later);
  const state = {
    labels: [],
    channels: [],
    facts: [],
    n: 0,
    frames: [""],
    picked: -1,
    near: null,
    hits: null,
    only: -1,
    chosen: new Set(),
    order: [],
    colour: model.get("colour"),
    deep: model.get("n_axes") === 3,
    palette: null,
    key: "",
  };
  const get = (key) => state.channels.findIndex((channel) => channel.key === key);
  const name = (i) => state.labels[i] ?? "";

  // ---- the pieces of the page

  const spaces = model.get("spaces");
  const note = h("p", { class: "pc-atlas-note pc-muted", role: "status", "aria-live": "polite" });
  const hintBox = h("div", { class: "pc-atlas-hint", "aria-hidden": "true" });
  const tip = h("div", { class: "pc-atlas-tip", hidden: true });
  const legend = h("div", { class: "pc-atlas-legend" });
  const card = h("div", { class: "pc-atlas-side" });
  const table = h("div", { class: "pc-atlas-table" });
  let hintTimer = 0,
    guessed = false;
  const hint = (text) => {
    hintBox.textContent = text;
    hintBox.dataset.on = "true";
    clearTimeout(hintTimer);
    hintTimer = setTimeout(() => {
      hintBox.dataset.on = "false";
    }, 2200);
  };
  const scatter = makeScatter({
    label:
      "Map of points. Arrow keys move, plus and minus zoom, 0 shows all, Enter takes the point in the middle, Escape lets go.",
    hint,
    pick,
    lasso: choose,
    decorate,
    hover(i, at) {
      state.over = i;
      tip.hidden = i < 0;
      if (i < 0) return;
      tip.replaceChildren(
        h("b", { class: "pc-mono", text: name(i) }),
        ...describe(i).map((text) => h("div", { text })),
      );
      const box = scatter.node,
        flip = at[0] > box.clientWidth - 220;
      Object.assign(tip.style, {
        left: flip ? "auto" : `${at[0] + 16}px`,
        right: flip ? `${box.clientWidth - at[0] + 16}px` : "auto",
        top: `${Math.max(4, at[1] - 12)}px`,
      });
    },
  });
  const spaceBox =
    spaces.length > 1
      ? select({
          label: "Show",
          options: spaces,
          value: model.get("space"),
          input: (space) => open({ space }),
        })
      : null;
  const methodTabs = tabs({
    label: "How the picture is made",
    options: [
      ["PCA", "PCA"],
      ["UMAP", "UMAP"],
    ],
    value: model.get("method"),
    input: (method) => (method === "UMAP" ? layOut() : open({ method: "PCA" })),
  });
  const axesTabs = tabs({
    label: "Axes",
    options: [
      ["2", "2-D"],
      ["3", "3-D"],
    ],
    value: String(model.get("n_axes")),
    input: (value) => open({ n_axes: Number(value), method: "PCA" }),
  });
  const colourBox = select({
    label: "Colour",
    options: [],
    value: "",
    input: (key) => {
      state.colour = key;
      state.only = -1;
      commit(model, { colour: key });
      recolour();
    },
  });
  const search = h("input", {
    class: "pc-input",
    type: "search",
    placeholder: "Find a token …",
    "aria-label": "Find a token",
    spellcheck: "false",
    "data-lm-suppress-shortcuts": "true",
    oninput: debounce(() => find(search.value), 90),
    onkeydown: (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && state.hits?.length)
        pick(state.hits[(state.hits.indexOf(state.picked) + 1) % state.hits.length], true);
      if (event.key === "Escape") {
        search.value = "";
        find("");
      }
    },
  });
  const found = h("span", { class: "pc-muted", role: "status" });
  const take = button("Select these", () => choose(state.hits ?? []));
  take.hidden = true;
  const lassoButton = button(
    "Lasso",
    () => {
      const on = lassoButton.getAttribute("aria-pressed") !== "true";
      lassoButton.setAttribute("aria-pressed", String(on));
      scatter.setMode(on ? "lasso" : "pan");
      if (on) hint("Draw around points to select them.");
    },
    { title: "Draw around points to select them (or hold Shift and drag)" },
  );
  lassoButton.setAttribute("aria-pressed", "false");
  const tools = h(
    "div",
    { class: "pc-atlas-tools" },
    lassoButton,
    button("+", () => scatter.zoom(1.4), { title: "Zoom in" }),
    button("−", () => scatter.zoom(1 / 1.4), { title: "Zoom out" }),
    button("Fit", () => scatter.fit(), { title: "Show all" }),
  );
  // on the map, so that nothing below the bar moves when something is found
  const stage = h(
    "div",
    { class: "pc-atlas-stage" },
    scatter.node,
    h("div", { class: "pc-atlas-find" }, found, take),
    tools,
    hintBox,
    tip,
  );
  const play = button("Play", () => (state.playing ? pause() : start()), { primary: true });
  const timeBar = slider({
    label: model.get("frame_word"),
    min: 0,
    max: 1,
    value: 0,
    input: (value) => {
      pause();
      go(value, 450);
    },
    show: (value) => state.frames[value] ?? "",
  });
  const timeRow = h("div", { class: "pc-row pc-atlas-time" }, play, timeBar);
  const work = h("div", { class: "pc-row pc-atlas-work", hidden: true });
  const textBox = model.get("text")
    ? h("textarea", {
        class: "pc-text",
        rows: 2,
        "aria-label": "Text",
        spellcheck: "false",
        "data-lm-suppress-shortcuts": "true",
        oninput: debounce(() => tell(ask("read", { text: textBox.value })), 350),
        onkeydown: (event) => event.stopPropagation(),
      })
    : null;
  if (textBox) textBox.value = model.get("text");
  root.append(
    ...(textBox ? [textBox] : []),
    h(
      "div",
      { class: "pc-row pc-atlas-bar" },
      ...(spaceBox ? [spaceBox] : []),
      methodTabs,
      axesTabs,
      colourBox,
      search,
    ),
    work,
    h("div", { class: "pc-atlas-main" }, h("div", {}, stage, legend), card),
    timeRow,
    note,
    table,
  );

  // ---- from Python

  const wish = () => ({
    space: model.get("space"),
    n_axes: state.deep ? 3 : 2,
    method: model.get("method"),
  });
  /** A promise's failure becomes a sentence on the page. */
  function tell(promise) {
    return promise.then(
      (answer) => {
        root.removeAttribute("data-busy");
        return answer;
      },
      (error) => {
        root.removeAttribute("data-busy");
        fault(error.message);
        read();
      },
    );
  }
  function fault(text) {
    work.hidden = false;
    work.replaceChildren(
      h("span", { class: "pc-error", text }),
      button("Close", () => {
        work.hidden = true;
      }),
    );
  }
  function open(change) {
    root.dataset.busy = "true";
    tell(ask("show", { ...wish(), ...change }));
  }
  function read() {
    const cloud = model.get("cloud"),
      all = floats(model.get("places")),
      facts = floats(model.get("facts"));
    const n = cloud.labels?.length ?? 0,
      f = cloud.frames?.length ?? 0;
    if (!n || all.length !== 3 * n * f || facts.length !== n * cloud.channels.length) return; // in mid-change
    const same =
      state.n === n &&
      state.labels.length &&
      state.labels[0] === cloud.labels[0] &&
      state.labels[n - 1] === cloud.labels[n - 1];
    const turned = state.deep !== (cloud.n_axes === 3);
    Object.assign(state, {
      labels: cloud.labels,
      channels: cloud.channels,
      n,
      frames: cloud.frames,
      cloud,
      deep: cloud.n_axes === 3,
    });
    state.facts = cloud.channels.map((_, k) => facts.subarray(n * k, n * (k + 1)));
    const counts = get("frequency") >= 0 ? state.facts[get("frequency")] : null;
    state.order = Array.from({ length: n }, (_, i) => i);
    if (counts) state.order.sort((a, b) => counts[b] - counts[a]);
    if (state.order.length > 6000) state.order.length = 6000;
    if (!same) {
      state.picked = -1;
      state.chosen = new Set();
      state.hits = null;
    }
    if (turned) scatter.setDeep(state.deep);
    const scaled = normalise(all, n, f),
      layout = [model.get("space"), cloud.method, cloud.n_axes].join();
    scatter.setPoints(scaled.frames, { smooth: Boolean(same), half: scaled.half });
    if (layout !== state.layout) scatter.fit();
    state.layout = layout;
    timeRow.hidden = f < 2;
    timeBar.bar.max = String(f - 1);
    if (!same || scatter.time() > f - 1) {
      scatter.goTo(model.get("frame"), 0);
      timeBar.put(model.get("frame"));
    }
    timeBar.put(Math.round(scatter.time()));
    methodTabs.put(cloud.method);
    axesTabs.put(String(cloud.n_axes));
    methodTabs.hidden = f > 1;
    if (spaceBox) spaceBox.box.value = model.get("space");
    if (get(state.colour) < 0) state.colour = cloud.channels[0].key;
    colourBox.fill(
      cloud.channels.map((channel) => [channel.key, channel.title]),
      state.colour,
    );
    recolour();
    say();
    if (!same || state.picked < 0) pick(Math.min(n - 1, model.get("picked")), false, true);
    else requestNear();
    if (search.value) find(search.value);
    rank();
    showTable();
  }
  function say() {
    const { cloud } = state,
      parts = [];
    const now = Math.min(cloud.frames.length - 1, Math.round(scatter.time()));
    if (cloud.shown?.length) {
      parts.push(
        `This picture shows ${number(100 * cloud.shown[now], 1)} % of the differences between the vectors.`,
      );
    } else if (cloud.method === "UMAP")
      parts.push(
        "UMAP keeps neighbours together; its axes, and distances across the map, mean nothing.",
      );
    if (cloud.kept.length && !guessed)
      parts.push("How many neighbours it keeps stands here after your guess.");
    else if (cloud.kept.length) {
      parts.push(
        `Of ten true neighbours of a token, ${number(10 * cloud.kept[now], 1)} are neighbours here too (by chance: ${number(10 * cloud.chance, cloud.chance < 0.001 ? 4 : 2)}).`,
      );
    }
    if (cloud.note) parts.unshift(cloud.note);
    note.textContent = parts.join(" ");
  }

  // ---- colours

  function palette() {
    const css = getComputedStyle(root),
      colour = (key) => css.getPropertyValue(`--pc-${key}`).trim();
    const [bg, accent, ink] = ["bg", "accent", "ink"].map((key) => rgb(colour(key)));
    return {
      series: Array.from({ length: 6 }, (_, i) => colour(`series-${i}`)),
      ink: colour("ink"),
      muted: colour("muted"),
      accent: colour("accent"),
      paper: colour("bg"),
      faint: colour("muted"),
      other: colour("series-1"),
      font: colour("font"),
      mono: colour("mono"),
      ramp: [blend(bg, accent, 0.28), accent, blend(accent, ink, 0.75)],
    };
  }
  const ramp = (t) =>
    t < 0.5
      ? blend(state.palette.ramp[0], state.palette.ramp[1], 2 * t)
      : blend(state.palette.ramp[1], state.palette.ramp[2], 2 * t - 1);
  /** How a channel's numbers become 0..1, with the values at the ends. */
  function scale(k) {
    const values = state.facts[k],
      channel = state.channels[k];
    const sorted = Float32Array.from(values).sort(),
      at = (q) => sorted[Math.round(q * (sorted.length - 1))];
    if (channel.whole && at(1) > 500) {
      const top = Math.log10(1 + at(1));
      return {
        low: at(0),
        high: at(1),
        to: (v) => Math.log10(1 + v) / top,
        how: "on a logarithmic scale",
      };
    }
    const [low, high] = channel.whole ? [at(0), at(1)] : [at(0.01), at(0.99)];
    return {
      low,
      high,
      to: (v) => Math.max(0, Math.min(1, (v - low) / (high - low || 1))),
      how: "",
    };
  }
  const show = (channel, value) =>
    channel.names.length ? channel.names[value] : channel.whole ? number(value) : number(value, 2);
  function describe(i) {
    return state.channels.map(
      (channel, k) => `${channel.title}: ${show(channel, state.facts[k][i])}`,
    );
  }
  function recolour() {
    if (!getComputedStyle(root).getPropertyValue("--pc-accent")) {
      // JupyterLab draws before the page has the widget
      clearTimeout(state.wait);
      state.wait = setTimeout(() => {
        if (!state.gone) recolour();
      }, 60);
      return;
    }
    state.palette = palette();
    const k = get(state.colour),
      channel = state.channels[k],
      values = state.facts[k],
      rgba = new Uint8Array(4 * state.n);
    if (!channel) return;
    if (channel.names.length) {
      const colours = state.palette.series.map(rgb);
      for (let i = 0; i < state.n; i++) {
        rgba.set(colours[values[i] % colours.length], 4 * i);
        rgba[4 * i + 3] = 215;
      }
      legend.replaceChildren(
        ...channel.names.map((text, j) =>
          h(
            "button",
            {
              type: "button",
              class: "pc-atlas-chip",
              "aria-pressed": String(state.only === j),
              title: "Show these alone",
              onclick: () => {
                state.only = state.only === j ? -1 : j;
                recolour();
              },
            },
            h("i", { style: { background: state.palette.series[j % 6] } }),
            h("span", { text }),
          ),
        ),
      );
    } else {
      const { low, high, to, how } = scale(k);
      const steps = Array.from({ length: 256 }, (_, j) => ramp(j / 255));
      for (let i = 0; i < state.n; i++) {
        rgba.set(steps[Math.round(255 * to(values[i]))], 4 * i);
        rgba[4 * i + 3] = 230;
      }
      const stops = [0, 0.25, 0.5, 0.75, 1]
        .map((t) => `rgb(${ramp(t).map(Math.round).join(" ")})`)
        .join(", ");
      legend.replaceChildren(
        h("span", { text: `${channel.title}:` }),
        h("span", { class: "pc-value", text: show(channel, low) }),
        h("i", {
          class: "pc-atlas-ramp",
          style: { background: `linear-gradient(90deg, ${stops})` },
        }),
        h("span", { class: "pc-value", text: show(channel, high) }),
        ...(how ? [h("span", { text: how })] : []),
      );
    }
    scatter.setColours(rgba);
    rank();
  }
  function rank() {
    const ranks = new Uint8Array(state.n).fill(1),
      k = get(state.colour);
    const hits = state.hits ? new Set(state.hits) : null;
    for (let i = 0; i < state.n; i++) {
      const out =
        (hits && !hits.has(i)) ||
        (state.only >= 0 && state.facts[k][i] !== state.only) ||
        (state.chosen.size && !state.chosen.has(i));
      if (out) ranks[i] = 0;
    }
    for (const i of state.near ? [...state.near.true, ...state.near.drawn] : [])
      ranks[i] = Math.max(ranks[i], 1);
    if (state.picked >= 0) ranks[state.picked] = 2;
    scatter.setRanks(ranks);
  }
  function decorate() {
    const look = state.palette ?? { ink: "transparent" },
      rings = [],
      lines = [],
      labels = [];
    const add = (i, more) => {
      if (i >= 0 && i < state.n) labels.push({ i, ...more });
    };
    if (state.picked >= 0) {
      rings.push({ i: state.picked, colour: look.accent, radius: 9, thick: 2.5 });
      add(state.picked, { bold: true, force: true, colour: look.accent });
    }
    if (state.over >= 0 && state.over !== state.picked && state.over < state.n) {
      rings.push({ i: state.over, colour: look.ink, radius: 7, thick: 1.5 });
      add(state.over, { bold: true, force: true });
    }
    if (state.near && state.picked >= 0) {
      for (const i of state.near.true) {
        lines.push({ a: state.picked, b: i, colour: look.accent });
        add(i, { colour: look.accent });
      }
      for (const i of state.near.drawn) {
        rings.push({ i, colour: look.other, radius: 6.5, thick: 1.6 });
        add(i, { colour: look.ink });
      }
    }
    for (const i of (state.hits ?? []).slice(0, 40)) add(i, {});
    return {
      rings,
      lines,
      labels,
      landmarks: state.order,
      text: name,
      ink: look.ink,
      faint: look.faint,
      paper: look.paper,
      accent: look.accent,
      font: look.font,
    };
  }

  // ---- one point and its neighbours

  function pick(i, closer = false, still = false) {
    if (i === undefined || i >= state.n) i = -1;
    if (i !== state.picked) state.near = null;
    state.picked = i;
    if (i >= 0) {
      if (!still) scatter.reveal(i, closer);
      requestNear();
    } else commit(model, { picked: -1 });
    rank();
    showCard();
  }
  const requestNear = throttle(() => {
    const i = state.picked,
      frame_now = Math.round(scatter.time());
    if (i < 0) return;
    const given = model.get("nearby"),
      key = [i, frame_now, model.get("space"), state.cloud.method, state.cloud.n_axes].join();
    if (given?.key === key) return arrive(i, given);
    ask("near", { point: i, frame: frame_now, key }).then(
      (answer) => arrive(i, answer),
      (error) => showCard(error.message),
    );
  }, 120);
  function arrive(i, near) {
    if (state.picked !== i) return;
    state.near = near;
    rank();
    showCard();
  }
  function showCard(fault) {
    const i = state.picked;
    if (i < 0) {
      card.replaceChildren(
        h("p", { class: "pc-title", text: "Pick a point" }),
        h("p", {
          class: "pc-muted",
          text: "Click one, or find it by name. Its nearest neighbours appear here twice: as they truly are, and as the picture draws them.",
        }),
      );
      return;
    }
    const parts = [
      h("p", { class: "pc-atlas-name pc-mono", text: name(i) }),
      h("div", { class: "pc-muted" }, ...describe(i).map((text) => h("div", { text }))),
    ];
    if (fault) parts.push(h("p", { class: "pc-error", text: fault }));
    if (state.near) {
      const drawn = new Set(state.near.drawn),
        real = new Set(state.near.true),
        both = state.near.true.filter((j) => drawn.has(j)).length;
      const total = state.near.true.length,
        row = (j, shared, value) =>
          h(
            "button",
            {
              type: "button",
              class: "pc-atlas-near",
              dataset: { shared: String(shared) },
              title: shared ? "In both lists" : "In this list only",
              onclick: () => pick(j),
            },
            h("span", { class: "pc-mono", text: name(j) }),
            ...(value === undefined
              ? []
              : [h("span", { class: "pc-value", text: number(value, 2) })]),
          );
      parts.push(
        guessed
          ? h(
              "p",
              { class: "pc-atlas-both" },
              h("b", { text: `${both} of ${total} agree` }),
              h("span", {
                class: "pc-muted",
                text: ` (${number((100 * both) / total)} %; by chance ${number(100 * state.near.chance, state.near.chance < 0.002 ? 3 : 1)} %)`,
              }),
            )
          : h("p", {
              class: "pc-atlas-both pc-muted",
              text: "How many agree stands here after your guess.",
            }),
        h(
          "div",
          { class: "pc-atlas-lists" },
          h(
            "div",
            { class: "pc-atlas-true" },
            h("div", { class: "pc-label", text: "truly nearest (cosine)" }),
            ...state.near.true.map((j, n) => row(j, drawn.has(j), state.near.cosines[n])),
          ),
          h(
            "div",
            { class: "pc-atlas-drawn" },
            h("div", { class: "pc-label", text: "nearest on the picture" }),
            ...state.near.drawn.map((j) => row(j, real.has(j))),
          ),
        ),
      );
    }
    card.replaceChildren(...parts);
  }

  // ---- search, lasso, table

  function find(text) {
    const query = text.replace(/ /g, "·").toLowerCase();
    state.hits = query ? [] : null;
    if (query)
      for (let i = 0; i < state.n; i++)
        if (name(i).toLowerCase().includes(query)) state.hits.push(i);
    const counts = get("frequency") >= 0 ? state.facts[get("frequency")] : null,
      bare = (i) => name(i).replace(/·/g, "").length;
    if (state.hits)
      state.hits.sort((a, b) => bare(a) - bare(b) || (counts ? counts[b] - counts[a] : 0) || a - b);
    found.textContent = state.hits ? `${number(state.hits.length)} found` : "";
    take.hidden = !state.hits?.length;
    rank();
    scatter.invalidate(false);
  }
  function choose(ids) {
    state.chosen = new Set(ids);
    commit(model, { chosen: [...ids] });
    rank();
    showTable();
    lassoButton.setAttribute("aria-pressed", "false"); // so that the next drag moves the map again
    scatter.setMode("pan");
    if (ids.length) hint(`${number(ids.length)} selected`);
  }
  function showTable() {
    const ids = [...state.chosen];
    if (!ids.length) return table.replaceChildren(h("p", { class: "pc-muted", text: MORPH_HINT }));
    const head = ["token", "id", ...state.channels.map((channel) => channel.title)];
    table.replaceChildren(
      h(
        "div",
        { class: "pc-row" },
        h("p", { class: "pc-title", text: `${number(ids.length)} selected` }),
        button("Let go", () => choose([])),
        h("span", {
          class: "pc-muted",
          text:
            ids.length > ROWS
              ? `the first ${ROWS} are shown; Python has all of them`
              : "Python has the same rows",
        }),
      ),
      h(
        "div",
        { class: "pc-atlas-rows", tabindex: 0, role: "region", "aria-label": "Selected points" },
        h(
          "table",
          { class: "pc-table" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ...head.map((text, n) =>
                h("th", {
                  text,
                  class: n && !state.channels[n - 2]?.names.length ? "pc-right" : "",
                }),
              ),
            ),
          ),
          h(
            "tbody",
            {},
            ...ids
              .slice(0, ROWS)
              .map((i) =>
                h(
                  "tr",
                  {},
                  h(
                    "td",
                    {},
                    h("button", {
                      type: "button",
                      class: "pc-atlas-link pc-mono",
                      text: name(i),
                      onclick: () => pick(i),
                    }),
                  ),
                  h("td", { class: "pc-right", text: String(i) }),
                  ...state.channels.map((channel, k) =>
                    h("td", {
                      class: channel.names.length ? "" : "pc-right",
                      text: show(channel, state.facts[k][i]),
                    }),
                  ),
                ),
              ),
          ),
        ),
      ),
    );
  }

  // ---- time

  function go(value, ms, done) {
    scatter.goTo(value, ms, () => {
      commit(model, { frame: value });
      requestNear();
      say();
      done?.();
    });
  }
  function pause() {
    state.playing = false;
    play.textContent = "Play";
  }
  function start() {
    state.playing = true;
    play.textContent = "Pause";
    const last = state.frames.length - 1;
    const next = () => {
      if (!state.playing || state.gone) return;
      const now = Math.round(scatter.time());
      if (now >= last) return pause();
      timeBar.put(now + 1);
      go(now + 1, 900, () => setTimeout(next, 250));
    };
    if (Math.round(scatter.time()) >= last) {
      timeBar.put(0);
      go(0, 600, () => setTimeout(next, 300));
    } else next();
  }

  // ---- UMAP, in the background

  async function layOut() {
    methodTabs.put(state.cloud.method);
    if (state.cloud.method === "UMAP") return;
    const answer = await tell(ask("lay_out", { action: "start", n_axes: state.deep ? 3 : 2 }));
    if (answer?.running) follow(answer);
  }
  function follow(answer) {
    work.hidden = false;
    const text = h("span", { role: "status" }),
      bar = h("div"),
      stop = button("Stop", async () => {
        stop.disabled = true;
        clearTimeout(state.poll);
        await tell(ask("lay_out", { action: "stop" }));
        work.hidden = true;
      });
    work.replaceChildren(text, h("div", { class: "pc-bar" }, bar), stop);
    const put = ({ elapsed_s, expected_s }) => {
      text.textContent =
        elapsed_s < expected_s
          ? `UMAP is at work in the background: ${number(elapsed_s)} s of about ${number(expected_s)} s. Go on meanwhile.`
          : `UMAP is at work in the background: ${number(elapsed_s)} s, longer than expected. Go on meanwhile.`;
      bar.style.width = `${Math.min(98, (100 * elapsed_s) / expected_s)}%`;
    };
    put(answer);
    const look = async () => {
      const next = await tell(ask("lay_out", { action: "poll" }));
      if (state.gone || !next) return;
      if (next.running) {
        put(next);
        state.poll = setTimeout(look, 700);
      } else work.hidden = true;
    };
    state.poll = setTimeout(look, 700);
  }

  // ---- life

  let queued = false;
  const soon = () => {
    if (queued) return;
    queued = true;
    queueMicrotask(() => {
      queued = false;
      if (!state.gone) read();
    });
  };
  listen(["cloud", "places", "facts"], soon);
  let asked = false;
  const complete = () => {
    // once the first picture is there; what Python is at comes first
    if (asked || !model.get("waits")) return;
    asked = true;
    requestAnimationFrame(() =>
      ask("complete", {}, 300000).then(
        () => {
          asked = false;
          complete();
        },
        (error) => fault(error.message),
      ),
    );
  };
  listen("waits", complete);
  listen("spaces", () => spaceBox?.fill(model.get("spaces"), model.get("space")));
  listen("nearby", () => {
    // Python picked a point, for example for another model
    const i = model.get("picked");
    if (i < 0 || i >= state.n) return;
    if (i !== state.picked) pick(i, false, true);
    else arrive(i, model.get("nearby"));
  });
  const complain = () => {
    if (model.get("problem")) fault(model.get("problem"));
  };
  listen("problem", complain);
  complain();
  listen("notice", () => {
    clearTimeout(state.poll);
    work.hidden = !model.get("notice");
    work.replaceChildren(h("span", { role: "status", text: model.get("notice") }));
    if (work.hidden) complain();
  });
  const themes = new MutationObserver(() => {
    recolour();
    scatter.invalidate(false);
  });
  themes.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  later(() => {
    state.gone = true;
    clearTimeout(state.poll);
    clearTimeout(state.wait);
    themes.disconnect();
    scatter.end();
  });
  root.scatter = scatter; // for tests that measure
  state.picked = -1;
  read();
  whenGuessed(
    model.get("gate"),
    () => {
      if (!guessed) {
        guessed = true;
        say();
        showCard();
      }
    },
    later,
  );
  showCard();
  state.chosen = new Set(model.get("chosen"));
  rank();
  showTable();
  complete();
  if (model.get("laying_out"))
    tell(ask("lay_out", { action: "poll" })).then((answer) => {
      if (answer?.running) follow(answer);
    });
  return end;
}

export default { render };
