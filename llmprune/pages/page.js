"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];
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
    const buttons = ["select2d", "lasso2d", "autoScale2d"];
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: buttons };
    if (matchMedia("(pointer: coarse)").matches) {
      // Let a finger on a chart scroll the page; the buttons would cover the legend.
      figure.layout.dragmode = false;
      options.displayModeBar = false;
    }
    if (plot.clientWidth < 400) narrow(figure);
    await Plotly.newPlot(plot, figure.data, figure.layout, options);
    drawn.push(plot);
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
    for (const [name, figure] of Object.entries(figures)) {
      const plot = document.getElementById(name);
      await draw(plot, figure);
      // The first screen is drawn; the rest follows chart by chart, and the page stays responsive in between.
      if (plot.getBoundingClientRect().bottom > innerHeight) root.dataset.charts = "ready";
      await breathe();
    }
  };

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
