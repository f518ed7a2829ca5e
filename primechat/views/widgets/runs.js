import { frame, h, asking, commit, number, button, more, phrase, tabs } from "./kit.js";

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const counted = (n) => `${number(n)} step${n === 1 ? "" : "s"}`;

/** Round numbers within a range, three to six of them, none closer than `least`. */
function ticks(low, high, least = 0, wish = 4) {
  const rough = Math.max((high - low) / wish, least) || 1,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step)
    found.push(value);
  return found;
}

/** Loss over steps: training faint, new text in the accent colour, each named at its end. */
function curves(later) {
  const svg = shape("svg", { class: "pc-curves", role: "img" }),
    tip = h("div", { class: "pc-tip", hidden: true });
  const node = h("div", { class: "pc-chart" }, svg, tip);
  let view = {},
    width = 640;
  const draw = () => {
    const train = view.train ?? [],
      val = view.val ?? [];
    node.hidden = train.length + val.length === 0;
    if (node.hidden) return;
    const height = 230,
      left = 44,
      right = 104,
      top = 26,
      bottom = 30;
    const xs = [...train, ...val].map((point) => point[0]),
      ys = [...train, ...val].map((point) => point[1]);
    const xEnd = Math.max(view.steps || 0, ...xs, 1),
      middle = (Math.min(...ys) + Math.max(...ys)) / 2;
    const half = Math.max(0.53 * (Math.max(...ys) - Math.min(...ys)), ys.length > 1 ? 0.02 : 0.5),
      y0 = middle - half,
      y1 = middle + half;
    const x = (step) => left + (step / xEnd) * (width - left - right);
    const y = (loss) => top + ((y1 - loss) / (y1 - y0)) * (height - top - bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    svg.setAttribute(
      "aria-label",
      `Loss over ${counted(xEnd)}, now ${number(ys.at(-1), 3)} nats per token`,
    );
    const parts = [];
    const levels = ticks(y0, y1, 0.01),
      digits = Math.max(0, Math.ceil(-Math.log10(levels[1] - levels[0] || 1) - 1e-9));
    for (const value of levels) {
      parts.push(
        shape("line", {
          x1: left,
          x2: width - right,
          y1: y(value),
          y2: y(value),
          class: "pc-grid",
        }),
      );
      parts.push(
        shape(
          "text",
          { x: left - 8, y: y(value) + 4, "text-anchor": "end" },
          number(value, digits),
        ),
      );
    }
    for (const value of ticks(0, xEnd, 1)) {
      parts.push(
        shape(
          "text",
          { x: x(value), y: height - bottom + 18, "text-anchor": "middle" },
          number(value),
        ),
      );
    }
    parts.push(shape("text", { x: width, y: height - bottom + 18, "text-anchor": "end" }, "steps"));
    parts.push(shape("text", { x: 0, y: 12 }, "loss, nats per token"));
    const path = (points) =>
      points
        .map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`)
        .join("");
    if (train.length) parts.push(shape("path", { d: path(train), class: "pc-train" }));
    if (val.length)
      parts.push(
        shape("path", { d: path(val), class: "pc-val" }),
        ...val.map(([step, loss]) =>
          shape("circle", { cx: x(step), cy: y(loss), r: 3, class: "pc-dot" }),
        ),
      );
    const ends = [
      [train.at(-1), "training text", "pc-train-name"],
      [val.at(-1), "new text", "pc-val-name"],
    ]
      .filter(([point]) => point)
      .map(([point, text, name]) => ({
        at: [
          Math.max(...[train, val].filter((all) => all.length).map((all) => x(all.at(-1)[0]))) + 10,
          y(point[1]) + 4,
        ],
        text,
        name,
      }));
    if (ends.length === 2 && Math.abs(ends[0].at[1] - ends[1].at[1]) < 16) {
      const upper = ends[0].at[1] <= ends[1].at[1] ? 0 : 1,
        between = (ends[0].at[1] + ends[1].at[1]) / 2;
      ends[upper].at[1] = between - 8;
      ends[1 - upper].at[1] = between + 8;
    }
    for (const end of ends)
      parts.push(shape("text", { x: end.at[0], y: end.at[1], class: end.name }, end.text));
    svg.replaceChildren(...parts);
    svg.onpointermove = (event) => {
      const step =
        ((event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right)) * xEnd;
      const near = (points) =>
        points.reduce(
          (best, point) =>
            !best || Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best,
          null,
        );
      const one = near(train),
        other = near(val),
        at = (one ?? other)?.[0];
      if (at === undefined || step < 0 || step > xEnd) {
        tip.hidden = true;
        return;
      }
      tip.hidden = false;
      tip.textContent = [
        `step ${number(at)}`,
        one && `training ${number(one[1], 3)}`,
        other &&
          `new text ${number(other[1], 3)} (${number(other[2], 3)} bits per byte) at step ${number(other[0])}`,
      ]
        .filter(Boolean)
        .join(" · ");
    };
    svg.onpointerleave = () => {
      tip.hidden = true;
    };
  };
  const watch = new ResizeObserver(([entry]) => {
    width = Math.max(320, Math.round(entry.contentRect.width));
    draw();
  });
  watch.observe(node);
  later(() => watch.disconnect());
  return Object.assign(node, {
    put: (next) => {
      view = next;
      draw();
    },
  });
}

/** Small curves in a row, each with its name and its newest value. */
function gauges() {
  const node = h("div", { class: "pc-gauges" }),
    width = 220,
    height = 44;
  const one = ([name, points]) => {
    const ys = points.map((point) => point[1]),
      top = Math.max(...ys, 1e-9),
      end = Math.max(...points.map((point) => point[0]), 1);
    const spot = ([step, value]) =>
      `${((step / end) * (width - 4) + 2).toFixed(1)} ${(height - 3 - (value / top) * (height - 6)).toFixed(1)}`;
    const value = ys.at(-1);
    return h(
      "div",
      null,
      h("span", { class: "pc-label", text: name }),
      h("span", { class: "pc-gauge", text: number(value, value >= 100 ? 0 : 2) }),
      shape(
        "svg",
        {
          viewBox: `0 0 ${width} ${height}`,
          preserveAspectRatio: "none",
          role: "img",
          "aria-label": `${name}: now ${number(value, 2)}, at most ${number(top, 2)}`,
        },
        shape("line", { x1: 0, x2: width, y1: height - 1, y2: height - 1, class: "pc-grid" }),
        shape("path", {
          d: points.map((point, i) => `${i ? "L" : "M"}${spot(point)}`).join(""),
          "vector-effect": "non-scaling-stroke",
        }),
      ),
    );
  };
  return Object.assign(node, {
    put: (list) => {
      const shown = (list ?? []).filter(
        ([, points]) => points.length > 1 && points.some(([, value]) => value),
      );
      node.hidden = !shown.length;
      node.replaceChildren(...shown.map(one));
    },
  });
}

/** What a model writes after the same words as it learns: one frame a sampling, the newest in view. */
function filmstrip() {
  const frames = h("div", {
    class: "pc-frames",
    tabindex: 0,
    role: "group",
    "aria-label": "Samples in the order of training",
    "data-lm-suppress-shortcuts": "true",
  });
  const head = h("div", { class: "pc-row" }),
    node = h("div", { class: "pc-film" }, head, frames);
  let samples = [],
    prompt = "",
    prompts = "",
    shown = "";
  const draw = () => {
    const mine = samples.filter((one) => one[1] === prompt),
      key = JSON.stringify(mine);
    if (key === shown) return;
    const follows = frames.scrollLeft + frames.clientWidth > frames.scrollWidth - 30;
    shown = key;
    frames.replaceChildren(
      ...mine.map(([step, , text]) =>
        h(
          "div",
          { class: "pc-frame" },
          h("span", {
            class: "pc-label",
            text: step ? `after ${counted(step)}` : "before the first step",
          }),
          h("p", { text: text.trim() || "(nothing)" }),
        ),
      ),
    );
    if (follows) frames.scrollLeft = frames.scrollWidth;
  };
  const name = (text) => text.trim().split("\n")[0].slice(0, 40);
  return Object.assign(node, {
    put: (next) => {
      samples = next ?? [];
      node.hidden = !samples.length;
      const all = [...new Set(samples.map((one) => one[1]))];
      if (!all.includes(prompt)) prompt = all[0] ?? "";
      if (prompts !== JSON.stringify(all)) {
        prompts = JSON.stringify(all);
        const pick = (text) => {
          prompt = text;
          draw();
          frames.scrollLeft = frames.scrollWidth;
        };
        head.replaceChildren(
          h("span", {
            class: "pc-label",
            text:
              all.length > 1 ? "How it goes on after" : `How it goes on after "${name(prompt)}"`,
          }),
          ...(all.length > 1
            ? [
                tabs({
                  label: "Beginning of the text",
                  options: all.map((text) => [text, name(text) || "(nothing)"]),
                  value: prompt,
                  input: pick,
                }),
              ]
            : []),
        );
      }
      draw();
    },
  });
}

function stats(figures) {
  return figures.map(([value, name]) =>
    h("div", { class: "pc-stat" }, h("span", { text: value }), h("span", { text: name })),
  );
}

function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  return whole < 3600
    ? `${Math.floor(whole / 60)} min ${whole % 60} s`
    : `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const PRESS_MS = 60000; // for which a press waits for the cell that runs again
const WORDS = {
  ready: "Ready",
  running: "Running",
  stopping: "Stopping",
  stopped: "Stopped",
  done: "Done",
  failed: "It ended early",
  refused: "Not ready",
};

function drawStage({ model, root, listen, later }) {
  const ask = asking(model, later),
    chart = curves(later);
  const badge = h("span", { class: "pc-badge" }),
    actions = h("div", { class: "pc-row" }),
    left = h("span", { class: "pc-muted" });
  const phase = h("div", { class: "pc-row" }),
    fill = h("div"),
    bar = h("div", { class: "pc-bar", role: "progressbar" }, fill);
  const figures = h("div", { class: "pc-stats" }),
    film = filmstrip(),
    small = gauges(),
    message = h("div", { "aria-live": "polite" });
  const notes = h("div"),
    moreNotes = more("What was chosen and measured", notes);
  const silent = h("div", { class: "pc-error", hidden: true });
  let heard = performance.now();
  const isOn = () => ["running", "stopping"].includes(model.get("state"));
  // A press is kept until Python has answered: marimo drops those on a widget whose cell runs again meanwhile.
  const presses = (window.primechatPresses ??= new Map()),
    place = model.get("place");
  let ended = false;
  later(() => {
    ended = true;
  });
  const act = async (word, source) => {
    const press = { word, time: Date.now() };
    source.disabled = true;
    presses.set(place, press);
    try {
      await Promise.all([...(window.primechatForms ?? [])].map((settle) => settle()));
      if (ended) return;
      await ask("act", { word });
    } catch (error) {
      source.disabled = false;
      message.replaceChildren(h("div", { class: "pc-error", text: error.message }));
    }
    if (presses.get(place) === press) presses.delete(place);
  };
  const takeUp = () => {
    const kept = presses.get(place);
    presses.delete(place);
    if (!kept || Date.now() - kept.time > PRESS_MS) return;
    const offered = model.get("actions").map(([word]) => word);
    // What was to begin anew begins also where the new control has nothing to begin anew yet.
    const begins = ["start", "afresh", "again"].includes(kept.word) && offered.includes("start");
    const at = offered.indexOf(begins ? "start" : kept.word);
    if (at >= 0) act(offered[at], actions.querySelectorAll("button")[at]);
    else
      message.append(
        h("div", {
          class: "pc-note",
          text: "Its cell ran again when you pressed the button, and what can be done has changed: press again.",
        }),
      );
  };
  const drawState = () => {
    const state = model.get("state");
    root.dataset.state = state;
    badge.textContent = WORDS[state] ?? state;
    actions.replaceChildren(
      left,
      badge,
      ...model.get("actions").map(([word, text], i) => {
        const node = button(text, () => act(word, node), { primary: i === 0 && word !== "stop" });
        return node;
      }),
    );
    const text = model.get("message");
    message.replaceChildren(
      ...(text
        ? [
            h("div", {
              class: ["failed", "refused"].includes(state) ? "pc-error" : "pc-note",
              text,
            }),
          ]
        : []),
    );
    // marimo re-runs the cells that use the result once the page itself has changed something.
    if (model.get("seen") !== state) commit(model, { seen: state });
    drawView();
  };
  const drawView = () => {
    const view = model.get("view"),
      on = isOn(),
      share = view.total ? Math.min(1, view.done / view.total) : 0;
    const amount =
      view.unit === "s"
        ? ""
        : view.unit === "bytes"
          ? `${number(view.done / 1e6, 1)} of ${number(view.total / 1e6, 1)} MB`
          : view.total
            ? `${number(view.done)} of ${number(view.total)} ${view.unit}`
            : view.done
              ? `${number(view.done)} ${view.unit}`
              : "";
    const [what, why] = (view.phase || "getting ready").split(/: (.*)/s);
    phase.replaceChildren(
      ...(on
        ? [
            h("strong", { text: what[0].toUpperCase() + what.slice(1) }),
            h("span", { class: "pc-muted", text: [why, amount].filter(Boolean).join(" · ") }),
          ]
        : []),
    );
    left.textContent =
      on && view.left_s !== null && view.left_s !== undefined
        ? `${view.unit === "s" ? "this takes " : ""}about ${clock(view.left_s)}${view.unit === "s" ? " more" : " left"}`
        : "";
    bar.hidden = !on;
    bar.setAttribute("aria-valuenow", Math.round(share * 100));
    bar.classList.toggle("pc-unsure", on && !view.total);
    fill.style.width = `${share * 100}%`;
    figures.replaceChildren(...stats(view.figures ?? []));
    figures.hidden = !view.figures?.length;
    film.put(view.samples);
    small.put(view.gauges);
    notes.replaceChildren(...(view.notes ?? []).map((text) => h("p", { class: "pc-muted", text })));
    moreNotes.hidden = !view.notes?.length;
    chart.put(view);
  };
  const pulse = setInterval(() => {
    const quiet = (performance.now() - heard) / 1000;
    silent.hidden = !(isOn() && quiet > 12);
    silent.textContent = `No news for ${clock(quiet)}: Python is busy, asleep or gone. If the kernel was restarted, run this cell again; what was saved is kept.`;
  }, 2000);
  later(() => clearInterval(pulse));
  listen(["view", "beat"], () => {
    heard = performance.now();
    silent.hidden = true;
  });
  listen(["state", "actions", "message"], drawState);
  listen("view", drawView);
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-row pc-between" },
        h("p", { class: "pc-title", text: model.get("title") }),
        actions,
      ),
      message,
      silent,
      h("div", { class: "pc-phase" }, phase, bar),
      figures,
      chart,
      small,
      film,
      moreNotes,
    ),
  );
  drawState();
  takeUp();
}

