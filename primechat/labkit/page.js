// What stands in for a notebook in a page: each widget's model remembers its state and asks nobody.
const data = JSON.parse(document.getElementById("lab").textContent);
const modules = new Map();

function revive(value) {
  if (Array.isArray(value)) return value.map(revive);
  if (value === null || typeof value !== "object") return value;
  const keys = Object.keys(value);
  if (keys.length === 1 && keys[0] === "base64") {
    const bytes = Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
    return new DataView(bytes.buffer);
  }
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, revive(part)]));
}

function makeModel(state) {
  const heard = new Map(),
    changed = new Set();
  const tell = (event, ...given) =>
    [...(heard.get(event) ?? [])].forEach((react) => react(...given));
  return {
    get: (name) => state[name],
    set: (name, value) => {
      if (state[name] !== value) {
        state[name] = value;
        changed.add(name);
      }
    },
    save_changes: () => {
      const names = [...changed];
      changed.clear();
      names.forEach((name) => tell(`change:${name}`, undefined, state[name]));
      if (names.length) tell("change");
    },
    on: (event, react) => heard.set(event, [...(heard.get(event) ?? []), react]),
    off: (event, react) =>
      heard.set(event, react ? (heard.get(event) ?? []).filter((one) => one !== react) : []),
    send: (message) =>
      setTimeout(() =>
        tell(
          "msg:custom",
          { re: message?.id, error: "This page is a picture: open the lab itself to change this." },
          [],
        ),
      ),
  };
}

async function load(kind) {
  if (!modules.has(kind)) {
    const blob = new Blob([data.kinds[kind].script], { type: "text/javascript" });
    modules.set(kind, import(URL.createObjectURL(blob)));
  }
  const found = (await modules.get(kind)).default;
  return typeof found === "function" ? found() : found;
}

for (const place of document.querySelectorAll("[data-widget]")) {
  const { kind, state } = data.widgets[Number(place.dataset.widget)];
  const root = place.attachShadow({ mode: "open" }),
    looks = document.createElement("style"),
    el = document.createElement("div");
  looks.textContent = data.kinds[kind].looks;
  root.append(looks, el);
  const model = makeModel(revive(state));
  try {
    const widget = await load(kind);
    await widget.initialize?.({ model });
    await widget.render({ model, el });
  } catch (error) {
    console.error(kind, error);
    el.textContent = "This part could not be drawn.";
  }
}

const theme = matchMedia("(prefers-color-scheme: dark)"),
  page = document.querySelector(".page");
const follow = () => {
  page.dataset.theme = theme.matches ? "dark" : "light";
};
theme.addEventListener("change", follow);
follow();
