import { asking, button, commit, debounce, frame, h, number, select } from "../kit.js";
import { TINTS, hex, readBytes } from "./chips.js";

const WHO = { system: "System", user: "User", assistant: "Assistant" };
const PART = { text: "says", python: "calls Python", python_output: "is told the result" };

function render({ model, el }) {
  const ui = frame({ model, el }, "chatformat"),
    { root } = ui,
    ask = asking(model, ui.later);
  let messages = structuredClone(model.get("messages")),
    drawn = model.get("start"),
    count = 0;
  const keys = model.get("formats");
  if (!keys.length) {
    root.append(
      h("div", {
        class: "pc-note",
        text: "No tokenizer with chat tokens is here: train or download a model first.",
      }),
    );
    return ui.end;
  }
  const contextOf = () => keys.find(([key]) => key === choice.box.value)?.[2] ?? 256;
  const choice = select({
    label: "Tokenizer",
    options: keys.map(([key, label]) => [key, label]),
    value: model.get("key"),
    input: (key) => {
      most.value = String(contextOf());
      commit(model, { key });
      draw();
    },
  });
  const most = h("input", {
    class: "pc-input pc-most",
    type: "number",
    min: 1,
    step: 1,
    "aria-label": "Most tokens",
    "data-lm-suppress-shortcuts": "true",
    oninput: () => drawSoon(),
  });
  most.value = String(contextOf());
  const list = h("div", { class: "pc-messages" }),
    adds = h("div", { class: "pc-row" });
  const stage = h("div", {
      class: "pc-tokens",
      tabindex: "0",
      "aria-label": "The conversation as tokens",
    }),
    facts = h("div", { class: "pc-row pc-facts", role: "status" });
  const detail = h("div", { class: "pc-detail pc-mono", role: "status" }),
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
          { class: "pc-field" },
          h("span", { class: "pc-label", text: "Cut after" }),
          most,
          h("span", { class: "pc-label", text: "tokens" }),
        ),
      ),
      h(
        "div",
        { class: "pc-two" },
        h("div", { class: "pc-stack pc-left" }, list, adds),
        h("div", { class: "pc-stack pc-left" }, facts, fault, stage, detail),
      ),
    ),
  );

  function box(text, label, input) {
    const area = h("textarea", {
      class: "pc-text",
      rows: 1,
      "aria-label": label,
      "data-lm-suppress-shortcuts": "true",
      oninput: () => {
        input(area.value);
        fit();
        drawSoon();
      },
    });
    const fit = () => {
      area.style.height = "auto";
      area.style.height = `${Math.max(38, area.scrollHeight + 2)}px`;
    };
    area.value = text;
    requestAnimationFrame(fit);
    return area;
  }
  function drawList() {
    list.replaceChildren(
      ...messages.map((message, i) => {
        const parts =
          typeof message.content === "string"
            ? [{ type: "text", text: message.content }]
            : message.content;
        const last = i === messages.length - 1;
        return h(
          "div",
          { class: `pc-message pc-${message.role}` },
          h(
            "div",
            { class: "pc-row pc-between" },
            h("strong", { text: WHO[message.role] }),
            last || message.role === "system"
              ? button(
                  "×",
                  () => {
                    messages.splice(i, 1);
                    drawList();
                    draw();
                  },
                  { title: "Take this message away" },
                )
              : null,
          ),
          parts.flatMap((part, j) => [
            parts.length > 1 ? h("span", { class: "pc-muted", text: PART[part.type] }) : null,
            box(part.text, `${WHO[message.role]} ${PART[part.type]}`, (text) => {
              if (typeof message.content === "string") message.content = text;
              else message.content[j].text = text;
            }),
          ]),
        );
      }),
    );
    const end = messages.at(-1)?.role,
      next = end === "user" ? "assistant" : "user";
    const add = (message) => {
      messages.push(message);
      drawList();
      draw();
    };
    adds.replaceChildren(
      button(`Add ${next === "user" ? "a user" : "an assistant"} message`, () =>
        add({ role: next, content: next === "user" ? "And then?" : "Then we go home." }),
      ),
      next === "assistant"
        ? button("Answer with a Python call", () =>
            add({
              role: "assistant",
              content: [
                { type: "text", text: "I count. " },
                { type: "python", text: "'strawberry'.count('r')" },
                { type: "python_output", text: "3" },
                { type: "text", text: "Three." },
              ],
            }),
          )
        : "",
      messages[0]?.role === "system"
        ? ""
        : button("Put a system message first", () => {
            messages.unshift({ role: "system", content: "Be brief." });
            drawList();
            draw();
          }),
    );
  }
  async function draw() {
    const mine = ++count,
      most_tokens = Math.max(1, Math.round(Number(most.value)) || 1);
    try {
      const answer = await ask("draw", {
        key: choice.box.value,
        messages,
        max_tokens: most_tokens,
      });
      if (mine !== count) return;
      drawn = answer;
      fault.hidden = true;
      drawTokens();
      commit(model, { messages: structuredClone(messages) });
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
  }
  const drawSoon = debounce(draw, 60);
  function drawTokens() {
    const { ids, mask, pieces, special } = drawn,
      learned = mask.reduce((sum, bit) => sum + bit, 0),
      kept = ids.length - drawn.cut;
    const learnedKept = mask.slice(0, kept).reduce((sum, bit) => sum + bit, 0);
    facts.replaceChildren(
      h("span", {}, h("strong", { text: number(kept) }), " tokens"),
      h(
        "span",
        { class: "pc-lamp" },
        h("strong", { text: number(learnedKept) }),
        ` learned (${number((100 * learnedKept) / Math.max(1, kept))} %)`,
      ),
      drawn.cut
        ? h("span", {
            class: "pc-bad",
            text: `${number(drawn.cut)} beyond the cut, ${number(learned - learnedKept)} of them to be learned, are lost`,
          })
        : "",
    );
    let tint = 0;
    stage.replaceChildren(
      ...ids.map((id, i) => {
        const text = special[i]
          ? new TextDecoder().decode(Uint8Array.from(pieces[i]))
          : readBytes(pieces[i]);
        const chip = h("span", {
          class: `pc-bit${special[i] ? " pc-special" : ""}${mask[i] ? " pc-learned" : ""}${i >= kept ? " pc-lost" : ""}`,
          text,
          tabindex: -1,
        });
        if (!special[i]) chip.style.background = `var(--tint-${tint++ % TINTS})`;
        chip.index = i;
        return chip;
      }),
    );
    Object.assign(root.dataset, { tokens: kept, learned: learnedKept });
    drawDetail(-1);
  }
  function drawDetail(i) {
    if (i < 0)
      return detail.replaceChildren(
        h("span", {
          class: "pc-muted",
          text: "Point at a token to see its id and bytes, and why it is lit or not.",
        }),
      );
    const why = drawn.mask[i]
      ? "learned: the model must be able to write it"
      : drawn.special[i]
        ? "not learned: it is put there, the model only reads it"
        : "not learned: somebody else wrote it";
    detail.replaceChildren(
      h("span", {}, h("span", { class: "pc-muted", text: "id " }), String(drawn.ids[i])),
      h(
        "span",
        {},
        h("span", { class: "pc-muted", text: "bytes " }),
        drawn.special[i] ? "none: a special token stands for no text" : hex(drawn.pieces[i]),
      ),
      h("span", { class: drawn.mask[i] ? "pc-good" : "pc-muted", text: why }),
    );
  }
  stage.addEventListener("pointerover", (event) => drawDetail(event.target.index ?? -1));
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const chips = [...stage.children],
      now = chips.findIndex((chip) => chip.classList.contains("pc-lit")),
      next = Math.max(0, Math.min(chips.length - 1, now + step));
    chips[now]?.classList.remove("pc-lit");
    chips[next].classList.add("pc-lit");
    drawDetail(next);
  });
  drawList();
  drawTokens();
  root.dataset.ready = "true";
  return ui.end;
}

export default { render };
