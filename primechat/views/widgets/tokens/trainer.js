import { asking, button, commit, frame, h, number, select, slider, whenSeen } from "../kit.js";
import { TINTS, readBytes } from "./chips.js";

const SPEEDS = { slow: 1, fast: 12, full: 4000 };

function render({ model, el }) {
  const ui = frame({ model, el }, "trainer"),
    { root } = ui,
    ask = asking(model, ui.later);
  let state = {
    vocab_size: 256 + model.get("special_count"),
    pairs: [],
    latest: [],
    preview: [],
    n_bytes: 0,
    n_tokens: 0,
  };
  let counts = [],
    running = false,
    speed = "fast",
    mine = 0,
    goal = 512,
    dirty = false;
  const samples = [...model.get("samples"), ["", "my own text"]];
  const source = select({
    label: "Learn from",
    options: samples,
    value: samples[0][0],
    input: () => {
      own.hidden = source.box.value !== "";
      dirty = true;
      if (own.hidden) restart();
      else stop();
    },
  });
  const area = h("textarea", {
    class: "pc-text",
    rows: 4,
    placeholder: "Paste a text: a few thousand characters are enough",
    "aria-label": "Your own text",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => {
      dirty = true;
      draw();
    },
  });
  const own = h("div", { hidden: true }, area);
  const size = slider({
    label: "Vocabulary",
    min: 272,
    max: 4096,
    step: 16,
    value: goal,
    input: (value) => {
      goal = value;
      draw();
    },
    show: (value) => `${number(value)} tokens`,
  });
  const pace = select({
    label: "Pace",
    options: [
      ["slow", "one by one"],
      ["fast", "quick"],
      ["full", "as fast as it can"],
    ],
    value: speed,
    input: (value) => {
      speed = value;
    },
  });
  const go = button("Learn", () => (running ? stop() : run()), { primary: true });
  const one = button("One merge", () => {
      stop();
      step(1);
    }),
    again = button("Start over", () => restart());
  const fault = h("div", { class: "pc-error", role: "alert", hidden: true });
  const facts = h("div", { class: "pc-muted", role: "status" }),
    said = h("div", { class: "pc-note", hidden: true });
  const pairs = h("tbody"),
    latest = h("tbody"),
    preview = h("div", { class: "pc-preview" });
  const curve = svg("svg", {
    viewBox: "0 0 340 230",
    class: "pc-curve",
    role: "img",
    "aria-label": "How often the merged pair stood in the text, merge by merge",
  });
  const table = (title, heads, body) =>
    h(
      "div",
      {},
      h("h3", { class: "pc-title", text: title }),
      h(
        "table",
        { class: /last/.test(title) ? "pc-table pc-latest" : "pc-table" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            heads.map((text) => h("th", { text, class: /often|Id/.test(text) ? "pc-right" : "" })),
          ),
        ),
        body,
      ),
    );
  root.append(
    h(
      "div",
      { class: "pc-stack" },
      h("div", { class: "pc-row" }, source, size, pace),
      own,
      h("div", { class: "pc-row" }, go, one, again, facts),
      fault,
      h(
        "div",
        {},
        h("div", { class: "pc-muted", text: "A sentence, cut with the merges learned so far" }),
        preview,
      ),
      said,
      h(
        "div",
        { class: "pc-three" },
        table("Pairs that stand most often now", ["Pair", "", "How often"], pairs),
        table("Merges found last", ["Id", "Token", "How often"], latest),
        h(
          "div",
          {},
          h("h3", { class: "pc-title", text: "Each merge is rarer than the last" }),
          curve,
        ),
      ),
    ),
  );

  function svg(tag, props, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  }
  function take(answer) {
    state = answer;
    counts.length = answer.first;
    for (const count of answer.counts) counts.push(count);
    draw();
  }
  function draw() {
    const made = counts.length,
      full = state.vocab_size >= goal && !dirty;
    const special = model.get("special_count"),
      merged = state.vocab_size - 256 - special;
    facts.textContent = `${number(state.vocab_size)} of ${number(goal)} tokens: 256 bytes, ${special} marks for chats, ${number(merged)} ${merged === 1 ? "merge" : "merges"} · ${number(state.n_bytes)} bytes of text are ${number(state.n_tokens)} tokens now: ${number(state.n_bytes / Math.max(1, state.n_tokens), 2)} bytes a token`;
    go.textContent = running ? "Pause" : made && !full && !dirty ? "Go on" : "Learn";
    go.disabled = full && !running;
    one.disabled = full;
    again.disabled = !made && !dirty;
    const most = state.pairs[0]?.[2] ?? 1;
    const piece = (bytes, tint) =>
      h("span", {
        class: "pc-swatch",
        style: { background: `var(--tint-${tint})` },
        text: readBytes(bytes),
      });
    pairs.replaceChildren(
      ...state.pairs.map(([a, b, count], i) =>
        h(
          "tr",
          { class: i ? "" : "pc-next" },
          h("td", {}, piece(a, 0), " ", piece(b, 1)),
          h(
            "td",
            { class: "pc-barcell" },
            h(
              "div",
              { class: "pc-bar" },
              h("div", { style: { width: `${(100 * count) / most}%` } }),
            ),
          ),
          h("td", { class: "pc-right", text: number(count) }),
        ),
      ),
    );
    latest.replaceChildren(
      ...[...state.latest]
        .reverse()
        .map(([id, token, count]) =>
          h(
            "tr",
            {},
            h("td", { class: "pc-right pc-muted", text: String(id) }),
            h("td", {}, piece(token, 2)),
            h("td", { class: "pc-right", text: number(count) }),
          ),
        ),
    );
    if (!state.latest.length)
      latest.append(
        h(
          "tr",
          {},
          h("td", {
            colspan: 3,
            class: "pc-muted",
            text: `None yet: the vocabulary is the 256 bytes and ${model.get("special_count")} marks for chats.`,
          }),
        ),
      );
    preview.replaceChildren(
      ...state.preview.map((token, i) =>
        h("span", {
          class: "pc-swatch",
          style: { background: `var(--tint-${i % TINTS})` },
          text: readBytes(token),
        }),
      ),
      h("span", { class: "pc-muted", text: ` ${state.preview.length} tokens` }),
    );
    said.hidden = !state.said || !full;
    said.textContent = state.said;
    drawCurve();
    Object.assign(root.dataset, { vocabSize: state.vocab_size, running, full });
  }
  function drawCurve() {
    const left = 50,
      right = 330,
      top = 30,
      bottom = 196,
      n = Math.max(2, goal - 256 - model.get("special_count"));
    const high = Math.max(10, counts[0] ?? state.pairs[0]?.[2] ?? 10);
    const x = (i) => left + ((right - left) * i) / n,
      y = (count) => bottom - ((bottom - top) * Math.log(Math.max(1, count))) / Math.log(high);
    const nodes = [];
    for (let power = 1; power <= high; power *= 10)
      nodes.push(
        svg("line", { x1: left, x2: right, y1: y(power), y2: y(power), class: "pc-grid" }),
        svg(
          "text",
          { x: left - 6, y: y(power) + 4, class: "pc-tick", "text-anchor": "end" },
          number(power),
        ),
      );
    const stride = Math.max(1, Math.floor(counts.length / 400)),
      points = [];
    for (let i = 0; i < counts.length; i += stride)
      points.push(`${x(i).toFixed(1)},${y(counts[i]).toFixed(1)}`);
    nodes.push(svg("polyline", { points: points.join(" "), class: "pc-line" }));
    if (counts.length)
      nodes.push(
        svg("circle", { cx: x(counts.length - 1), cy: y(counts.at(-1)), r: 3.5, class: "pc-dot" }),
      );
    nodes.push(
      svg("text", { x: left, y: bottom + 18, class: "pc-tick" }, "merge 1"),
      svg("text", { x: right, y: bottom + 18, class: "pc-tick", "text-anchor": "end" }, number(n)),
      svg("text", { x: 0, y: 12, class: "pc-tick" }, "times in the text, log scale"),
    );
    curve.replaceChildren(...nodes);
  }
  async function safely(work) {
    try {
      fault.hidden = true;
      return await work();
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
      running = false;
      draw();
      return null;
    }
  }
  async function step(merges) {
    if (dirty && !(await begin())) return null;
    const answer = await safely(() => ask("advance", { merges, vocab_size: goal }));
    if (answer) {
      if (answer.goal < goal) {
        goal = answer.goal;
        size.put(goal);
      }
      take(answer);
    }
    return answer;
  }
  async function run() {
    const turn = ++mine;
    running = true;
    draw();
    while (running && turn === mine) {
      const answer = await step(SPEEDS[speed]);
      if (!answer || state.vocab_size >= goal) break;
      await new Promise((done) =>
        setTimeout(done, speed === "slow" ? 450 : speed === "fast" ? 40 : 0),
      );
    }
    if (turn === mine) stop();
  }
  function stop() {
    mine++;
    running = false;
    draw();
  }
  async function begin() {
    facts.textContent = "Reading the text and counting its pairs …";
    const answer = await safely(() =>
      ask("begin", { sample: source.box.value, text: area.value, vocab_size: goal }),
    );
    if (answer) {
      dirty = false;
      counts = [];
      take(answer);
    }
    return answer;
  }
  function restart() {
    mine++;
    running = false;
    return begin();
  }
  draw();
  facts.textContent = "Reading the text and counting its pairs …";
  whenSeen(
    root,
    async () => {
      const answer = await safely(() => ask("state"));
      if (!answer || running) return;
      goal = answer.goal;
      size.put(goal);
      take(answer);
      root.dataset.ready = "true";
    },
    ui.later,
  );
  return ui.end;
}

export default { render };
