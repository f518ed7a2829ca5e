// The teacher's reply, each token tinted by KL(teacher, student) before it; point at one for both models' guesses.
import { asking, debounce, frame, h, number } from "../kit.js";

function render({ model, el }) {
  const { root, later, end } = frame({ model, el }, "heat");
  const ask = asking(model, later);
  const words = h("input", {
    class: "pc-input pc-heat-prompt",
    "aria-label": "What you say",
    value: model.get("prompt"),
    "data-lm-suppress-shortcuts": "true",
    oninput: debounce(() => measure(), 500),
    onkeydown: (event) => event.stopPropagation(),
  });
  const text = h("p", { class: "pc-heat-text" }),
    say = h("p", { class: "pc-muted pc-heat-say", "aria-live": "polite" }),
    key = h("div", { class: "pc-row pc-muted" });
  async function measure() {
    let found;
    try {
      found = await ask("measure", { prompt: words.value });
    } catch (error) {
      say.textContent = error.message;
      return;
    }
    const top = Math.max(0.5, ...found.tokens.map((t) => t.kl));
    text.replaceChildren(
      ...found.tokens.map((t) => {
        const tell = () => {
          say.textContent = `Before “${t.text.trim() || "␣"}”: ${number(t.kl, 2)} nats apart. The teacher's best guess: “${t.teacher}”, the student's: “${t.student}”.`;
        };
        return h("span", {
          class: "pc-heat-token",
          tabindex: 0,
          text: t.text,
          onpointerenter: tell,
          onfocus: tell,
          style: { "--heat": `${Math.round(100 * Math.min(1, t.kl / top))}%` },
        });
      }),
    );
    const mean = found.tokens.reduce((sum, t) => sum + t.kl, 0) / Math.max(1, found.tokens.length);
    say.textContent = `On average ${number(mean, 2)} nats apart. Point at a token for both models' guesses.`;
    key.replaceChildren("0", h("span", { class: "pc-heat-key" }), `${number(top, 1)} nats`);
  }
  root.append(
    h(
      "div",
      { class: "pc-card pc-stack" },
      h("label", { class: "pc-field" }, h("span", { class: "pc-label", text: "you say" }), words),
      text,
      key,
      say,
    ),
  );
  measure();
  return end;
}
export default { render };
