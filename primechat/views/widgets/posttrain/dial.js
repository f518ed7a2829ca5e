// An adapter's dial: base and adapted model answer the same words; the reply changes while you drag.
import { asking, frame, h, number, select, slider, debounce } from "../kit.js";

function render({ model, el }) {
  const { root, listen, later, end } = frame({ model, el }, "dial");
  const ask = asking(model, later);
  let dial = 1,
    busy = false,
    again = false,
    base_for = null;
  let adapter = model.get("adapters")[0] ?? "";
  const words = h("input", {
    class: "pc-input pc-dial-prompt",
    "aria-label": "What you say",
    value: model.get("prompt"),
    "data-lm-suppress-shortcuts": "true",
    oninput: debounce(() => write(), 400),
    onkeydown: (event) => event.stopPropagation(),
  });
  const left = h("p", { class: "pc-dial-reply", "aria-live": "polite" }),
    right = h("p", { class: "pc-dial-reply", "aria-live": "polite" });
  const now = h("span", { class: "pc-label", text: "with the adapter × 1.0" });
  const bar = slider({
    label: "dial",
    min: 0,
    max: 2,
    step: 0.1,
    value: 1,
    show: (v) => `× ${number(v, 1)}`,
    input: (v) => {
      dial = v;
      now.textContent = `with the adapter × ${number(v, 1)}`;
      write();
    },
  });
  const pick = select({
    label: "adapter",
    options: model.get("adapters"),
    value: adapter,
    input: (v) => {
      adapter = v;
      write();
    },
  });
  const wait = h("p", { class: "pc-note", text: model.get("waiting") });
  const desk = h(
    "div",
    { class: "pc-stack" },
    h(
      "div",
      { class: "pc-row" },
      h(
        "label",
        { class: "pc-field pc-dial-say" },
        h("span", { class: "pc-label", text: "you say" }),
        words,
      ),
    ),
    h("div", { class: "pc-row" }, bar, pick),
    h(
      "div",
      { class: "pc-dial-two" },
      h(
        "div",
        { class: "pc-card" },
        h("span", { class: "pc-label", text: "the model alone (× 0)" }),
        left,
      ),
      h("div", { class: "pc-card pc-dial-on" }, now, right),
    ),
  );
  async function write() {
    if (busy) {
      again = true;
      return;
    }
    if (!adapter || !words.value.trim()) return;
    busy = true;
    try {
      if (base_for !== words.value) {
        const said = words.value;
        left.textContent = (await ask("write", { prompt: said, dial: 0, adapter })).text;
        base_for = said;
      }
      right.textContent = (await ask("write", { prompt: words.value, dial, adapter })).text;
    } catch (error) {
      right.textContent = error.message;
    }
    busy = false;
    if (again) {
      again = false;
      write();
    }
  }
  const draw = () => {
    const names = model.get("adapters");
    if (!names.includes(adapter)) {
      adapter = names[0] ?? "";
    }
    pick.fill(names, adapter);
    pick.hidden = names.length < 2;
    desk.hidden = !names.length;
    wait.hidden = names.length > 0;
    base_for = null;
    write();
  };
  root.append(wait, desk);
  listen("adapters", draw);
  draw();
  return end;
}
export default { render };
