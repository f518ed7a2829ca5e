// What every widget's script shares: elements, controls, the page's theme, and less traffic.

/** Make an element. Props: class, text, style (object), dataset, on<event>, else attributes. Text is never HTML. */
export function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key === "style" && typeof value === "object") {
      for (const [name, part] of Object.entries(value)) {
        if (name.startsWith("--")) node.style.setProperty(name, part);
        else node.style[name] = part;
      }
    } else if (key === "dataset") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "value") node.value = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(
    ...children.flat().filter((child) => child !== undefined && child !== null && child !== false),
  );
  return node;
}

/** The page's theme: marimo, JupyterLab, VS Code, else the system's wish. */
export function readTheme() {
  const body = document.body,
    page = document.documentElement;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false" ? "dark" : "light";
  if (body.dataset.vscodeThemeKind)
    return body.dataset.vscodeThemeKind.includes("dark") ? "dark" : "light";
  for (const node of [body, page]) {
    const named =
      node.dataset.theme ??
      (node.classList.contains("dark") ? "dark" : node.classList.contains("light") ? "light" : "");
    if (named) return named.includes("dark") ? "dark" : "light";
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/**
 * Begin a widget: a root in the page's theme inside el, `listen` for traits, and `end` to return from render.
 * One of which only a part shows the answer to a guess is seen at once, and asks `whenGuessed` about that part.
 */
export function frame({ model, el }, name, { partly = false } = {}) {
  const root = h("div", { class: `pc pc-${name}`, dataset: { theme: readTheme() } });
  const undo = [];
  const follow = () => {
    root.dataset.theme = readTheme();
  };
  const watch = new MutationObserver(follow);
  for (const node of [document.body, document.documentElement]) {
    watch.observe(node, {
      attributes: true,
      attributeFilter: ["class", "data-theme", "data-jp-theme-light", "data-vscode-theme-kind"],
    });
  }
  const wish = matchMedia("(prefers-color-scheme: dark)");
  wish.addEventListener("change", follow);
  undo.push(
    () => watch.disconnect(),
    () => wish.removeEventListener("change", follow),
  );
  const listen = (names, react) => {
    for (const trait of [names].flat()) {
      model.on(`change:${trait}`, react);
      undo.push(() => model.off(`change:${trait}`, react));
    }
  };
  const later = (work) => undo.push(work);
  el.replaceChildren(root);
  setTimeout(() => root.closest(".jp-Notebook")?.classList.add("pc-notebook")); // its text is then set as kit.css says
  if (model.get("gate") && !partly) {
    const gate = waitForGuess(root, model.get("gate"), later);
    el.prepend(gate);
    undo.push(() => gate.remove());
  }
  const looks = model.get("_css");
  const end = () => {
    undo.forEach((work) => work());
    outlive(root, looks);
  };
  return { root, listen, later, end };
}

const ALONE_MS = 4000; // for which a widget stands there without Python before it says so

/**
 * Keep a widget in its looks that Python has let go of while its cell, or one before it, runs again: marimo leaves
 * it there until the new one comes, and takes its style away. Where a cell of imports alone runs again, marimo
 * closes the widgets of the cells that use them and does not run those: then nothing comes by itself.
 */
function outlive(root, looks) {
  if (!root.isConnected) return;
  root.prepend(h("style", { text: looks ?? "" }));
  root.dataset.over = "true";
  setTimeout(() => {
    if (root.isConnected)
      root.prepend(
        h("p", {
          class: "pc-muted",
          role: "status",
          text: "This waits for its cell to run again. If nothing moves, run the cell yourself.",
        }),
      );
  }, ALONE_MS);
}

/** A widget of several kinds: what draws each, by the trait `kind`. */
export function ofKinds(kinds) {
  return {
    render({ model, el }) {
      const kind = model.get("kind"),
        inside = frame({ model, el }, kind);
      kinds[kind]({ model, ...inside });
      return inside.end;
    },
  };
}

/** Hide a widget until the prediction with this question is answered; return what stands there until then. */
function waitForGuess(root, question, later) {
  const open = () => {
    gate.hidden = true;
    root.hidden = false;
  };
  const gate = h(
    "div",
    { class: "pc", dataset: { theme: root.dataset.theme } },
    h(
      "div",
      { class: "pc-row" },
      h("span", {
        class: "pc-muted",
        text: "This shows the answer: guess above first, and it opens.",
      }),
      button("Open it now", open),
    ),
  );
  const watch = new MutationObserver(() => {
    gate.dataset.theme = root.dataset.theme;
  });
  watch.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  later(() => watch.disconnect());
  root.hidden = true;
  whenGuessed(question, open, later);
  return gate;
}

/** Do something once the prediction with this question is answered; at once where it is, or where there is none. */
export function whenGuessed(question, work, later) {
  const look = () => {
    if (
      !question ||
      [...(window.primechatScores?.values() ?? [])].some((entry) => entry.question === question)
    )
      work();
  };
  window.addEventListener("primechat-score", look);
  later(() => window.removeEventListener("primechat-score", look));
  look();
}

/** The same with half an emoji replaced, alone or in what is nested: JSON can hold none, so no host would pass it on. */
export function whole(value) {
  if (typeof value === "string") return value.replace(/\p{Surrogate}/gu, "\ufffd");
  if (Array.isArray(value)) return value.map(whole);
  if (value === null || value === undefined || Object.getPrototypeOf(value) !== Object.prototype)
    return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, whole(part)]));
}

