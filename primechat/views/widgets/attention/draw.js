// What the views of a forward pass share: a text of tokens, heat maps, bars, and redrawing once for many changes.
import { h } from "../kit.js";

/** Run work once, in the next frame, however often it is called before. */
export function soon(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      work();
    });
  };
}

/** A Bytes trait as a typed array, copied, so that its offset does not matter. */
export function readBytes(view, Kind) {
  if (!view || !view.byteLength) return new Kind(0);
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  return new Kind(bytes.slice().buffer);
}

/** The text of a token as it is shown where space must be seen. */
export function spell(token) {
  return token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "·").replace(/ $/, "·") || "∅";
}

export function percent(share) {
  if (share < 0) return `−${percent(-share)}`;
  return share >= 0.995
    ? "100 %"
    : share >= 0.0995
      ? `${Math.round(share * 100)} %`
      : `${(share * 100).toFixed(1)} %`;
}

/** A number with its sign, as it is printed. */
export function signed(x, digits = 2) {
  return `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(digits)}`;
}

/** The name of a part in words: layer.1.head.2 -> layer 1, head 2. */
export function sayPart(part) {
  const [, layer, kind, head] = part.split(".");
  return part.startsWith("layer.")
    ? kind === "head"
      ? `layer ${layer}, head ${head}`
      : `layer ${layer}, MLP`
    : part;
}

/**
 * A text whose tokens can be pointed at: `hover(i)` (-1: none) and `pick(i)`; arrow keys move.
 * `tint(shares, colour)` shades token i by shares[i] in 0..1; `mark(i)` outlines the picked one,
 * `read(i)` underlines one.
 */
export function tokenText({ label, hover = () => {}, pick = () => {} }) {
  const box = h("div", {
    class: "pc-tokens",
    role: "listbox",
    "aria-label": label,
    onpointerleave: () => hover(-1),
  });
  let picked = -1;
  const index = (event) => {
    const node = event.target.closest(".pc-token");
    return node ? [...box.children].indexOf(node) : -1;
  };
  box.addEventListener("pointerover", (event) => {
    const i = index(event);
    if (i >= 0) hover(i);
  });
  box.addEventListener("focusin", (event) => {
    const i = index(event);
    if (i >= 0) hover(i);
  });
  box.addEventListener("focusout", () => hover(-1));
  box.addEventListener("click", (event) => {
    const i = index(event);
    if (i >= 0) pick(i);
  });
  box.addEventListener("keydown", (event) => {
    const i = index(event),
      step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (i < 0) return;
    if (step) {
      event.preventDefault();
      event.stopPropagation();
      box.children[Math.min(Math.max(i + step, 0), box.children.length - 1)].focus();
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick(i);
    }
  });
  const put = (tokens) => {
    if (
      box.children.length === tokens.length &&
      tokens.every((t, i) => box.children[i].dataset.token === t)
    )
      return;
    box.replaceChildren(
      ...tokens.map((token, i) =>
        h("span", {
          class: "pc-token",
          role: "option",
          tabindex: i === tokens.length - 1 ? 0 : -1,
          text: token.replace(/\n/g, "⏎\n"),
          dataset: { token },
          "data-lm-suppress-shortcuts": "true",
        }),
      ),
    );
    picked = -1;
  };
  const tint = (shares, colour = "var(--pc-accent)") => {
    [...box.children].forEach((node, i) => {
      const share = Math.max(0, Math.min(1, shares?.[i] ?? 0));
      node.style.background =
        share > 0.004
          ? `color-mix(in srgb, ${typeof colour === "function" ? colour(i) : colour} ${Math.round(share * 72)}%, transparent)`
          : "";
    });
  };
  const mark = (i) => {
    box.children[picked]?.classList.remove("pc-picked");
    box.children[picked]?.setAttribute("aria-selected", "false");
    picked = i;
    for (const node of box.children) node.tabIndex = -1;
    const node = box.children[i] ?? box.lastElementChild;
    if (!node) return;
    node.tabIndex = 0;
    if (box.children[i]) {
      node.classList.add("pc-picked");
      node.setAttribute("aria-selected", "true");
    }
  };
  const read = (i) => {
    for (const [k, node] of [...box.children].entries()) node.classList.toggle("pc-read", k === i);
  };
  return Object.assign(box, { put, tint, mark, read });
}

function readColour(node, name) {
  const text = getComputedStyle(node).getPropertyValue(name).trim();
  const hex = /^#([0-9a-f]{6})$/i.exec(text);
  return hex ? [0, 2, 4].map((i) => parseInt(hex[1].slice(i, i + 2), 16)) : [63, 127, 224];
}

/** Paint shares in 0..1 (rows x cols) on a canvas, one pixel each, in the accent colour; the root of a share is its ink. */
export function paintHeat(canvas, shares, rows, cols, variable = "--pc-accent") {
  const [r, g, b] = readColour(canvas, variable);
  canvas.width = cols;
  canvas.height = rows;
  const context = canvas.getContext("2d"),
    image = context.createImageData(cols, rows);
  for (let i = 0; i < rows * cols; i++) {
    image.data.set(
      [r, g, b, Math.round(255 * Math.sqrt(Math.max(0, Math.min(1, shares[i]))))],
      i * 4,
    );
  }
  context.putImageData(image, 0, 0);
}

/** Rows of a label, a bar and a number; `before` draws a thin mark where the bar was. Shares in 0..1. */
export function shareBars(box, rows, { pick, chosen } = {}) {
  box.replaceChildren(
    ...rows.map(({ label, value, before, title }) =>
      h(
        pick ? "button" : "div",
        {
          class: "pc-share",
          type: pick && "button",
          title,
          "aria-pressed": pick && String(label === chosen),
          onclick: pick && (() => pick(label)),
        },
        h("span", { class: "pc-mono pc-share-label", text: label }),
        h(
          "span",
          { class: "pc-share-track" },
          h("span", { class: "pc-share-fill", style: { width: `${Math.max(0.4, value * 100)}%` } }),
          before !== undefined &&
            h("span", { class: "pc-share-before", style: { left: `${before * 100}%` } }),
        ),
        h("span", { class: "pc-value pc-share-value", text: percent(value) }),
      ),
    ),
  );
}

/** Say why there is nothing to see, if so; true if a view must not draw. */
export function complain(root, data) {
  const card = root.querySelector(".pc-card");
  let said = root.querySelector(":scope .pc-complaint");
  if (!said) card.prepend((said = h("div", { class: "pc-error pc-complaint", role: "alert" })));
  said.textContent = data.problem ?? "";
  said.hidden = !data.problem;
  for (const node of card.children)
    if (node !== said && !node.matches("[data-keep]"))
      node.classList.toggle("pc-away", Boolean(data.problem));
  return Boolean(data.problem);
}

/** Call work when the theme of the widget changes. */
export function onTheme(root, later, work) {
  const watch = new MutationObserver(work);
  watch.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  later(() => watch.disconnect());
}

/** A card behind a summary, if the view has `opened`: Python works for it only once it is open. */
export function card({ model, root }, title, ...children) {
  const inner = h("div", { class: "pc-card pc-stack" }, ...children);
  if (!title) return root.append(inner);
  const fold = h(
    "details",
    {
      class: "pc-more",
      ontoggle: () => {
        model.set("opened", fold.open);
        model.save_changes();
      },
    },
    h("summary", { text: title }),
    inner,
  );
  fold.open = model.get("opened");
  root.append(fold);
}
