// Draws the charts of the page in its colours, and again when those, the room or the unit of the x axis change.
"use strict";
(() => {
  const { charts, units } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const unit = document.getElementById("unit");
  const element = (chart) => document.getElementById(`chart-${chart.key}`);
  const hidden = new Set(); // numbers of runs
  let zoom = null; // where all charts over training are zoomed to, in the unit of the x axis
  const variable = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // A deep copy in which the color "$name" has become the value of the CSS variable --name.
  const coloured = (value, key = "") => {
    if (typeof value === "string") return key.endsWith("color") && value[0] === "$" ? variable(value.slice(1)) : value;
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((part) => coloured(part)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, coloured(part, name)]));
  };

  // The chart with epochs turned into the unit of the x axis; marks in the layout are in the unit of their run.
  const inUnit = ({ data, layout }) => {
    const name = unit.value;
    const scaled = (epoch, run = 0) => epoch * units[run][name];
    const moved = (mark) => {
      const own = { ...mark };
      for (const key of ["x", "x0", "x1"]) if (key in own && own.xref !== "paper") own[key] = scaled(own[key], own.run);
      delete own.run;
      return own;
    };
    const marks = (all = []) => all.filter((mark) => !hidden.has(mark.run)).map(moved);
    const xaxis = { ...layout.xaxis, title: { text: unit.selectedOptions[0].text }, hoverformat: name === "epoch" ? ".4~g" : ",.0f" };
    if (name !== "epoch") xaxis.tickformat = "~s";
    if (zoom) xaxis.range = zoom;
    else if (xaxis.range) xaxis.range = [0, Math.max(...units.map((_, run) => scaled(layout.ends[run], run))) * 1.02];
    return {
      data: data.map((trace) => ({ ...trace, x: trace.x.map((epoch) => scaled(epoch, trace.meta.run)) })),
      layout: {
        ...layout, xaxis, uirevision: name, ends: undefined,
        shapes: marks(layout.shapes), annotations: marks(layout.annotations),
      },
    };
  };

  const figure = (chart) => {
    const { data, layout } = coloured(chart.overTraining ? inUnit(chart) : chart);
    for (const trace of data) trace.visible = trace.meta.reference || !hidden.has(trace.meta.run);
    const [ink, muted, panel, line, grid] = ["ink", "muted", "panel", "line", "grid"].map(variable);
    const axis = (own) => ({
      gridcolor: grid, linecolor: line, zeroline: false, ticks: "", automargin: true, tickfont: { color: muted }, ...own,
      ...(own && own.title ? { title: { ...own.title, font: { size: 12, color: muted }, standoff: 8 } } : {}),
    });
    for (const trace of data) if (trace.colorbar) trace.colorbar.tickfont = { color: muted };
    const family = getComputedStyle(document.body).fontFamily;
    const touch = matchMedia("(pointer: coarse)").matches; // there a finger in a chart scrolls the page
    return {
      data,
      layout: {
        uirevision: "kept", autosize: false, width: element(chart).clientWidth, height: element(chart).clientHeight,
        paper_bgcolor: panel, plot_bgcolor: panel, font: { family, size: 12, color: ink },
        margin: { l: 46, r: 14, t: layout.showlegend ? 48 : 24, b: 38 }, bargap: 0.25, showlegend: false, dragmode: touch ? false : "zoom",
        legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 1, yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
        hoverlabel: { bgcolor: panel, bordercolor: line, font: { family, color: ink } },
        ...layout, xaxis: axis({ showgrid: false, ...layout.xaxis }), yaxis: axis(layout.yaxis),
      },
    };
  };

  const draw = async (chart) => {
    const place = element(chart);
    if (place.clientWidth < 100) return; // not laid out
    const { data, layout } = figure(chart);
    await Plotly.react(place, data, layout, {
      displaylogo: false,
      showTips: false, // the foot of the page has them
      showSendToCloud: false, // plotly's own default is a button that uploads the chart
      plotlyServerURL: "",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
      toImageButtonOptions: { filename: `${document.title}-${chart.key}`.replace(/[^\w.=+-]+/g, "_"), scale: 2 },
    });
    if (chart.overTraining && !place.dataset.drawn) place.on("plotly_relayout", (change) => follow(chart, change));
    place.dataset.drawn = "1";
  };

  // Who zooms into a time sees it in all charts.
  let following = false;
  const follow = async (source, change) => {
    if (following || !Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
    following = true;
    zoom = [...element(source).layout.xaxis.range];
    for (const chart of charts) {
      if (chart !== source && chart.overTraining) await Plotly.relayout(element(chart), { "xaxis.range": [...zoom] });
    }
    following = false;
  };

  let drawing = Promise.resolve();
  const redraw = () => {
    drawing = drawing.then(() => Promise.all(charts.map(draw))).then(() => (root.dataset.drawn = Number(root.dataset.drawn || 0) + 1));
  };

  const watch = () => {
    const widths = new Map(charts.map((chart) => [element(chart), element(chart).clientWidth]));
    const observer = new ResizeObserver((entries) => {
      const changed = entries.filter(({ target }) => Math.abs(widths.get(target) - target.clientWidth) > 1);
      for (const { target } of changed) widths.set(target, target.clientWidth);
      if (changed.length) redraw();
    });
    for (const place of widths.keys()) observer.observe(place);
    for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", redraw);
    if (unit) {
      unit.addEventListener("change", () => {
        zoom = null;
        redraw();
      });
    }
    for (const button of document.querySelectorAll("button[data-run]")) {
      button.addEventListener("click", () => {
        const run = Number(button.dataset.run);
        if (!hidden.delete(run)) hidden.add(run);
        button.setAttribute("aria-pressed", String(!hidden.has(run)));
        redraw();
      });
    }
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details.print:not([open])")];
      for (const part of opened) part.open = true;
    });
    addEventListener("afterprint", () => {
      for (const part of opened) part.open = false;
    });
  };

  const start = async () => {
    for (const image of document.images) {
      await image.decode().catch(() => {});
      image.classList.toggle("small", image.naturalWidth < 100); // enlarged, with its pixels shown
    }
    for (const chart of charts) {
      await draw(chart);
      await new Promise((resume) => setTimeout(resume)); // the page stays usable between two charts
    }
    watch();
    root.dataset.drawn = 1; // times, for who waits for it
  };

  start();
})();