/** Set traits and send them; what has not changed is not sent. */
export function commit(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, whole(value));
  model.save_changes();
}

/** Return `ask(name, given)`: it calls the widget's Python method `answer_<name>` and promises its answer. */
export function asking(model, later) {
  const open = new Map(),
    mine = Math.random().toString(36).slice(2);
  let count = 0;
  const hear = (message) => open.get(message?.re)?.(message);
  model.on("msg:custom", hear);
  later(() => model.off("msg:custom", hear));
  return (name, given = {}, wait_ms = 30000) =>
    new Promise((resolve, reject) => {
      const id = `${mine}-${count++}`;
      const end = setTimeout(() => {
        open.delete(id);
        reject(
          Object.assign(
            new Error("Python does not answer. If the notebook is running, reload this page."),
            { silent: true },
          ),
        );
      }, wait_ms);
      open.set(id, (message) => {
        clearTimeout(end);
        open.delete(id);
        if (message.error) reject(new Error(message.error));
        else resolve(message);
      });
      model.send({ ask: name, given: whole(given), id });
    });
}

/** Do something once, when a node first comes into sight; `later` takes what ends the watch. */
export function whenSeen(node, work, later) {
  const watch = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watch.disconnect();
      work();
    },
    { rootMargin: "200px" },
  );
  watch.observe(node);
  later(() => watch.disconnect());
}

/** Call at most once in ms, the last call always. */
export function throttle(work, ms) {
  let timer = 0,
    last = -Infinity,
    args = [];
  return (...given) => {
    args = given;
    const wait = last + ms - performance.now();
    if (timer) return;
    if (wait <= 0) {
      last = performance.now();
      work(...args);
    } else
      timer = setTimeout(() => {
        timer = 0;
        last = performance.now();
        work(...args);
      }, wait);
  };
}

/** Call once, ms after the last call. */
export function debounce(work, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...args), ms);
  };
}

