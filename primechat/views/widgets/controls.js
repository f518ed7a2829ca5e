import {
  ofKinds,
  h,
  asking,
  commit,
  debounce,
  number,
  button,
  slider,
  listModels,
  MORE,
  select,
  toggle,
  more,
  phrase,
  prose,
  whenSeen,
} from "./kit.js";

function drawModels({ model, root, listen, later }) {
  const ask = asking(model, later);
  const about = h("span", { class: "pc-muted", "aria-live": "polite" });
  let all = false;
  const options = () => listModels(model.get("models"), model.get("identifier"), all);
  const choose = (identifier) => {
    if (identifier === MORE) {
      all = true;
      box.fill(options(), model.get("identifier"));
      return;
    }
    commit(model, { identifier });
    tell();
  };
  const box = select({
    label: model.get("label"),
    options: options(),
    value: model.get("identifier"),
    input: choose,
  });
  const again = button(
    "Look again",
    () =>
      ask("find").catch((error) => {
        about.textContent = error.message;
      }),
    { title: "Look for models that came since" },
  );
  const none = h(
    "div",
    { class: "pc-note" },
    "No model is here yet. In a terminal, ",
    h("code", { class: "pc-mono", text: "primechat quickstart" }),
    " makes one in minutes; then look again.",
  );
  const tell = () => {
    const found = model.get("models").find((entry) => entry.identifier === model.get("identifier"));
    about.textContent = found?.about ?? "";
    none.hidden = model.get("models").length > 0;
    box.hidden = !none.hidden;
  };
  listen("models", () => {
    const found = model.get("models"),
      usual = found.find((entry) => !entry.by_product);
    if (usual && !found.some((entry) => entry.identifier === model.get("identifier")))
      commit(model, { identifier: usual.identifier });
    box.fill(options(), model.get("identifier"));
    tell();
  });
  listen("identifier", () => {
    box.fill(options(), model.get("identifier"));
    tell();
  });
  const line = notice(model.get("waits")),
    wait = () => {
      line.hidden = !model.get("waits");
    };
  listen("waits", wait);
  wait();
  tell();
  root.append(h("div", { class: "pc-row" }, box, again, about), none, line);
}

const notice = (text) =>
  h(
    "p",
    { class: "pc-notice", role: "status" },
    h("i", { "aria-hidden": "true" }),
    h("span", { text }),
  );

function drawNotice({ model, root, listen }) {
  const line = notice(model.get("text"));
  const refresh = () => {
    line.hidden = model.get("over");
  };
  listen("over", refresh);
  root.append(line);
  refresh();
}