function drawSummary({ model, root, later }) {
  const view = model.get("view"),
    chart = curves(later),
    film = filmstrip();
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h("p", { class: "pc-title", text: model.get("title") }),
      (view.figures ?? []).length > 0 && h("div", { class: "pc-stats" }, ...stats(view.figures)),
      chart,
      film,
      ...model.get("notes").map((text) => h("div", { class: "pc-note", text })),
    ),
  );
  chart.put(view);
  film.put(view.samples);
}

function drawSettings({ model, root, listen, later }) {
  const ask = asking(model, later),
    draft = { ...model.get("values") },
    rows = new Map();
  const status = h("span", { class: "pc-muted", "aria-live": "polite" });
  const command = h("code", { class: "pc-mono pc-code" });
  const write = (value) => (value === null || value === undefined ? "" : String(value));
  const tell = (fault, field) => {
    for (const [name, row] of rows) {
      row.fault.textContent = name === field ? fault : "";
      row.fault.hidden = name !== field;
      row.input.setAttribute("aria-invalid", String(name === field));
    }
    if (fault && rows.get(field)?.node.closest("details"))
      rows.get(field).node.closest("details").open = true;
    status.textContent = fault
      ? rows.has(field)
        ? "Not in force until this is mended; the last valid settings still are."
        : fault
      : changed()
        ? `${changed()} changed`
        : "";
    undo.hidden = !fault && !changed();
  };
  const changed = () =>
    model.get("fields").filter(({ name }) => write(draft[name]) !== write(model.get("start")[name]))
      .length;
  let round = 0;
  const send = async () => {
    const mine = ++round;
    try {
      const answer = await ask("change", { draft });
      if (mine !== round) return;
      if (!answer.fault)
        commit(model, {
          values: answer.values,
          command: answer.command,
          revision: model.get("revision") + 1,
        });
      tell(answer.fault ?? "", answer.field ?? "");
      command.textContent = model.get("command");
    } catch (error) {
      status.textContent = error.message;
    }
  };
  let timer = 0,
    sent = Promise.resolve();
  const sendNow = () => {
    clearTimeout(timer);
    timer = 0;
    sent = send();
    return sent;
  };
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(sendNow, 250);
  };
  // A press of Start waits until what was typed is known to Python.
  const forms = (window.primechatForms ??= new Set()),
    settle = () => (timer ? sendNow() : sent);
  forms.add(settle);
  later(() => forms.delete(settle));
  const undo = button("Back to the start", () => {
    Object.assign(draft, model.get("start"));
    for (const [name, row] of rows) row.put(draft[name]);
    sendNow();
  });
  const field = (spec) => {
    const input =
      spec.form === "choice"
        ? h(
            "select",
            { class: "pc-select" },
            ...spec.choices.map((text) => h("option", { value: text, text })),
          )
        : h("input", {
            class: spec.form === "toggle" ? "pc-check" : `pc-input pc-is-${spec.form}`,
            type: spec.form === "toggle" ? "checkbox" : "text",
            inputmode: spec.form === "number" ? "decimal" : undefined,
            spellcheck: "false",
            autocomplete: "off",
            "data-lm-suppress-shortcuts": "true",
          });
    input.dataset.field = spec.name;
    const put = (value) => {
      if (spec.form === "toggle") input.checked = Boolean(value);
      else input.value = write(value);
    };
    put(draft[spec.name]);
    input.addEventListener(
      spec.form === "choice" || spec.form === "toggle" ? "change" : "input",
      () => {
        draft[spec.name] = spec.form === "toggle" ? input.checked : input.value;
        soon();
      },
    );
    const fault = h("div", { class: "pc-fault", role: "alert", hidden: true });
    const long = spec.form === "text" && input.value.length > 36;
    const node = h(
      "div",
      { class: long ? "pc-setting pc-wide" : "pc-setting" },
      h(
        "label",
        null,
        h(
          "span",
          { class: "pc-named" },
          h("span", { text: spec.title }),
          h("span", {
            class: "pc-mono pc-muted",
            text: spec.simple ? spec.name : spec.name.split(".").at(-1),
          }),
        ),
        input,
      ),
      h("div", null, h("div", { class: "pc-muted" }, ...phrase(spec.help)), fault),
    );
    rows.set(spec.name, { node, input, fault, put });
    return node;
  };
  const fields = model.get("fields"),
    simple = fields.filter((spec) => spec.simple),
    rest = fields.filter((spec) => !spec.simple);
  const sections = [...new Set(rest.map((spec) => spec.section))];
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-row pc-between" },
        h("p", { class: "pc-title", text: model.get("title") }),
        h("div", { class: "pc-row" }, status, undo),
      ),
      h("div", null, ...simple.map(field)),
      ...sections.map((name) =>
        more(name, ...rest.filter((spec) => spec.section === name).map(field)),
      ),
      more("The same on the command line", command),
    ),
  );
  command.textContent = model.get("command");
  listen("command", () => {
    command.textContent = model.get("command");
  });
  tell("", "");
}

export default {
  render({ model, el }) {
    const kind = model.get("kind"),
      inside = frame({ model, el }, kind);
    ({ stage: drawStage, settings: drawSettings, summary: drawSummary })[kind]({
      model,
      ...inside,
    });
    return inside.end;
  },
};
