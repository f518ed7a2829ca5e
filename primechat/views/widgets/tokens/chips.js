// Where the tokens of a text stand: borders between characters as people see them, chips, colours, marks.

export const TINTS = 5;
const SLICE = 512;
const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
const knownWords = new Map();
const utf8 = new TextEncoder();

/** 1 where a character as people see it begins, for each UTF-16 offset of the text. */
export function findBorders(text) {
  const borders = new Uint8Array(text.length + 1).fill(1);
  for (const { 0: word, index } of text.matchAll(/\S+/g)) {
    if (!/[^\x00-\x7f]/.test(word)) continue; // in the pattern itself, a long word would take the square of its length
    let inner = knownWords.get(word);
    if (!inner) {
      inner = [];
      for (let at = 0, next; at < word.length; at = next) {
        // in slices: of a long text, as Chinese is, the segmenter takes the square too
        const slice = word.slice(at, at + SLICE).replace(/[\ud800-\udbff]$/, ""); // no half of a pair at its end
        next = at + (slice.length || 1);
        for (const { index: from, segment } of segmenter.segment(slice)) {
          if (from && at + from + segment.length === next && next < word.length)
            next = at + from; // it may go on: first of the next slice
          else for (let i = 1; i < segment.length; i++) inner.push(at + from + i);
        }
      }
      if (knownWords.size > 20000) knownWords.clear();
      knownWords.set(word, inner);
    }
    for (const i of inner) borders[index + i] = 0;
  }
  for (let i = text.indexOf("\r\n"); i >= 0; i = text.indexOf("\r\n", i + 2)) borders[i + 1] = 0;
  return borders;
}

/** How many characters as people see them. */
export function countCharacters(borders) {
  let count = -1;
  for (const border of borders) count += border;
  return Math.max(0, count);
}

/** The UTF-16 offset at which each token starts (one more for the end), and 1 where it starts inside a code point. */
export function placeTokens(text, sizes) {
  const n = sizes.length,
    starts = new Int32Array(n + 1).fill(text.length),
    inside = new Uint8Array(n + 1);
  let token = 0,
    edge = 0,
    byte = 0;
  for (let i = 0; i < text.length && token < n;) {
    const code = text.codePointAt(i),
      size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    while (token < n && edge < byte + size) {
      starts[token] = i;
      inside[token] = edge > byte ? 1 : 0;
      edge += sizes[token++];
    }
    byte += size;
    i += code > 0xffff ? 2 : 1;
  }
  return { starts, inside };
}

/** Chips: the shortest runs of tokens that begin and end between characters; {a, b} tokens, {from, to} offsets. */
export function groupTokens(text, sizes, borders = findBorders(text)) {
  const { starts, inside } = placeTokens(text, sizes),
    groups = [];
  let group = null;
  for (let t = 0; t < sizes.length; t++) {
    if (!group || (!inside[t] && borders[starts[t]]))
      groups.push((group = { a: t, b: t, from: starts[t], to: 0 }));
    group.b = t + 1;
    group.to = starts[t + 1];
    if (t + 1 < sizes.length && inside[t + 1]) group.to = text.length;
  }
  for (let i = 0; i + 1 < groups.length; i++) groups[i].to = groups[i + 1].from;
  if (groups.length) groups.at(-1).to = text.length;
  return groups;
}

/** Colours of a run of new tokens, so that neighbours differ and what stays keeps its own. */
export function tintRun(count, before, old, after) {
  const tints = [];
  for (let j = 0; j < count; j++) {
    const last = j === count - 1,
      left = j ? tints[j - 1] : before;
    let tint = old[j] ?? ((left ?? -1) + 1) % TINTS;
    for (let tries = 0; tries < TINTS && (tint === left || (last && tint === after)); tries++)
      tint = (tint + 1) % TINTS;
    tints.push(tint);
  }
  return tints;
}

/** The ground of a chip: one tint, or stripes where one character is several tokens. */
export function ground(tints) {
  if (tints.length === 1) return `var(--tint-${tints[0]})`;
  const stops = tints.map(
    (tint, i) =>
      `var(--tint-${tint}) ${(100 * i) / tints.length}% ${(100 * (i + 1)) / tints.length}%`,
  );
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

/** A text with its white space and control characters made visible. */
export function showSpaces(text) {
  return text
    .replace(/ /g, "·")
    .replace(/\t/g, "→")
    .replace(/\r?\n|\r/g, "↵")
    .replace(/\u00a0/g, "⍽")
    .replace(
      /[\x00-\x08\x0b-\x1f\x7f]/g,
      (char) => `<${char.charCodeAt(0).toString(16).padStart(2, "0")}>`,
    );
}

/** Bytes as people write them: f0 9f a7 91. */
export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

/** A token's bytes as text where they are whole characters, else in hex between angle brackets. */
export function readBytes(bytes) {
  try {
    return showSpaces(
      new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes)),
    );
  } catch {
    return `<${hex(bytes)}>`;
  }
}

export function encodeText(text) {
  return utf8.encode(text);
}