function drawPrediction({ model, root, listen, later }) {
  // One score a page: each lab's predictions meet in the window, wherever the host keeps their elements.
  const scores = (window.primechatScores ??= new Map()),
    mine = {},
    ask = asking(model, later);
  const line = h("span", { class: "pc-muted" });
  const scale = model.get("scale"),
    unit = model.get("unit"),
    isScale = scale.length === 2;
  const say = (value) =>
    isScale
      ? number(
          value,
          [20, 5, 0].findIndex((width) => Math.abs(scale[1] - scale[0]) > width),
        ) + (unit === "%" ? " %" : unit && ` ${unit}`)
      : value;
  const isRight = () =>
    isScale
      ? Math.abs(model.get("guess") - model.get("answer")) <= model.get("within")
      : model.get("guess") === model.get("answer");
  const body = h("div"),
    result = h("div", { class: "pc-verdict", "aria-live": "polite" });
  const name = `guess-${Math.random().toString(36).slice(2)}`;
  const pick = (guess) => {
    commit(model, { guess });
    refresh();
  };
  const choices = model.get("options").map((text) => {
    const dot = h("input", {
      type: "radio",
      name,
      "data-lm-suppress-shortcuts": "true",
      onchange: () => pick(text),
    });
    return {
      text,
      dot,
      node: h(
        "label",
        { class: "pc-option" },
        dot,
        h("span", { text }),
        h("span", { class: "pc-mark" }),
      ),
    };
  });
  let bar;
  if (isScale) {
    const step = (scale[1] - scale[0]) / 100;
    bar = slider({
      label: "My guess",
      min: scale[0],
      max: scale[1],
      step: step > 0.2 ? Math.max(1, Math.round(step)) : step,
      value: model.get("guess") ?? (scale[0] + scale[1]) / 2,
      input: pick,
      show: say,
    });
    body.append(bar);
  } else {
    body.append(
      h(
        "div",
        { class: "pc-options", role: "radiogroup", "aria-label": model.get("question") },
        ...choices.map((choice) => choice.node),
      ),
    );
  }
  const settle = async () => {
    if (model.get("answer") === null) {
      reveal.disabled = true;
      result.replaceChildren(h("p", { class: "pc-muted", text: "Being measured …" }));
      try {
        const { answer, why } = await ask("settle", {}, 300000);
        model.set("answer", answer);
        model.set("why", why);
      } catch (error) {
        refresh();
        result.append(h("p", { class: "pc-error", text: error.message }));
        return;
      }
    }
    commit(model, { revealed: true });
    refresh();
  };
  const reveal = button("Show the answer", settle, { primary: true });
  const count = () => {
    const done = [...scores.values()].filter((entry) => entry.done),
      right = done.filter((entry) => entry.right).length;
    line.textContent = done.length
      ? `${right} of ${done.length} guesses in this lab were right`
      : "";
  };
  const refresh = () => {
    const shown = model.get("revealed") && model.get("answer") !== null,
      guess = model.get("guess");
    reveal.disabled = guess === null || guess === undefined;
    reveal.hidden = shown;
    line.hidden = !shown;
    for (const { text, dot, node } of choices) {
      dot.checked = text === guess;
      dot.disabled = shown;
      node.dataset.mark = !shown
        ? ""
        : text === model.get("answer")
          ? "right"
          : text === guess
            ? "wrong"
            : "other";
      node.lastChild.textContent = !shown
        ? ""
        : text === model.get("answer")
          ? text === guess
            ? "right: your guess"
            : "the answer"
          : text === guess
            ? "your guess"
            : "";
    }
    if (bar) bar.bar.disabled = shown;
    result.replaceChildren();
    if (shown) {
      if (isScale)
        result.append(
          h(
            "p",
            { class: "pc-prose" },
            h("strong", { text: `It is ${say(model.get("answer"))}. ` }),
            isRight() ? "Your guess was close enough." : `You guessed ${say(guess)}.`,
          ),
        );
      result.append(...prose(model.get("why")));
      scores.set(mine, { done: true, right: isRight(), question: model.get("question") });
      window.dispatchEvent(new Event("primechat-score"));
    }
  };
  window.addEventListener("primechat-score", count);
  later(() => {
    window.removeEventListener("primechat-score", count);
    scores.delete(mine);
  });
  listen(["guess", "revealed"], refresh);
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        null,
        h("div", { class: "pc-label", text: "Guess first" }),
        h("p", { class: "pc-title", text: model.get("question") }),
      ),
      body,
      h("div", { class: "pc-row" }, reveal, line),
      result,
    ),
  );
  refresh();
  // A guess that was made when the lab was open before, of something that has to be measured again.
  if (model.get("revealed") && model.get("answer") === null) whenSeen(root, settle, later);
}

const STATES = {
  untried: ["To do", "Change the function above and run the cell: it is checked at once."],
  broken: ["Not yet", ""],
  failed: ["It stopped", ""],
  passed: ["Solved", ""],
  solved: ["Solved before", ""],
};

function drawExercise({ model, root, listen }) {
  const badge = h("span", { class: "pc-badge" }),
    verdict = h("div", { "aria-live": "polite" });
  const task = h("div", null, ...prose(model.get("task")));
  const refresh = () => {
    const state = model.get("state"),
      [word, words] = STATES[state];
    badge.textContent = word;
    root.dataset.state = state;
    const rule = model.get("rule");
    verdict.replaceChildren(
      h(
        "div",
        { class: state === "broken" || state === "failed" ? "pc-error" : "pc-note" },
        rule && h("strong", { text: `${rule}. ` }),
        ...phrase(model.get("message") || words),
      ),
    );
  };
  listen(["state", "rule", "message"], refresh);
  const card = h(
    "div",
    { class: "pc-card pc-stack" },
    h("div", { class: "pc-row" }, h("p", { class: "pc-title", text: model.get("title") }), badge),
    task,
    verdict,
  );
  if (model.get("kept"))
    card.append(
      more("What you wrote then", h("pre", { class: "pc-mono pc-code", text: model.get("kept") })),
    );
  if (model.get("hint")) card.append(more("Hint", ...prose(model.get("hint"))));
  if (model.get("solution"))
    card.append(
      more("Solution", h("pre", { class: "pc-mono pc-code", text: model.get("solution") })),
    );
  root.append(card);
  refresh();
}

