// A scatter of many points: WebGL where there is one, else pixels on a 2-D canvas; labels and marks on a layer above.

import { h } from "./kit.js";

const VERTEX = `
attribute vec3 from, to; attribute vec4 colour; attribute float rank;
uniform mat3 turn; uniform vec3 center; uniform vec2 scale; uniform float mixed, size, deep;
varying vec4 tint; varying float wide;
void main() {
  vec3 p = turn * (mix(from, to, mixed) - center);
  gl_Position = vec4(p.xy * scale, deep > 0.5 ? -p.z * 0.2 : 0.5 - rank * 0.1, 1.0);
  float near = deep > 0.5 ? 1.0 + 0.35 * clamp(p.z, -1.0, 1.0) : 1.0;
  wide = size * near * (rank > 1.5 ? 1.9 : rank > 0.5 ? 1.0 : 0.8);
  gl_PointSize = wide;
  float seen = (rank > 0.5 ? 1.0 : 0.14) * (deep > 0.5 ? 0.75 + 0.25 * clamp(p.z, -1.0, 1.0) : 1.0);
  tint = vec4(colour.rgb, colour.a * seen);
}`;
const FRAGMENT = `
precision mediump float; varying vec4 tint; varying float wide;
void main() {
  float r = length(gl_PointCoord - 0.5) * wide;
  float edge = clamp(wide * 0.5 - r + 0.5, 0.0, 1.0) * tint.a;
  if (edge < 0.02) discard;
  gl_FragColor = vec4(tint.rgb * edge, edge);
}`;

/** Draw by WebGL; null where the page has none. */
function openPainter(canvas) {
  const gl = canvas.getContext("webgl", {
    antialias: false,
    premultipliedAlpha: true,
    alpha: true,
  });
  if (!gl) return null;
  const program = gl.createProgram();
  for (const [kind, code] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, code);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
  gl.useProgram(program);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const at = (name) => gl.getUniformLocation(program, name);
  const where = Object.fromEntries(
    ["turn", "center", "scale", "mixed", "size", "deep"].map((name) => [name, at(name)]),
  );
  const slot = Object.fromEntries(
    ["from", "to", "colour", "rank"].map((name) => [name, gl.getAttribLocation(program, name)]),
  );
  const buffers = new Map();
  const upload = (data) => {
    let held = buffers.get(data);
    if (!held) {
      held = gl.createBuffer();
      buffers.set(data, held);
      gl.bindBuffer(gl.ARRAY_BUFFER, held);
      gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    }
    gl.bindBuffer(gl.ARRAY_BUFFER, held);
  };
  const bind = (name, data, parts, type, whole) => {
    upload(data);
    gl.enableVertexAttribArray(slot[name]);
    gl.vertexAttribPointer(slot[name], parts, type, whole, 0, 0);
  };
  return {
    name: "WebGL",
    lost: () => gl.isContextLost(),
    draw({
      from,
      to,
      mixed,
      colours,
      ranks,
      count,
      turn,
      center,
      scale,
      size,
      deep,
      width,
      height,
      ratio,
    }) {
      const used = new Set([from, to, colours, ranks]);
      for (const [data, held] of buffers)
        if (!used.has(data) && buffers.size > 40) {
          gl.deleteBuffer(held);
          buffers.delete(data);
        }
      gl.viewport(0, 0, width * ratio, height * ratio);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      bind("from", from, 3, gl.FLOAT, false);
      bind("to", to, 3, gl.FLOAT, false);
      bind("colour", colours, 4, gl.UNSIGNED_BYTE, true);
      bind("rank", ranks, 1, gl.UNSIGNED_BYTE, false);
      gl.uniformMatrix3fv(where.turn, false, turn);
      gl.uniform3fv(where.center, center);
      gl.uniform2f(where.scale, (2 * scale) / width, (2 * scale) / height);
      gl.uniform1f(where.mixed, mixed);
      gl.uniform1f(where.size, size * ratio);
      gl.uniform1f(where.deep, deep ? 1 : 0);
      gl.drawArrays(gl.POINTS, 0, count);
    },
    finish: () => gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)), // waits, as gl.finish need not
    end: () => gl.getExtension("WEBGL_lose_context")?.loseContext(),
  };
}

