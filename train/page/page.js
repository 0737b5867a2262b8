// The page's own script: the pictures, the table's order and filter, the experiment that is open. What people wrote is
// in the document already, or becomes text of it: nothing here makes markup of words.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const GREEN = "#009e73", GREY = "#8a8a8a", VERMILION = "#d55e00", BLUE = "#0072b2", ORANGE = "#e69f00";
  const OURS = ["#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
  const experiments = new Map(data.experiments.map((one) => [one.number, one]));

  // A page that is made anew every few seconds is read anew too: what its reader chose is kept meanwhile.
  const kept = (() => {
    const key = "timebox " + location.pathname;
    try { return { key, ...JSON.parse(sessionStorage.getItem(key) || "{}") }; } catch { return { key }; }
  })();
  const keep = (name, value) => {
    kept[name] = value;
    try { sessionStorage.setItem(kept.key, JSON.stringify(kept)); } catch { /* a browser that stores nothing */ }
  };

  function figure(options) {
    const figure = Bokeh.Plotting.figure({
      sizing_mode: "stretch_both", tools: [], toolbar_location: "above", outline_line_color: null, ...options,
    });
    figure.toolbar.logo = null;
    figure.grid.grid_line_color = "#e4e4e4";
    figure.axis.axis_line_color = GREY;
    figure.axis.axis_label_text_font_style = "normal";
    const tools = [new Bokeh.PanTool(), new Bokeh.BoxZoomTool(), new Bokeh.WheelZoomTool(), new Bokeh.ResetTool()];
    figure.add_tools(...tools);
    figure.toolbar.active_drag = null; // on a phone a finger on the picture scrolls the page
    figure.toolbar.active_scroll = null;
    return figure;
  }

  const views = new Map();

  async function show(figure, element) {
    const before = views.get(element);
    views.set(element, Bokeh.Plotting.show(figure, element));
    (await before)?.remove();
  }

  // The night.

  function night() {
    const along = byId("along").value, index = Number(byId("set")?.value ?? 0), set = data.sets[index];
    const where = (number, time) => (along === "time" ? Date.parse(time) : number);
    const groups = { kept: [], not: [], above: [], crashed: [] }, spreads = [];
    const low = set ? set.low : 0, high = set ? set.high : 1;
    for (const one of data.experiments) {
      for (const run of one.runs) {
        const x = where(one.number, run.time), point = { x, one, run };
        if (one.result === "crashed" && run.val_bpb === null) groups.crashed.push({ ...point, y: low });
        else if (run.val_bpb === null || run.set !== index) continue;
        else if (run.val_bpb > high) groups.above.push({ ...point, y: high });
        else groups[one.result === "kept" ? "kept" : "not"].push({ ...point, y: run.val_bpb });
      }
      const last = one.runs.findLast((run) => run.set === index);
      if (last && one.sd !== null) spreads.push({ x: where(one.number, last.time), y: one.mean, sd: one.sd });
    }
    const time = along === "time";
    const room = 0.06 * (high - low);
    const figure_ = figure({
      x_axis_type: time ? "datetime" : "linear", x_axis_label: time ? "when the run ended (UTC)" : "experiment",
      y_axis_label: "val_bpb, less is better", y_range: new Bokeh.Range1d({ start: low - room, end: high + room }),
    });
    for (const level of levels(set, where, time)) {
      figure_.step({ x: level.x, y: level.y, mode: "after", line_color: BLUE, line_width: 2.5 });
    }
    figure_.segment({
      x0: spreads.map((s) => s.x), x1: spreads.map((s) => s.x), y0: spreads.map((s) => s.y - s.sd),
      y1: spreads.map((s) => s.y + s.sd), line_color: ORANGE, line_width: 3, line_alpha: 0.8,
    });
    const marks = {
      not: { marker: "square", size: 7, fill_color: "white", line_color: GREY, line_width: 1.5 },
      above: { marker: "triangle", size: 9, fill_color: GREY, line_color: GREY },
      kept: { marker: "circle", size: 10, fill_color: GREEN, line_color: "white" },
      crashed: { marker: "x", size: 11, line_color: VERMILION, line_width: 3 },
    };
    const renderers = [];
    for (const [name, look] of Object.entries(marks)) {
      const points = groups[name];
      const source = new Bokeh.ColumnDataSource({ data: {
        x: points.map((p) => p.x), y: points.map((p) => p.y), number: points.map((p) => p.one.number),
        name: points.map((p) => p.one.name), result: points.map((p) => p.one.result),
        seed: points.map((p) => p.run.seed),
        bpb: points.map((p) => (p.run.val_bpb === null ? "none" : p.run.val_bpb.toFixed(6))),
      } });
      renderers.push(figure_.scatter({ field: "x" }, { field: "y" }, {
        source, ...look, nonselection_alpha: 1, nonselection_fill_alpha: 1, nonselection_line_alpha: 1,
      }));
      source.selected.properties.indices.change.connect(() => {
        const chosen = source.selected.indices[0];
        if (chosen === undefined) return;
        source.selected.indices = [];
        open(points[chosen].one.number);
      });
    }
    figure_.add_tools(new Bokeh.TapTool({ renderers }), new Bokeh.HoverTool({
      renderers, point_policy: "snap_to_data",
      tooltips: [["#", "@number"], ["experiment", "@name"], ["result", "@result"], ["val_bpb", "@bpb"],
        ["seed", "@seed"]],
    }));
    show(figure_, byId("night"));
  }

  // The incumbent's mean as steps, a line for each ledger, drawn on to the last experiment.
  function levels(set, where, time) {
    const lines = new Map();
    for (const level of set ? set.levels : []) {
      if (!lines.has(level.ledger)) lines.set(level.ledger, { x: [], y: [] });
      lines.get(level.ledger).x.push(where(level.number, level.time));
      lines.get(level.ledger).y.push(level.mean);
    }
    for (const [ledger, line] of lines) {
      const ends = data.experiments.filter((one) => one.ledger === ledger)
        .flatMap((one) => one.runs.map((run) => where(one.number, run.time)));
      line.x.push(Math.max(...ends) + (time ? 0 : 0.5));
      line.y.push(line.y.at(-1));
    }
    return lines.values();
  }

  // The curves of some runs over those of others, of their loss or of what was evaluated on the way.

  const UNITS = { loss: "loss, nats a token", val_bpb: "val_bpb on a small part" };

  function curves(element, ours, theirs, what = "loss", along = "seconds") {
    const all = [...theirs.map((curve) => ({ curve, ours: false })), ...ours.map((curve) => ({ curve, ours: true }))]
      .filter(({ curve }) => curve);
    if (!all.length) return element.remove();
    const key = all.every(({ curve }) => curve[along].some((x) => x > 0)) ? along : "step";
    // The first steps fall from so high that all that matters would lie on one line.
    const settled = all.flatMap(({ curve }) => curve[what].slice(Math.floor(curve[what].length / 12)))
      .filter((y) => y !== null);
    const low = Math.min(...settled), high = Math.max(...settled), room = 0.05 * (high - low) || 0.01;
    const figure_ = figure({
      x_axis_label: key === "step" ? "step" : "seconds of training", y_axis_label: UNITS[what],
      y_range: new Bokeh.Range1d({ start: low - room, end: high + room }),
    });
    const lines = [], legend = document.createElement("p");
    legend.className = "legend";
    let colour = 0;
    for (const { curve, ours } of all) {
      // Before the budget begins, its clock stands still.
      const points = curve[key].map((x, i) => [x, curve[what][i]])
        .filter(([x, y]) => x !== null && y !== null && (key === "step" || x > 0));
      const source = new Bokeh.ColumnDataSource({ data: {
        x: points.map(([x]) => x), y: points.map(([, y]) => y), whose: points.map(() => curve.title),
      } });
      const line_color = ours ? OURS[colour++ % OURS.length] : GREY;
      lines.push(figure_.line({ field: "x" }, { field: "y" }, {
        source, line_width: ours ? 2.2 : 1.6, line_color, line_alpha: ours ? 1 : 0.75,
      }));
      // A line of one point is none.
      if (what === "val_bpb") figure_.scatter({ field: "x" }, { field: "y" }, { source, size: 5, color: line_color });
      const entry = document.createElement("span"), mark = document.createElement("i");
      mark.className = "mark line";
      mark.style.background = line_color;
      entry.append(mark, curve.title);
      legend.append(entry);
    }
    if (element.nextElementSibling?.className === "legend") element.nextElementSibling.remove();
    element.after(legend);
    figure_.add_tools(new Bokeh.HoverTool({
      renderers: lines, tooltips: [["run", "@whose"], [key, "@x{0.0}"], [what, "@y{0.0000}"]],
    }));
    show(figure_, element);
  }

  function curvesOf(number, what, kind = "curves") {
    const one = experiments.get(number);
    const seeds = new Map((one?.runs ?? []).map((run) => [run.run, run.seed]));
    return Object.entries(one?.[kind] ?? {}).map(([run, curve]) => ({ ...curve, title: `${what}, seed ${seeds.get(run)}` }));
  }

  // The experiment that is open.

  const dialog = byId("dialog"), shown = byId("shown"), articles = byId("articles");
  const home = [...articles.children];

  function open(number) {
    const article = byId("e" + number);
    if (!article) return;
    for (const other of [...shown.children]) articles.append(other);
    shown.append(article);
    keep("open", number);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    const place = home.indexOf(article);
    byId("back").disabled = place === 0;
    byId("on").disabled = place === home.length - 1;
    const one = experiments.get(number);
    for (const chart of article.querySelectorAll(".chart")) {
      const evals = chart.classList.contains("evals");
      const of = (which, title) => (which ? curvesOf(which, title, evals ? "evals" : "curves") : []);
      curves(chart, of(number, "this"), of(one.incumbent, "incumbent"), evals ? "val_bpb" : "loss");
    }
  }

  const besides = (step) => () => {
    const now = home.findIndex((article) => article.parentElement === shown);
    const next = home[now + step];
    if (next) open(Number(next.dataset.number));
  };
  byId("back").onclick = besides(-1);
  byId("on").onclick = besides(1);
  byId("close").onclick = () => dialog.close();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => keep("open", null);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#e"]'), row = event.target.closest("#table tbody tr");
    if (!link && !row) return;
    event.preventDefault();
    open(Number(link ? link.hash.slice(2) : row.dataset.number));
  });

  // The table.

  const body = byId("table").tBodies[0], rows = [...body.rows], heads = [...byId("table").tHead.rows[0].cells];

  function sort(column, descending) {
    const number = heads[column].querySelector("button").dataset.kind === "number";
    const value = (row) => row.cells[column].dataset.sort;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what has none comes last, whichever way
      const order = number ? x - y : x.localeCompare(y);
      return descending ? -order : order;
    });
    body.append(...rows);
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending");
    });
    keep("sort", [column, descending]);
  }

  function filter() {
    const words = byId("find").value.trim().toLowerCase(), only = byId("only").value;
    let count = 0;
    for (const row of rows) {
      // A long description is cut in the table, and whole in its article.
      const whole = byId("e" + row.dataset.number).querySelector(".words") ?? row.cells[1];
      row.hidden = (only && row.dataset.result !== only) || !whole.textContent.toLowerCase().includes(words);
      count += !row.hidden;
    }
    byId("count").textContent = count === rows.length ? "" : `${count} of ${rows.length}`;
    keep("find", byId("find").value);
    keep("only", only);
  }

  heads.forEach((head, i) => {
    head.querySelector("button").onclick = () => sort(i, head.getAttribute("aria-sort") === "ascending");
  });
  byId("find").oninput = filter;
  byId("only").onchange = filter;

  // As it was before the page was made anew.

  for (const id of ["along", "set", "only", "find"]) {
    const element = byId(id);
    if (element && typeof kept[id] === "string") {
      element.value = kept[id];
      if (element.value !== kept[id]) element.value = element.options ? element.options[0].value : "";
    }
  }
  if (Array.isArray(kept.sort) && heads[kept.sort[0]]) sort(...kept.sort);
  filter();
  for (const id of ["along", "set"]) {
    if (byId(id)) byId(id).onchange = () => { keep(id, byId(id).value); night(); };
  }
  night();
  data.running.forEach((run, i) => {
    const ours = run.curve ? [{ ...run.curve, title: "running" }] : [];
    const theirs = run.incumbent ? curvesOf(run.incumbent, "incumbent") : [];
    curves(byId("running" + i), ours, ours.length ? theirs : []);
  });
  const asked = Number(location.hash.match(/^#e(\d+)$/)?.[1] ?? kept.open);
  if (asked) open(asked);
})();