function drawPart(part) {
  if (part.kind === "image")
    return h(
      "div",
      { class: "pc-scroll", tabindex: 0 },
      h("img", { class: "pc-image", src: `data:image/png;base64,${part.data}`, alt: "" }),
    );
  if (part.kind === "figures")
    return h(
      "div",
      { class: "pc-stats" },
      ...part.items.map(([name, value]) =>
        h("div", { class: "pc-stat" }, h("span", { text: value }), h("span", { text: name })),
      ),
    );
  if (part.kind === "error") return h("div", { class: "pc-error", text: part.text });
  if (part.kind !== "table") return h("div", { class: "pc-output", text: part.text });
  const head = h("tr", null, ...part.columns.map((text) => h("th", { text, scope: "col" })));
  const body = part.rows.map((row) => h("tr", null, ...row.map((text) => h("td", { text }))));
  return h(
    "div",
    { class: "pc-scroll" },
    h("table", { class: "pc-table" }, h("thead", null, head), h("tbody", null, ...body)),
    part.left_out > 0 &&
      h("p", { class: "pc-muted", text: `${number(part.left_out)} more rows are not shown` }),
  );
}

function drawLive({ model, root, listen, later }) {
  // One change is under way at a time: a slow function is asked for the latest state only.
  let sent = model.get("output")["#"] ?? 0,
    waiting = false;
  const output = h("div", { class: "pc-stack", "aria-live": "polite" });
  const next = { ...model.get("values") };
  const send = () => {
    if (sent !== (model.get("output")["#"] ?? 0)) {
      waiting = true;
      return;
    }
    waiting = false;
    sent += 1;
    output.dataset.busy = "true";
    commit(model, { values: { ...next, "#": sent } });
  };
  const soon = debounce(send, 150);
  const controls = model.get("controls").map((spec) => {
    const value = next[spec.name],
      label = spec.label;
    const input = (given) => {
      next[spec.name] = given;
      (spec.form === "text" ? soon : send)();
    };
    if (spec.form === "slider")
      return slider({
        label,
        min: spec.low,
        max: spec.high,
        step: spec.step,
        value,
        input,
        show: (v) => number(v, spec.step < 1 ? 2 : 0),
      });
    if (spec.form === "select") return select({ label, options: spec.options, value, input });
    if (spec.form === "toggle") return toggle({ label, value, input });
    const box = h("textarea", {
      class: "pc-text pc-short",
      rows: 2,
      spellcheck: "false",
      "aria-label": label,
      oninput: () => input(box.value),
    });
    box.value = value;
    return h("label", { class: "pc-wide" }, h("span", { class: "pc-label", text: label }), box);
  });
  const refresh = () => {
    sent = Math.max(sent, model.get("output")["#"] ?? 0); // another view, or this page before it was reloaded, asked
    delete output.dataset.busy;
    output.replaceChildren(...(model.get("output").parts ?? []).map(drawPart));
    if (waiting) send();
  };
  listen("output", refresh);
  root.append(
    h("div", { class: "pc-card pc-stack" }, h("div", { class: "pc-row" }, ...controls), output),
  );
  if (model.get("seen")) refresh();
  else {
    output.append(h("p", { class: "pc-muted", text: "Being drawn …" }));
    output.dataset.busy = "true";
    whenSeen(root, () => commit(model, { seen: true }), later);
  }
}

export default ofKinds({
  models: drawModels,
  notice: drawNotice,
  prediction: drawPrediction,
  exercise: drawExercise,
  live: drawLive,
});
