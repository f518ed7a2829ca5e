import { ofKinds, h, asking, number, button, select, more, phrase } from "./kit.js";

function megabytes(bytes) {
  return bytes >= 1e9
    ? `${number(bytes / 1e9, 2)} GB`
    : `${number(bytes / 1e6, bytes < 1e7 ? 1 : 0)} MB`;
}

function facts(rows) {
  return h(
    "dl",
    { class: "pc-facts" },
    ...rows.flatMap(([name, value, remark]) => [
      h("dt", { text: name }),
      h(
        "dd",
        null,
        h("span", { text: value }),
        remark && h("span", { class: "pc-muted" }, ...phrase(remark)),
      ),
    ]),
  );
}

function drawMachine({ model, root, listen, later }) {
  const ask = asking(model, later),
    left = h("div"),
    right = h("div", { class: "pc-stack pc-close" });
  const again = button("Look again", () =>
    ask("find").catch((error) => {
      again.title = error.message;
    }),
  );
  const refresh = () => {
    left.replaceChildren(facts(model.get("rows")));
    const models = model.get("models");
    right.replaceChildren(
      h(
        "div",
        { class: "pc-row pc-between" },
        h("p", {
          class: "pc-title",
          text: models.length === 1 ? "One model is here" : `${models.length} models are here`,
        }),
        again,
      ),
      h(
        "div",
        { class: "pc-stack pc-close" },
        ...models.map(({ identifier, about }) =>
          h(
            "div",
            { class: "pc-model" },
            h("span", { class: "pc-mono", text: identifier }),
            h("span", { class: "pc-muted", text: about }),
          ),
        ),
      ),
      h(
        "div",
        { class: "pc-muted" },
        "Your own stand in ",
        h("code", { class: "pc-mono", text: model.get("place") }),
      ),
    );
  };
  listen(["rows", "models"], refresh);
  whenBrought(() => again.click(), later);
  refresh();
  root.append(
    h(
      "div",
      { class: "pc-card pc-two" },
      h(
        "div",
        { class: "pc-stack pc-close" },
        h("p", { class: "pc-title", text: "This machine" }),
        left,
      ),
      right,
    ),
  );
}

/** Do something when a download of this page has brought a model. */
function whenBrought(work, later) {
  window.addEventListener("primechat-models", work);
  later(() => window.removeEventListener("primechat-models", work));
}

const VERDICTS = { ok: "Sound", suspicious: "Look closer", broken: "Broken" };

function drawCheck({ model, root, listen, later }) {
  const ask = asking(model, later);
  let chosen = model.get("models")[0] ?? "";
  const pick = select({
    label: "Model",
    options: model.get("models"),
    value: chosen,
    input: (value) => {
      chosen = value;
    },
  });
  const go = button(
    "Check it",
    () => ask("check", { identifier: chosen }).catch((error) => show(error.message)),
    { primary: true },
  );
  const said = h("div", { "aria-live": "polite" }),
    body = h("div", { class: "pc-stack" });
  const show = (text) => said.replaceChildren(h("div", { class: "pc-error", text }));
  const refresh = () => {
    const state = model.get("state"),
      report = model.get("report");
    go.disabled = state === "running" || !chosen;
    go.textContent = state === "running" ? "Reading …" : "Check it";
    said.replaceChildren();
    if (state === "running")
      said.append(h("div", { class: "pc-muted", text: model.get("message") }));
    if (state === "failed") show(model.get("message"));
    body.replaceChildren();
    body.dataset.verdict = report.verdict ?? "";
    if (!report.verdict || state === "running") return;
    body.append(
      h(
        "div",
        { class: "pc-row" },
        h("span", { class: "pc-badge", text: VERDICTS[report.verdict] ?? report.verdict }),
        h("span", { class: "pc-mono", text: report.identifier }),
      ),
      h("div", null, ...phrase(report.sentence)),
    );
    const top = Math.max(...report.bars.map(([, value]) => value), 1e-9);
    if (report.bars.length) {
      body.append(
        h(
          "div",
          null,
          h("div", {
            class: "pc-label",
            text: "Bits per byte that plain English costs it: the fewer, the better it foresees the text",
          }),
          h(
            "div",
            { class: "pc-bars" },
            ...report.bars.map(([name, value, own]) =>
              h(
                "div",
                { class: own ? "pc-own" : "" },
                h("span", { text: name }),
                h(
                  "div",
                  { class: "pc-track" },
                  h("div", { style: { width: `${(value / top) * 100}%` } }),
                ),
                h("span", { class: "pc-value", text: number(value, 2) }),
              ),
            ),
          ),
        ),
      );
    }
    if (report.sample)
      body.append(
        h(
          "div",
          null,
          h("div", { class: "pc-label", text: "It goes on with a text" }),
          h("div", { class: "pc-quote", text: report.sample }),
        ),
      );
    body.append(more("Its card", facts(report.rows.map(([name, text]) => [name, text, ""]))));
  };
  listen(["state", "report", "message"], refresh);
  listen("models", () => {
    chosen ||= model.get("models")[0] ?? "";
    pick.fill(model.get("models"), chosen);
    refresh();
  });
  whenBrought(() => ask("find").catch(() => {}), later);
  root.append(
    h("div", { class: "pc-card pc-stack" }, h("div", { class: "pc-row" }, pick, go), said, body),
  );
  refresh();
}

