// Markdown to DOM nodes. Model text only ever becomes text nodes: no HTML string is built or parsed, no image is
// loaded, and a link is one only where its address is http, https or mailto.

import { h } from "./kit.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/,
  HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/,
  ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/,
  QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;

/** Cut a text into blocks, each the lines of one paragraph, list, fence and so on. */
export function splitBlocks(text) {
  const blocks = [],
    lines = text.replace(/\r\n?/g, "\n").split("\n");
  let at = 0;
  const take = (kind, good) => {
    const start = at;
    while (at < lines.length && good(lines[at], at - start)) at++;
    blocks.push({ kind, source: lines.slice(start, at).join("\n") });
  };
  while (at < lines.length) {
    const line = lines[at],
      fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const close = new RegExp(`^ {0,3}[${fence[1][0]}]{${fence[1].length},}\\s*$`);
      let open = true;
      take("code", (next, i) => open && ((open = i === 0 || !close.test(next)), true));
    } else if (HEADING.test(line)) take("heading", (_, i) => i === 0);
    else if (RULE.test(line)) take("rule", (_, i) => i === 0);
    else if (QUOTE.test(line)) take("quote", (next) => QUOTE.test(next));
    else if (ITEM.test(line)) take("list", (next) => ITEM.test(next) || /^\s+\S/.test(next));
    else if (line.includes("|") && TABLE.test(lines[at + 1] ?? ""))
      take("table", (next) => next.includes("|"));
    else
      take(
        "text",
        (next, i) =>
          i === 0 ||
          Boolean(
            next.trim() &&
            !FENCE.test(next) &&
            !HEADING.test(next) &&
            !ITEM.test(next) &&
            !QUOTE.test(next) &&
            !RULE.test(next),
          ),
      );
  }
  return blocks;
}

/** Draw one block. */
export function drawBlock({ kind, source }) {
  const lines = source.split("\n");
  if (kind === "code") {
    const [, mark, name] = FENCE.exec(lines[0]),
      body = lines.slice(1);
    if (body.length && new RegExp(`^ {0,3}[${mark[0]}]{${mark.length},}\\s*$`).test(body.at(-1)))
      body.pop();
    return h(
      "pre",
      { class: "pc-md-code", dataset: { name: name.trim() } },
      h("code", { text: body.join("\n") }),
    );
  }
  if (kind === "heading") {
    const [, marks, rest] = HEADING.exec(source);
    return h(
      "div",
      {
        class: "pc-md-heading",
        role: "heading",
        "aria-level": Math.min(6, marks.length + 2),
        dataset: { level: marks.length },
      },
      ...drawInline(rest),
    );
  }
  if (kind === "rule") return h("hr");
  if (kind === "quote")
    return h("blockquote", {}, ...drawText(lines.map((line) => QUOTE.exec(line)[1]).join("\n")));
  if (kind === "list") return drawList(lines);
  if (kind === "table") {
    const cells = (line) =>
      line
        .trim()
        .replace(/^\||\|$/g, "")
        .split("|")
        .map((cell) => cell.trim());
    const row = (line, tag) =>
      h("tr", {}, ...cells(line).map((cell) => h(tag, {}, ...drawInline(cell))));
    return h(
      "table",
      { class: "pc-table" },
      h("thead", {}, row(lines[0], "th")),
      h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))),
    );
  }
  return h("p", {}, ...drawText(source));
}

function drawList(lines) {
  const first = ITEM.exec(lines[0]),
    ordered = /\d/.test(first[2]),
    indent = first[1].length,
    items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent + 1) items.push({ text: [item[3]], below: [] });
    else if (item || items.at(-1).below.length) items.at(-1).below.push(line);
    else items.at(-1).text.push(line.trim());
  }
  return h(
    ordered ? "ol" : "ul",
    { start: ordered ? Number.parseInt(first[2], 10) : undefined },
    ...items.map(({ text, below }) =>
      h(
        "li",
        {},
        ...drawText(text.join("\n")),
        below.length
          ? ITEM.test(below[0])
            ? drawList(below)
            : h("p", {}, ...drawText(below.join("\n")))
          : null,
      ),
    ),
  );
}

function drawText(text) {
  return text
    .split("\n")
    .flatMap((line, i) => (i ? [h("br"), ...drawInline(line)] : drawInline(line)));
}

// Each form with the text inside it; tried in this order at each place.
const INLINE = new RegExp(
  [
    /\\([\\`*_{}[\]()#+\-.!~>|])/,
    /(?<!`)(`+)(?!`)(.+?)(?<!`)\2(?!`)/,
    /!\[([^\][]*)\]\([^()\s]*\)/,
    /\[([^\][]+)\]\(([^()\s]+)\)/,
    /\*\*(?=\S)((?:(?!\*\*).)+)\*\*/,
    /~~(?=\S)((?:(?!~~).)+)~~/,
    /\*(?=[^\s*])([^*]+)\*/,
    /(?<![\p{L}\p{N}_])_(?=\S)([^_]+)_(?![\p{L}\p{N}_])/,
    /\b(https?:\/\/[^\s<>"'`)\]]+)/,
  ]
    .map((form) => form.source)
    .join("|"),
  "gu",
);

/** Draw a line's emphasis, code and links. */
export function drawInline(text, depth = 0) {
  const nodes = [];
  let at = 0;
  for (const found of depth > 4 ? [] : text.matchAll(INLINE)) {
    const [all, escaped, , code, image, name, url, strong, gone, soft, under, bare] = found;
    nodes.push(text.slice(at, found.index));
    at = found.index + all.length;
    if (escaped !== undefined) nodes.push(escaped);
    else if (code !== undefined) nodes.push(h("code", { class: "pc-md-inline", text: code }));
    else if (image !== undefined)
      nodes.push(h("span", { class: "pc-muted", text: `[image: ${image || "without a name"}]` }));
    else if (url !== undefined) nodes.push(drawLink(url, drawInline(name, depth + 1), all));
    else if (bare !== undefined) nodes.push(drawLink(bare, [bare], all));
    else if (strong !== undefined) nodes.push(h("strong", {}, ...drawInline(strong, depth + 1)));
    else if (gone !== undefined) nodes.push(h("s", {}, ...drawInline(gone, depth + 1)));
    else nodes.push(h("em", {}, ...drawInline(soft ?? under, depth + 1)));
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

function drawLink(url, inside, source) {
  let safe = null;
  try {
    safe = new URL(url);
  } catch {
    /* a relative or broken address */
  }
  if (!safe || !["http:", "https:", "mailto:"].includes(safe.protocol)) return source;
  return h(
    "a",
    { href: safe.href, title: safe.href, target: "_blank", rel: "noopener noreferrer nofollow" },
    ...inside,
  );
}

/** Draw a text into a box, leaving alone the blocks that are as they were; cheap while a text grows. */
export function drawMarkdown(box, text) {
  const blocks = splitBlocks(text),
    drawn = box.pcBlocks ?? [];
  let same = 0;
  while (
    same < blocks.length &&
    same < drawn.length &&
    blocks[same].source === drawn[same].source &&
    blocks[same].kind === drawn[same].kind
  )
    same++;
  while (box.childNodes.length > same) box.lastChild.remove();
  box.append(...blocks.slice(same).map(drawBlock));
  box.pcBlocks = blocks;
}