/** A number as people write it: 12,345 or 0.123. */
export function number(value, digits = 0) {
  return Number(value).toLocaleString("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

export function button(text, onclick, { primary = false, title, disabled } = {}) {
  return h("button", {
    type: "button",
    class: primary ? "pc-button pc-primary" : "pc-button",
    text,
    title,
    disabled,
    onclick,
  });
}

/** A labelled slider; `input` hears each move. JupyterLab would swallow its arrow keys but for the data attribute. */
export function slider({ label, min, max, step = 1, value, input, show = String }) {
  const out = h("output", { class: "pc-value", text: show(value) });
  const bar = h("input", {
    type: "range",
    min,
    max,
    step,
    "aria-label": label,
    "data-lm-suppress-shortcuts": "true",
    oninput: () => {
      out.textContent = show(Number(bar.value));
      input(Number(bar.value));
    },
  });
  bar.value = String(value);
  const node = h(
    "label",
    { class: "pc-slider" },
    h("span", { class: "pc-label", text: label }),
    bar,
    out,
  );
  return Object.assign(node, {
    bar,
    put: (next) => {
      bar.value = String(next);
      out.textContent = show(Number(bar.value));
    },
  });
}

/** A labelled choice; options are [value, text] pairs or plain strings. */
export function select({ label, options, value, input }) {
  const box = h("select", {
    class: "pc-select",
    "aria-label": label,
    onchange: () => input(box.value),
  });
  const fill = (list, chosen) => {
    box.replaceChildren(
      ...list.map((entry) => {
        const [key, text] = Array.isArray(entry) ? entry : [entry, entry];
        return h("option", { value: key, text });
      }),
    );
    box.value = chosen;
  };
  fill(options, value);
  const node = h(
    "label",
    { class: "pc-field" },
    h("span", { class: "pc-label", text: label }),
    box,
  );
  return Object.assign(node, { box, fill });
}

/** What a choice of models has in the place of the by-products of labs until it is chosen. */
export const MORE = "more";

/** The models of a choice: by-products of labs, which are many, only where `all` is set or one is chosen. */
export function listModels(models, chosen, all) {
  const shown = models.filter(
    (entry) => all || !entry.by_product || [chosen].flat().includes(entry.identifier),
  );
  const left = models.length - shown.length;
  const options = shown.map((entry) => [entry.identifier, entry.identifier]);
  return left
    ? [...options, [MORE, `more: ${left} by-product${left > 1 ? "s" : ""} of labs …`]]
    : options;
}

/** A labelled switch. */
export function toggle({ label, value, input }) {
  const box = h("input", {
    type: "checkbox",
    "data-lm-suppress-shortcuts": "true",
    onchange: () => input(box.checked),
  });
  box.checked = Boolean(value);
  return Object.assign(h("label", { class: "pc-toggle" }, box, h("span", { text: label })), {
    box,
  });
}

/** A row of choices of which one is on; arrow keys move between them. */
export function tabs({ label, options, value, input }) {
  const row = h("div", { class: "pc-tabs", role: "tablist", "aria-label": label });
  const put = (chosen) => {
    for (const tab of row.children) {
      const on = tab.dataset.value === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
  };
  for (const [key, text] of options) {
    row.append(
      h("button", {
        type: "button",
        role: "tab",
        class: "pc-tab",
        text,
        dataset: { value: key },
        "data-lm-suppress-shortcuts": "true",
        onclick: () => {
          put(key);
          input(key);
        },
        onkeydown: (event) => {
          const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
          if (!step) return;
          event.preventDefault();
          const all = [...row.children],
            next = all[(all.indexOf(event.currentTarget) + step + all.length) % all.length];
          next.focus();
          next.click();
        },
      }),
    );
  }
  put(value);
  return Object.assign(row, { put });
}

/** A part that stands behind "more". */
export function more(title, ...children) {
  return h("details", { class: "pc-more" }, h("summary", { text: title }), ...children);
}

/** Plain words with `code` and **bold**, as nodes; nothing is read as HTML. */
export function phrase(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (part.startsWith("`") && part.length > 2)
      return h("code", { class: "pc-mono", text: part.slice(1, -1) });
    if (part.startsWith("**") && part.length > 4) return h("strong", { text: part.slice(2, -2) });
    return part;
  });
}

/** The same in paragraphs, parted by empty lines. */
export function prose(text) {
  return text.split(/\n{2,}/).map((block) => h("p", { class: "pc-prose" }, ...phrase(block)));
}