function drawDownload({ model, root, listen, later }) {
  const ask = asking(model, later),
    name = `bundle-${Math.random().toString(36).slice(2)}`;
  let chosen = model.get("bundles")[0]?.name ?? "";
  const said = h("div", { "aria-live": "polite" }),
    table = h("div"),
    fill = h("div"),
    line = h("span", { class: "pc-muted" });
  const bar = h("div", { class: "pc-bar", role: "progressbar" }, fill),
    buttons = h("div", { class: "pc-row" });
  const act = (word) =>
    ask("act", { word, bundle: chosen }).catch((error) =>
      said.replaceChildren(h("div", { class: "pc-error", text: error.message })),
    );
  const choices = model.get("bundles").map((bundle) => {
    const dot = h("input", {
      type: "radio",
      name,
      "data-lm-suppress-shortcuts": "true",
      onchange: () => {
        chosen = bundle.name;
        refresh();
      },
    });
    dot.checked = bundle.name === chosen;
    return h(
      "label",
      { class: "pc-option" },
      dot,
      h(
        "span",
        null,
        h("strong", { text: bundle.title }),
        " ",
        h("span", { class: "pc-muted", text: bundle.about }),
      ),
    );
  });
  const refresh = () => {
    const state = model.get("state"),
      plan = model.get("plan"),
      progress = model.get("progress"),
      fits = plan.bundle === chosen;
    const busy = state === "asking" || state === "loading";
    for (const choice of choices) choice.firstChild.disabled = busy;
    const list = [];
    if (busy) list.push(button("Stop", () => act("stop")));
    else
      list.push(
        button("Show its size", () => act("plan"), { primary: !fits || state !== "planned" }),
      );
    if (state === "planned" && fits && plan.total > 0)
      list.push(button(`Download ${megabytes(plan.total)}`, () => act("fetch"), { primary: true }));
    buttons.replaceChildren(...list, line);
    const text = model.get("message");
    said.replaceChildren(
      ...(text ? [h("div", { class: state === "failed" ? "pc-error" : "pc-note", text })] : []),
    );
    table.replaceChildren();
    if (fits && plan.files?.length) {
      table.append(
        h(
          "table",
          { class: "pc-table" },
          h(
            "thead",
            null,
            h(
              "tr",
              null,
              h("th", { text: "File" }),
              h("th", { class: "pc-right", text: "Size" }),
              h("th", { text: "" }),
            ),
          ),
          h(
            "tbody",
            null,
            ...plan.files.map(([file, bytes, fate]) =>
              h(
                "tr",
                null,
                h("td", { class: "pc-mono", text: file }),
                h("td", { class: "pc-right", text: megabytes(bytes) }),
                h("td", { class: "pc-muted", text: fate }),
              ),
            ),
          ),
        ),
      );
      table.append(
        h("p", {
          class: "pc-muted",
          text: `${megabytes(plan.total)} to fetch; the disk has ${megabytes(plan.free)} free.`,
        }),
      );
    }
    bar.hidden = state !== "loading";
    fill.style.width = `${progress.total ? Math.min(100, (progress.done / progress.total) * 100) : 0}%`;
    line.textContent =
      state === "asking"
        ? "Asking the Hub; nothing is moved."
        : state === "loading" && progress.total
          ? `${megabytes(progress.done)} of ${megabytes(progress.total)}${progress.left_s ? `, about ${number(progress.left_s)} s left` : ""}`
          : "";
  };
  listen(["state", "message", "plan", "progress"], refresh);
  listen("state", () => {
    if (model.get("state") === "done") window.dispatchEvent(new Event("primechat-models"));
  });
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h(
        "div",
        { class: "pc-options", role: "radiogroup", "aria-label": "Model to bring in" },
        ...choices,
      ),
      buttons,
      bar,
      said,
      table,
    ),
  );
  refresh();
}

export default ofKinds({ machine: drawMachine, check: drawCheck, download: drawDownload });
