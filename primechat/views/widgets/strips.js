// A conversation as a heat strip, and the turn behind a cell.

import { asking, frame, h, more, number, select, tabs } from "./kit.js";

function render({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "strips"),
    ask = asking(model, later);
  const round = (one) => one.loop >= 0,
    first = Math.max(0, (model.get("groups")[0]?.talks ?? []).findIndex(round)); // a loop is what one came to see
  let group = 0,
    talk = first,
    turn = Math.max(1, model.get("groups")[0]?.talks[first]?.loop ?? 1),
    by = "entropy";
  const grid = h("div", {
      class: "pc-strips-grid",
      role: "grid",
      style: { "--pc-rows": model.get("rows").length },
    }),
    reading = h("div", { class: "pc-card pc-strips-reading", "aria-live": "polite" });
  const head = h("div", { class: "pc-row" }),
    about = h("p", { class: "pc-muted pc-strips-about" }),
    verdict = h("p", { class: "pc-strips-about" });
  const figure = (value, row) => number(value, row.full >= 10 ? 0 : 2); // words are whole
  root.append(
    head,
    about,
    verdict,
    grid,
    more(
      "What the rows say",
      h(
        "table",
        { class: "pc-table" },
        h(
          "tbody",
          {},
          ...model
            .get("rows")
            .map((row) =>
              h(
                "tr",
                {},
                h("td", { text: row.name }),
                h("td", {
                  class: "pc-muted",
                  text: `${row.about}; the strongest colour is ${figure(row.full, row)} or more`,
                }),
              ),
            ),
        ),
      ),
    ),
    reading,
  );

  const now = () => model.get("groups")[group]?.talks[talk];
  function drawHead() {
    const groups = model.get("groups");
    head.replaceChildren(
      tabs({
        label: "Who talks",
        options: groups.map((one, i) => [String(i), one.name]),
        value: String(group),
        input: (value) => {
          group = Number(value);
          talk = Math.max(0, Math.min(talk, groups[group].talks.length - 1));
          drawHead();
          draw();
        },
      }),
      select({
        label: "Conversation",
        options: groups[group].talks.map((one, i) => [
          String(i),
          `${round(one) ? "↻ " : ""}${one.title}`,
        ]),
        value: String(talk),
        input: (value) => {
          talk = Number(value);
          draw();
        },
      }),
    );
    about.textContent = groups[group].about ?? "";
  }
  function draw() {
    const chosen = now(),
      rows = model.get("rows"),
      all = model.get("groups")[group].talks,
      stuck = all.filter(round).length;
    verdict.textContent = chosen
      ? `The detector: ${stuck} of ${all.length} conversations ${stuck === 1 ? "goes" : "go"} round to ${stuck === 1 ? "its" : "their"} end; this one ${round(chosen) ? `does from turn ${chosen.loop} on` : "does not"}.`
      : "";
    verdict.classList.toggle("pc-strips-loop", Boolean(chosen && round(chosen)));
    if (!chosen) {
      grid.replaceChildren();
      reading.replaceChildren(
        h("p", {
          class: "pc-muted",
          role: "status",
          text: "The model is reading these conversations: some seconds …",
        }),
      );
      return;
    }
    turn = Math.min(turn, chosen.turns.length - 1);
    grid.style.setProperty("--pc-turns", chosen.turns.length);
    const gap = round(chosen) ? Math.max(0, chosen.loop) : chosen.turns.length;
    grid.replaceChildren(
      h("span", { class: "pc-strips-round", style: { gridColumn: `1 / ${gap + 2}` }, text: " " }),
      round(chosen)
        ? h("span", {
            class: "pc-strips-round",
            dataset: { loop: "true" },
            style: { gridColumn: `${gap + 2} / -1` },
            text: "↻ goes round",
          })
        : "",
      h("span", { class: "pc-strips-name pc-muted", text: "turn" }),
      ...chosen.turns.map((_, t) =>
        h("span", {
          class: "pc-strips-number",
          dataset: { loop: String(chosen.loop >= 0 && t >= chosen.loop) },
          text: String(t),
        }),
      ),
      ...rows.flatMap((row, r) => [
        h("span", { class: "pc-strips-name", text: row.name, title: row.about }),
        ...chosen.turns.map((one, t) => {
          const value = one.values[r],
            share = value === null ? 0 : Math.max(0, Math.min(1, value / row.full));
          return h("button", {
            type: "button",
            class: "pc-strips-cell",
            role: "gridcell",
            dataset: { t, r, chosen: String(t === turn) },
            tabindex: t === turn && r === 0 ? 0 : -1,
            "data-lm-suppress-shortcuts": "true",
            "aria-label": `turn ${t}, ${row.name} ${value === null ? "not measured" : figure(value, row)}`,
            title:
              value === null
                ? `${row.name}: nothing to measure`
                : `${row.name} ${figure(value, row)}: ${row.about}`,
            text: value === null ? "·" : "",
            style: { "--pc-heat": `${Math.round(100 * share)}%` },
            onclick: () => pick(t),
          });
        }),
      ]),
    );
    drawReading();
  }
  function pick(t) {
    turn = t;
    for (const cell of grid.querySelectorAll(".pc-strips-cell")) {
      cell.dataset.chosen = String(Number(cell.dataset.t) === t);
      cell.tabIndex = Number(cell.dataset.t) === t && cell.dataset.r === "0" ? 0 : -1;
    }
    drawReading();
  }
  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".pc-strips-cell"),
      move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
        event.key
      ];
    if (!cell || !move) return;
    event.preventDefault();
    event.stopPropagation();
    const next = grid.querySelector(
      `[data-t="${Number(cell.dataset.t) + move[0]}"][data-r="${Number(cell.dataset.r) + move[1]}"]`,
    );
    if (next) {
      pick(Number(next.dataset.t));
      next.focus();
    }
  });
  function drawReading() {
    const chosen = now(),
      one = chosen.turns[turn],
      rows = model.get("rows");
    const level = (token) =>
      by === "entropy"
        ? token[1] / 5
        : by === "p"
          ? -Math.log(Math.max(token[2], 1e-9)) / 6
          : Math.log1p(token[3]) / 5;
    const tokens = one.tokens.map((token) =>
      h("span", {
        class: "pc-strips-token",
        text: token[0],
        title: `entropy ${number(token[1], 2)} nats · probability ${number(token[2], 3)} · rank ${token[3] + 1}`,
        style: { "--pc-heat": `${Math.round(75 * Math.max(0, Math.min(1, level(token))))}%` },
      }),
    );
    const beside = (t) =>
      h("p", {
        class: "pc-muted pc-strips-beside",
        text: chosen.turns[t] ? `${t}: ${chosen.turns[t].text || "(nothing)"}` : " ",
      });
    reading.replaceChildren(
      h(
        "div",
        { class: "pc-row" },
        h("b", { text: `Turn ${turn}` }),
        h("span", { class: "pc-muted", text: one.who }),
        chosen.loop >= 0 &&
          h("span", { class: "pc-strips-loop", text: `goes round from turn ${chosen.loop} on` }),
        h("span", { class: "pc-strips-gap" }),
        select({
          label: "Colour by",
          options: [
            ["entropy", "entropy"],
            ["p", "improbability"],
            ["rank", "rank"],
          ],
          value: by,
          input: (value) => {
            by = value;
            drawReading();
          },
        }),
      ),
      beside(turn - 2),
      beside(turn - 1),
      h("p", { class: "pc-strips-text" }, ...(tokens.length ? tokens : [one.text || "(nothing)"])),
      beside(turn + 1),
      h("p", {
        class: "pc-muted",
        text: rows
          .map(
            (row, r) => `${row.name} ${one.values[r] === null ? "–" : figure(one.values[r], row)}`,
          )
          .join(" · "),
      }),
    );
  }
  listen(["groups", "rows"], () => {
    group = Math.min(group, model.get("groups").length - 1);
    talk = Math.max(0, Math.min(talk, (model.get("groups")[group]?.talks.length ?? 1) - 1));
    drawHead();
    draw();
  });
  drawHead();
  draw();
  if (model.get("groups").some((one) => !one.talks.length)) {
    ask("settle", {}, 300000).catch((error) => {
      about.textContent = `The other conversations could not be read: ${error.message}`;
    });
  }
  return end;
}

export default { render };
