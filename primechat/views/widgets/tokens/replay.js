import { asking, button, commit, debounce, frame, h, number, select, slider } from "../kit.js";
import { TINTS, readBytes } from "./chips.js";

function render({ model, el }) {
  const ui = frame({ model, el }, "replay"),
    { root } = ui,
    ask = asking(model, ui.later);
  let play = model.get("start"),
    at = 0,
    timer = 0,
    count = 0;

  const words = h("input", {
    class: "pc-input pc-words pc-mono",
    type: "text",
    maxlength: 600,
    value: model.get("text"),
    spellcheck: "false",
    "aria-label": "Text whose merges are played",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => fetchSoon(),
  });
  const choice = select({
    label: "Tokenizer",
    options: [],
    value: model.get("key"),
    input: (key) => {
      commit(model, { key });
      fetchNow();
    },
  });
  const fillChoices = () =>
    choice.fill(
      model.get("choices").map(([key, label]) => [key, label]),
      model.get("key"),
    );
  const go = button("Play", () => (timer ? pause() : run()), { primary: true });
  const back = button(
      "‹",
      () => {
        pause();
        show(at - 1);
      },
      { title: "One merge back" },
    ),
    next = button(
      "›",
      () => {
        pause();
        show(at + 1);
      },
      { title: "One merge on" },
    );
  const bar = slider({
    label: "Merges made",
    min: 0,
    max: 1,
    value: 0,
    input: (value) => {
      pause();
      show(value);
    },
    show: (value) => `${value} of ${play.steps.length}`,
  });
  const stage = h("div", { class: "pc-stage", "aria-live": "off" });
  const said = h("div", { class: "pc-said", role: "status" }),
    list = h("ol", { class: "pc-merges", "aria-label": "Merges in order" }),
    fault = h("div", { class: "pc-error", role: "alert", hidden: true });
  root.append(
    h(
      "div",
      { class: "pc-stack" },
      h(
        "div",
        { class: "pc-row" },
        choice,
        h(
          "label",
          { class: "pc-field pc-grow" },
          h("span", { class: "pc-label", text: "Your words" }),
          words,
        ),
      ),
      h("div", { class: "pc-row" }, go, back, next, bar),
      fault,
      said,
      h("div", { class: "pc-two" }, stage, list),
    ),
  );

  /** Parts of the text after so many merges: [from, to, merging]. */
  function partsAfter(steps) {
    const { data, removed_at: removed } = play,
      starts = [];
    for (let i = 0; i < data.length; i++)
      if (!(removed[i] >= 0 && removed[i] < steps)) starts.push(i);
    const parts = starts.map((from, i) => ({ from, to: starts[i + 1] ?? data.length, merging: 0 }));
    parts.forEach((part, i) => {
      if (removed[part.from] === steps && i) {
        parts[i - 1].merging ||= 1;
        part.merging = 2;
      }
    });
    return parts;
  }
  function show(step) {
    at = Math.max(0, Math.min(play.steps.length, step));
    bar.put(at);
    const parts = partsAfter(at),
      now = play.steps[at],
      pieces = new Set(play.pieces);
    let word = null;
    const nodes = [];
    for (const part of parts) {
      if (!word || pieces.has(part.from)) nodes.push((word = h("span", { class: "pc-piece" })));
      const chip = h("span", {
        class: "pc-part",
        text: readBytes(play.data.slice(part.from, part.to)),
        style: { background: `var(--tint-${tintOf(part.from)})` },
      });
      if (part.merging)
        chip.classList.add("pc-merging", part.merging === 1 ? "pc-first" : "pc-second");
      if (part.merging === 1 && now) chip.dataset.rank = String(now[0]);
      word.append(chip);
    }
    stage.replaceChildren(...nodes);
    const name = (bytes) => h("span", { class: "pc-swatch pc-name", text: readBytes(bytes) });
    if (now) {
      said.replaceChildren(
        h(
          "span",
          {},
          h("strong", { text: `${number(parts.length)} parts. ` }),
          "Next, of all pairs that stand here side by side, the one with the lowest rank: ",
        ),
        h(
          "span",
          { class: "pc-nowrap" },
          name(now[1]),
          " + ",
          name(now[2]),
          " → ",
          name([...now[1], ...now[2]]),
        ),
        h("span", {
          class: "pc-muted",
          text: ` rank ${number(now[0])}${now[3] > 1 ? `, in ${now[3]} places` : ""}`,
        }),
      );
    } else {
      said.replaceChildren(
        h(
          "span",
          {},
          h("strong", {
            text: `${number(parts.length)} ${parts.length === 1 ? "token" : "tokens"}. `,
          }),
          play.steps.length
            ? "No pair that stands here is a known merge: done. "
            : "There is nothing to merge. ",
          play.equal
            ? h("span", { class: "pc-good", text: "✓ The same as encode(): " })
            : h("span", { class: "pc-bad", text: "✗ encode() says otherwise: " }),
          h("span", {
            class: "pc-mono pc-ids",
            text: play.ids.slice(0, 40).join(" ") + (play.ids.length > 40 ? " …" : ""),
          }),
        ),
      );
    }
    const first = Math.max(0, Math.min(at - 3, play.steps.length - 9));
    list.replaceChildren(
      ...play.steps.slice(first, first + 9).map((step, i) => {
        const row = h(
          "li",
          { class: first + i < at ? "pc-made" : first + i === at ? "pc-now" : "" },
          h(
            "button",
            {
              type: "button",
              title: "Play to here",
              onclick: () => {
                pause();
                show(first + i);
              },
            },
            h("span", { class: "pc-muted pc-rank", text: number(step[0]) }),
            name(step[1]),
            name(step[2]),
          ),
        );
        return row;
      }),
    );
    root.dataset.step = String(at);
    root.dataset.parts = String(parts.length);
    back.disabled = at === 0;
    next.disabled = at === play.steps.length;
  }
  function tintOf(from) {
    return play.tints[from];
  }
  function tint() {
    // the colour of a part is its first byte's, so that it keeps it while it grows
    play.tints = play.data.map((_, i) => (i * 2) % TINTS);
  }
  function take(answer) {
    play = answer;
    tint();
    bar.bar.max = String(play.steps.length);
    root.dataset.equal = String(play.equal);
    fault.hidden = true;
  }
  async function fetchNow() {
    const mine = ++count,
      atEnd = at >= play.steps.length;
    pause();
    try {
      const answer = await ask("play", { key: choice.box.value, text: words.value });
      if (mine !== count) return;
      take(answer);
      show(atEnd ? play.steps.length : 0);
      commit(model, { text: words.value });
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
  }
  const fetchSoon = debounce(fetchNow, 120);
  function pause() {
    clearTimeout(timer);
    timer = 0;
    go.textContent = at >= play.steps.length ? "Play again" : "Play";
  }
  function run() {
    if (at >= play.steps.length) show(0);
    const tick = () => {
      if (at >= play.steps.length) return pause();
      show(at + 1);
      timer = setTimeout(tick, Math.max(120, Math.min(900, 14000 / (play.steps.length + 1))));
    };
    go.textContent = "Pause";
    timer = setTimeout(tick, 500);
  }
  ui.later(() => clearTimeout(timer));
  ui.listen("choices", fillChoices);
  fillChoices();
  take(play);
  show(0);
  if (model.get("text") !== play.text || model.get("key") !== play.key) fetchNow();
  root.dataset.ready = "true";
  return ui.end;
}

export default { render };
