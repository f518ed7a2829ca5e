// A plotly figure, drawn when it is first seen; plotly's script is asked for once a page.

import { asking, frame, h, whenSeen } from "./kit.js";

const WAIT_MS = 300000; // of a figure whose numbers are measured first

function loadPlotly(ask) {
  return (
    window.Plotly ??
    (window.primechatPlotly ??= ask("script")
      .then(async ({ script }) => {
        await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
        return window.Plotly;
      })
      .catch((error) => {
        window.primechatPlotly = undefined;
        throw error;
      }))
  );
}

function render({ model, el }) {
  const { root, later, end } = frame({ model, el }, "figure");
  const ask = asking(model, later);
  const line = h("p", { class: "pc-muted", role: "status", text: "Being measured and drawn …" }),
    place = h("div");
  root.style.minHeight = `${model.get("height")}px`;
  let alive = true;
  later(() => {
    alive = false;
    window.Plotly?.purge(place);
  });
  root.append(line, place);
  whenSeen(
    root,
    async () => {
      try {
        const known = model.get("figure"),
          figure = known.data ? known : (await ask("settle", {}, WAIT_MS)).figure;
        const plotly = await loadPlotly(ask);
        if (!alive) return;
        root.style.minHeight = `${figure.layout.height ?? 450}px`;
        await plotly.newPlot(place, figure.data, figure.layout, {
          responsive: true,
          displaylogo: false,
        });
        line.remove();
      } catch (error) {
        line.className = "pc-error";
        line.textContent = `The figure could not be drawn: ${error.message}`;
      }
    },
    later,
  );
  return end;
}

export default { render };