/** Draw pixel by pixel: slower, but every browser has it. */
function openStamper(canvas) {
  const pen = canvas.getContext("2d");
  return {
    name: "canvas",
    lost: () => false,
    draw({ colours, ranks, count, xs, ys, size, width, height, ratio }) {
      const w = Math.round(width * ratio),
        tall = Math.round(height * ratio);
      const image = pen.createImageData(Math.max(1, w), Math.max(1, tall)),
        data = image.data;
      const dots = [0.8, 1, 1.9].map((grow) => {
        const r = Math.max(0.5, (size * ratio * grow) / 2),
          reach = Math.ceil(r),
          dot = [];
        for (let y = -reach; y <= reach; y++)
          for (let x = -reach; x <= reach; x++) {
            const cover = Math.min(1, Math.max(0, r - Math.hypot(x, y) + 0.5));
            if (cover > 0.05) dot.push([x, y, cover]);
          }
        return dot;
      });
      for (const pass of [0, 1, 2])
        for (let i = 0; i < count; i++) {
          if (ranks[i] !== pass) continue;
          const px = Math.round(xs[i] * ratio),
            py = Math.round(ys[i] * ratio);
          if (px < -9 || py < -9 || px > w + 9 || py > tall + 9) continue;
          const alpha = (colours[4 * i + 3] / 255) * (pass ? 1 : 0.14);
          for (const [dx, dy, cover] of dots[pass]) {
            const x = px + dx,
              y = py + dy;
            if (x < 0 || y < 0 || x >= w || y >= tall) continue;
            const o = 4 * (y * w + x),
              a = alpha * cover,
              below = data[o + 3] / 255,
              all = a + below * (1 - a);
            for (let c = 0; c < 3; c++)
              data[o + c] = (colours[4 * i + c] * a + data[o + c] * below * (1 - a)) / all;
            data[o + 3] = 255 * all;
          }
        }
      pen.putImageData(image, 0, 0);
    },
    finish: () => {},
    end: () => {},
  };
}

