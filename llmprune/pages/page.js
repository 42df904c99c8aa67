"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];
  const waiting = [];
  const printed = {};
  // The width of a chart on A4 and Letter, in pixels.
  const PAPER = 640;
  const breathe = () => new Promise((resolve) => setTimeout(resolve));

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  // Read from elements, so that colours are defined in the style sheet alone.
  const colours = () => {
    const ink = getComputedStyle(document.body).color;
    const line = getComputedStyle(document.querySelector("figure")).borderTopColor;
    const result = { "font.color": ink };
    for (const axis of ["xaxis", "yaxis"])
      for (const part of ["gridcolor", "zerolinecolor", "linecolor"]) result[`${axis}.${part}`] = line;
    return result;
  };

  // Break at spaces and before brackets, because plotly does not wrap text.
  const wrapped = (text, most) => {
    if (text.length <= most) return text;
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = `${lines.at(-1)} ${word}`.trim();
      if (!lines.at(-1) || (longer.length <= most && word[0] !== "(")) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.join("<br>");
  };

  // On narrow screens, wrap names and titles, and put the legend above the chart at full width.
  const narrow = ({ data, layout }) => {
    layout.xaxis.title.text = wrapped(layout.xaxis.title.text, 34);
    layout.yaxis.title.text = wrapped(layout.yaxis.title.text, 34);
    if (layout.xaxis.dtick === "D2") layout.xaxis.dtick = 1;
    if (!layout.showlegend) return;
    for (const trace of data) trace.name = wrapped(trace.name, 34);
    const lines = data.reduce((sum, trace) => sum + trace.name.split("<br>").length, 0);
    layout.height += 20 * lines;
    layout.margin.t += 20 * lines;
    const corner = { x: 0, xref: "container", xanchor: "left", y: 1, yref: "container", yanchor: "top" };
    layout.legend = { ...corner, orientation: "h", entrywidth: 1, entrywidthmode: "fraction", font: { size: 12 } };
  };

  const draw = async (plot, figure) => {
    for (const [path, value] of Object.entries(colours())) {
      const [part, name] = path.split(".");
      figure.layout[part] = { ...figure.layout[part], [name]: value };
    }
    // No toolbar: it would cover the legend. Dragging zooms, and a double click shows everything again.
    const options = { responsive: true, displayModeBar: false };
    // Let a finger on a chart scroll the page.
    if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
    if (plot.clientWidth < 400) narrow(figure);
    drawn.push(plot);
    await Plotly.newPlot(plot, figure.data, figure.layout, options);
  };

  const repaint = async () => {
    const dark = isDark();
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
    for (const plot of drawn) {
      await Plotly.relayout(plot, colours());
      await breathe();
    }
    root.dataset.painted = isDark() ? "dark" : "light";
  };

  const remember = (theme) => {
    try {
      localStorage.setItem("llmprune-theme", theme);
    } catch {
      // Pages opened from disk may have no storage; the choice then lasts as long as the page.
    }
  };

  const recall = () => {
    try {
      return localStorage.getItem("llmprune-theme");
    } catch {
      return null;
    }
  };

  const load = async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let place = 0; place < packed.length; place++) bytes[place] = packed.charCodeAt(place);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    // Most of the library is needed at once; with this hint, browsers do not parse its functions twice.
    script.textContent = `//# allFunctionsCalledOnLoad\n${await new Response(stream).text()}`;
    document.head.append(script);
  };

  const start = async () => {
    const figures = JSON.parse(document.getElementById("figures").textContent);
    if (!Object.keys(figures).length) return;
    await load();
    waiting.push(...Object.entries(figures));
    while (waiting.length) {
      const [name, figure] = waiting.shift();
      const plot = document.getElementById(name);
      await draw(plot, figure);
      // The first screen is drawn; the rest follows chart by chart, and the page stays responsive in between.
      if (plot.getBoundingClientRect().bottom > innerHeight) root.dataset.charts = "ready";
      await breathe();
    }
  };

  // Paper shows everything, in light colours and at its own width. Plotly draws before its promises resolve.
  addEventListener("beforeprint", () => {
    printed.theme = root.dataset.theme;
    root.dataset.theme = "light";
    for (const [name, figure] of waiting.splice(0)) draw(document.getElementById(name), figure);
    for (const plot of drawn) Plotly.relayout(plot, { ...colours(), width: Math.min(plot.clientWidth, PAPER) });
  });
  addEventListener("afterprint", () => {
    if (printed.theme) root.dataset.theme = printed.theme;
    else delete root.dataset.theme;
    for (const plot of drawn) Plotly.relayout(plot, { ...colours(), width: null, autosize: true });
  });

  const theme = recall();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    repaint();
  });
  system.addEventListener("change", repaint);
  repaint();
  start().then(
    () => {
      root.dataset.charts = "drawn";
    },
    (error) => {
      root.dataset.charts = "failed";
      document.getElementById("failure").hidden = false;
      for (const details of document.querySelectorAll("figure details")) details.open = true;
      console.error(error);
    },
  );
})();