const EASE = (t) => t * t * (3 - 2 * t);
const STILL = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Make a scatter. It calls hover(i), pick(i), lasso(ids), hint(text), and asks decorate() for what to write and mark. */
export function makeScatter({ hover, pick, lasso, hint, decorate, label }) {
  let canvas = h("canvas", { class: "pc-scatter-points" });
  const layer = h("canvas", { class: "pc-scatter-layer" });
  const node = h(
    "div",
    {
      class: "pc-scatter",
      tabindex: 0,
      role: "application",
      "aria-label": label,
      "data-lm-suppress-shortcuts": "true",
    },
    canvas,
    layer,
  );
  const pen = layer.getContext("2d");
  let painter = null,
    count = 0,
    frames = [new Float32Array(0)],
    colours = new Uint8Array(0),
    ranks = new Uint8Array(0);
  let xs = new Float32Array(0),
    ys = new Float32Array(0),
    zs = new Float32Array(0),
    stale = true;
  let time = 0,
    tween = null,
    morph = null,
    deep = false,
    mode = "pan",
    path = null,
    wanted = 0,
    over = -1;
  let width = 1,
    height = 1,
    ratio = 1,
    scale = 1,
    yaw = 0.5,
    pitch = 0.35;
  let reach = [1, 1];
  const center = new Float32Array(3),
    turn = new Float32Array(9);
  const spent = { draw_ms: [], frames: 0 };

  function measure() {
    width = Math.max(1, node.clientWidth);
    height = Math.max(1, node.clientHeight);
    ratio = Math.min(2, window.devicePixelRatio || 1);
    for (const item of [canvas, layer]) {
      const [w, tall] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (item.width !== w || item.height !== tall) {
        item.width = w;
        item.height = tall;
      }
    }
  }
  const unit = () =>
    0.45 * (deep ? Math.min(width, height) : Math.min(width / reach[0], height / reach[1]));
  const pixels = () => scale * unit();
  function turned() {
    // columns of the rotation, as WebGL takes them
    const [a, b, c, d] = deep
      ? [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)]
      : [1, 0, 1, 0];
    turn.set([a, b * d, -b * c, 0, c, d, b, -a * d, a * c]);
    return turn;
  }
  function between() {
    if (morph) return { from: morph.from, to: morph.to, mixed: EASE(Math.min(1, morph.t)) };
    const low = Math.min(Math.floor(time), frames.length - 1),
      high = Math.min(low + 1, frames.length - 1);
    return { from: frames[low], to: frames[high], mixed: EASE(time - low) };
  }
  /** Where each point is on the screen, in CSS pixels. */
  function project() {
    if (!stale) return;
    stale = false;
    const { from, to, mixed } = between(),
      k = pixels(),
      m = turned(),
      keep = 1 - mixed;
    for (let i = 0, j = 0; i < count; i++, j += 3) {
      const x = from[j] * keep + to[j] * mixed - center[0];
      const y = from[j + 1] * keep + to[j + 1] * mixed - center[1];
      const z = from[j + 2] * keep + to[j + 2] * mixed - center[2];
      xs[i] = width / 2 + k * (m[0] * x + m[3] * y + m[6] * z);
      ys[i] = height / 2 - k * (m[1] * x + m[4] * y + m[7] * z);
      zs[i] = m[2] * x + m[5] * y + m[8] * z;
    }
  }
  function current() {
    const { from, to, mixed } = between(),
      out = new Float32Array(count * 3);
    for (let j = 0; j < out.length; j++) out[j] = from[j] * (1 - mixed) + to[j] * mixed;
    return out;
  }
  function invalidate(moved = true) {
    if (moved) stale = true;
    if (!wanted) wanted = requestAnimationFrame(draw);
  }
  function paint() {
    if (!painter) {
      painter = openPainter(canvas);
      if (!painter) {
        const other = h("canvas", { class: "pc-scatter-points" });
        canvas.replaceWith(other);
        canvas = other;
        measure();
        painter = openStamper(canvas);
      }
      node.dataset.painter = painter.name;
    }
    if (painter.name !== "WebGL") project();
    const size = Math.max(
      2.4,
      Math.min(
        9,
        (count > 20000 ? 3 : count > 5000 ? 4 : count > 400 ? 5.5 : 8) * Math.sqrt(scale) ** 0.8,
      ),
    );
    painter.draw({
      ...between(),
      colours,
      ranks,
      count,
      turn: turned(),
      center,
      scale: pixels(),
      size,
      deep,
      width,
      height,
      ratio,
      xs,
      ys,
    });
  }
  function draw(now) {
    wanted = 0;
    let again = false;
    if (morph) {
      morph.t += Math.max(0, Math.min(0.1, (now - (morph.last ?? now)) / 700));
      morph.last = now;
      stale = again = true;
      if (morph.t >= 1) morph = null;
    }
    if (tween) {
      const t = Math.max(0, Math.min(1, (now - tween.start) / tween.ms)); // a frame's time may lie before the start
      time = tween.a + (tween.b - tween.a) * t;
      stale = again = true;
      if (t >= 1) {
        const done = tween.done;
        tween = null;
        done?.();
      }
    }
    measure();
    const begin = performance.now();
    if (painter?.lost()) {
      painter = null;
      const other = h("canvas", { class: "pc-scatter-points" });
      canvas.replaceWith(other);
      canvas = other;
      measure();
    }
    paint();
    write();
    spent.draw_ms.push(performance.now() - begin);
    if (spent.draw_ms.length > 500) spent.draw_ms.shift();
    spent.frames++;
    if (again) invalidate();
  }

  // ---- the layer above: lines, rings, labels, the lasso

  const widths = new Map();
  function wide(text, font) {
    const key = font + text;
    let value = widths.get(key);
    if (value === undefined) {
      if (widths.size > 20000) widths.clear();
      value = pen.measureText(text).width;
      widths.set(key, value);
    }
    return value;
  }
  function write() {
    project();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const look = decorate();
    for (const { a, b, colour } of look.lines) {
      pen.strokeStyle = colour;
      pen.globalAlpha = 0.55;
      pen.lineWidth = 1.2;
      pen.beginPath();
      pen.moveTo(xs[a], ys[a]);
      pen.lineTo(xs[b], ys[b]);
      pen.stroke();
    }
    pen.globalAlpha = 1;
    for (const { i, colour, radius, thick = 2 } of look.rings) {
      pen.strokeStyle = colour;
      pen.lineWidth = thick;
      pen.beginPath();
      pen.arc(xs[i], ys[i], radius, 0, 7);
      pen.stroke();
    }
    const taken = new Map(),
      cell = 24;
    const free = (x0, y0, x1, y1) => {
      const spots = [];
      for (let gx = Math.floor(x0 / cell); gx <= Math.floor(x1 / cell); gx++)
        for (let gy = Math.floor(y0 / cell); gy <= Math.floor(y1 / cell); gy++) {
          const spot = gx * 10007 + gy;
          for (const box of taken.get(spot) ?? [])
            if (x0 < box[2] && x1 > box[0] && y0 < box[3] && y1 > box[1]) return false;
          spots.push(spot);
        }
      for (const spot of spots) {
        if (!taken.has(spot)) taken.set(spot, []);
        taken.get(spot).push([x0, y0, x1, y1]);
      }
      return true;
    };
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    const put = (i, { colour = look.ink, bold = false, force = false }) => {
      const x = xs[i],
        y = ys[i];
      if (x < 2 || y < 8 || x > width - 8 || y > height - 8) return false;
      const font = `${bold ? "600 14px" : "12.5px"} ${look.font}`;
      pen.font = font;
      const text = look.text(i),
        size = wide(text, font),
        right = x + 9 + size < width;
      const left = right ? x + 9 : x - 9 - size;
      if (!free(left - 2, y - 9, left + size + 2, y + 9) && !force) return false;
      pen.strokeStyle = look.paper;
      pen.lineWidth = 4;
      pen.strokeText(text, left, y);
      pen.fillStyle = colour;
      pen.fillText(text, left, y);
      return true;
    };
    for (const item of look.labels) put(item.i, item);
    let placed = 0,
      tried = 0;
    const room = Math.min(60, Math.floor((width * height) / 11000));
    for (const i of look.landmarks) {
      if (placed >= room || tried++ > 3000) break;
      if (ranks[i] && put(i, { colour: look.faint })) placed++;
    }
    if (path && path.length > 1) {
      pen.beginPath();
      path.forEach(([x, y], n) => (n ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.fillStyle = look.accent;
      pen.globalAlpha = 0.12;
      pen.fill();
      pen.globalAlpha = 1;
      pen.strokeStyle = look.accent;
      pen.lineWidth = 1.5;
      pen.setLineDash([5, 4]);
      pen.stroke();
      pen.setLineDash([]);
    }
  }

  // ---- what is under the pointer, inside a lasso, in front of the reader

  function nearest(x, y, within = 14) {
    project();
    let best = -1,
      least = within * within;
    for (let i = 0; i < count; i++) {
      const dx = xs[i] - x,
        dy = ys[i] - y;
      let far = dx * dx + dy * dy;
      if (far >= within * within) continue;
      if (!ranks[i]) far += 60; // what is dimmed gives way
      if (deep) far -= zs[i];
      if (far < least) {
        least = far;
        best = i;
      }
    }
    return best;
  }
  function inside(area) {
    project();
    const found = [];
    let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const [x, y] of area) {
      x0 = Math.min(x0, x);
      x1 = Math.max(x1, x);
      y0 = Math.min(y0, y);
      y1 = Math.max(y1, y);
    }
    for (let i = 0; i < count; i++) {
      const x = xs[i],
        y = ys[i];
      if (x < x0 || x > x1 || y < y0 || y > y1) continue;
      let odd = false;
      for (let n = 0, m = area.length - 1; n < area.length; m = n++) {
        const [ax, ay] = area[n],
          [bx, by] = area[m];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
      }
      if (odd) found.push(i);
    }
    return found;
  }
  function slide(dx, dy) {
    // in pixels; the map follows the hand
    const m = turned(),
      k = pixels();
    for (let axis = 0; axis < 3; axis++)
      center[axis] += (-dx * m[3 * axis] + dy * m[3 * axis + 1]) / k;
    invalidate();
  }
  function zoom(factor, x = width / 2, y = height / 2) {
    const next = Math.max(0.3, Math.min(400, scale * factor)),
      real = next / scale;
    slide((x - width / 2) * (1 / real - 1), (y - height / 2) * (1 / real - 1));
    scale = next;
    slide(0, 0);
  }
  function fit() {
    center.fill(0);
    scale = 1;
    [yaw, pitch] = [0.5, 0.35];
    invalidate();
  }
  /** Bring a point into view; zoom in if asked for. */
  function reveal(i, closer = false) {
    project();
    const margin = 60;
    if (
      !closer &&
      xs[i] > margin &&
      ys[i] > margin &&
      xs[i] < width - margin &&
      ys[i] < height - margin
    )
      return invalidate();
    const { from, to, mixed } = between();
    for (let axis = 0; axis < 3; axis++)
      center[axis] = from[3 * i + axis] * (1 - mixed) + to[3 * i + axis] * mixed;
    if (closer) scale = Math.max(scale, 4);
    invalidate();
  }

  // ---- hands and keys

  const place = (event) => {
    const box = layer.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * width) / box.width,
      ((event.clientY - box.top) * height) / box.height,
    ];
  };
  const hands = new Map();
  let moved = 0,
    spread = 0;
  layer.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    node.focus({ preventScroll: true });
    layer.setPointerCapture(event.pointerId);
    hands.set(event.pointerId, place(event));
    moved = 0;
    spread = 0;
    if (hands.size === 1 && (mode === "lasso" || event.shiftKey)) path = [place(event)];
    if (hands.size > 1) path = null;
    event.preventDefault();
  });
  layer.addEventListener("pointermove", (event) => {
    const now = place(event),
      before = hands.get(event.pointerId);
    if (!before) {
      const i = nearest(...now);
      if (i !== over) {
        over = i;
        hover(i, now);
        invalidate(false);
      } else if (i >= 0) hover(i, now);
      layer.style.cursor =
        mode === "lasso" || event.shiftKey ? "crosshair" : i >= 0 ? "pointer" : "grab";
      return;
    }
    hands.set(event.pointerId, now);
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    if (!path) moved += Math.hypot(dx, dy);
    if (hands.size === 2) {
      const [p, q] = [...hands.values()],
        gap = Math.hypot(p[0] - q[0], p[1] - q[1]);
      if (spread) zoom(gap / spread, (p[0] + q[0]) / 2, (p[1] + q[1]) / 2);
      spread = gap;
    } else if (path) {
      // a page that is slow to draw hears of many moves as of one, and a lasso without its corners holds nothing
      const steps = event.getCoalescedEvents?.() ?? [];
      for (const [x, y] of (steps.length ? steps : [event]).map(place)) {
        moved += Math.hypot(x - path.at(-1)[0], y - path.at(-1)[1]);
        path.push([x, y]);
      }
      invalidate(false);
    } else if (moved > 3) {
      layer.style.cursor = "grabbing";
      if (deep && !event.altKey) {
        yaw += dx * 0.008;
        pitch = Math.max(-1.55, Math.min(1.55, pitch + dy * 0.008));
        invalidate();
      } else slide(dx, dy);
    }
  });
  const release = (event) => {
    if (!hands.delete(event.pointerId)) return;
    const area = path;
    path = null;
    if (event.type === "pointercancel") return invalidate(false);
    if (area && moved > 8) {
      const ids = inside(area);
      if (!ids.length) hint("No point lies inside.");
      lasso(ids);
    } else if (moved <= 3) pick(nearest(...place(event)));
    invalidate(false);
  };
  layer.addEventListener("pointerup", release);
  layer.addEventListener("pointercancel", release);
  layer.addEventListener("pointerleave", () => {
    if (over >= 0) {
      over = -1;
      hover(-1);
      invalidate(false);
    }
  });
  layer.addEventListener("dblclick", (event) => {
    zoom(1.8, ...place(event));
  });
  node.addEventListener(
    "wheel",
    (event) => {
      if (!(
        event.ctrlKey ||
        event.metaKey ||
        document.activeElement === node ||
        node.getRootNode().activeElement === node
      )) {
        hint("Click the map first, then scroll to zoom.");
        return;
      }
      event.preventDefault();
      zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) * 0.006), ...place(event));
    },
    { passive: false },
  );
  node.addEventListener("keydown", (event) => {
    const step = {
      ArrowLeft: [40, 0],
      ArrowRight: [-40, 0],
      ArrowUp: [0, 40],
      ArrowDown: [0, -40],
    }[event.key];
    if (step && deep && !event.shiftKey) {
      yaw += step[0] * 0.004;
      pitch = Math.max(-1.55, Math.min(1.55, pitch + step[1] * 0.004));
      invalidate();
    } else if (step) slide(...step);
    else if (event.key === "+" || event.key === "=") zoom(1.3);
    else if (event.key === "-") zoom(1 / 1.3);
    else if (event.key === "0") fit();
    else if (event.key === "Enter") pick(nearest(width / 2, height / 2, 1e4));
    else if (event.key === "Escape") {
      path = null;
      pick(-1);
      lasso([]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const resize = new ResizeObserver(() => invalidate());
  resize.observe(node);

  return {
    node,
    spent,
    count: () => count,
    fit,
    zoom,
    reveal,
    invalidate,
    /** Show frames, each Float32Array(3 * count) within about -1..1 (`half` says how far along x and y); with `smooth` the points move there. */
    setPoints(next, { smooth = false, half = [1, 1] } = {}) {
      reach = half;
      const old = smooth && count * 3 === next[0].length && !STILL() ? current() : null;
      frames = next;
      count = next[0].length / 3;
      if (xs.length !== count)
        [xs, ys, zs] = [new Float32Array(count), new Float32Array(count), new Float32Array(count)];
      if (ranks.length !== count) ranks = new Uint8Array(count).fill(1);
      if (colours.length !== 4 * count) colours = new Uint8Array(4 * count).fill(128);
      time = Math.min(time, frames.length - 1);
      over = -1;
      tween = null;
      morph = old ? { from: old, to: frames[Math.round(time)], t: 0 } : null;
      invalidate();
    },
    setColours(rgba) {
      colours = rgba;
      invalidate(false);
    },
    /** 0 dims a point, 1 shows it, 2 makes it large. */
    setRanks(next) {
      ranks = next;
      invalidate(false);
    },
    setDeep(next) {
      deep = next;
      fit();
    },
    setMode(next) {
      mode = next;
    },
    time: () => time,
    /** Go to a frame, in ms; done is called on arrival. */
    goTo(frame, ms, done) {
      const b = Math.max(0, Math.min(frames.length - 1, frame));
      if (ms <= 0 || STILL()) {
        tween = null;
        time = b;
        invalidate();
        done?.();
        return;
      }
      tween = { a: time, b, ms, start: performance.now(), done };
      invalidate();
    },
    where(i) {
      project();
      return [xs[i], ys[i]];
    },
    /** The mean time of n drawings in a row in ms, waiting for each to be finished: for tests and for reports. */
    bench(n = 30) {
      const begin = performance.now();
      for (let i = 0; i < n; i++) {
        yaw += 0.01;
        stale = true;
        center[0] += 0.0005;
        paint();
        painter.finish();
        write();
      }
      return (performance.now() - begin) / n;
    },
    end() {
      cancelAnimationFrame(wanted);
      wanted = -1;
      resize.disconnect();
      painter?.end();
    },
  };
}
