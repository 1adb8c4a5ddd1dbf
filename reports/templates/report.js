// Charts and the table of the report. Data comes from one JSON block and is only ever written as text.
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  root.classList.add("js");

  // Numbers as people read them ---------------------------------------------------------------

  const trim = (v, digits) => String(Number(v.toPrecision(digits)));

  function scaled(v, unit, steps) {
    for (const [name, size] of steps) {
      if (Math.abs(v) >= size) return `${trim(v / size, 4)} ${name}${unit}`;
    }
    return `${trim(v, 4)} ${unit}`.trim();
  }

  const SI = [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]];
  const BINARY = [["Ti", 2 ** 40], ["Gi", 2 ** 30], ["Mi", 2 ** 20], ["Ki", 2 ** 10]];
  const TIMES = [["", 1], ["m", 1e-3], ["\u00b5", 1e-6], ["n", 1e-9]];

  function tokens(v) {
    if (v >= 2 ** 20 && v % 2 ** 20 === 0) return `${v / 2 ** 20}M`;
    if (v >= 1024 && v % 1024 === 0) return `${v / 1024}k`;
    return v >= 100 ? Math.round(v).toLocaleString("en-US") : trim(v, 3);
  }

  function shown(v, unit) {
    if (v === null || v === undefined || !Number.isFinite(v)) return "-";
    if (unit === "tokens") return tokens(v);
    if (unit === "s") return v === 0 ? "0 s" : scaled(v, "s", TIMES);
    if (unit === "B") return scaled(v, "B", BINARY);
    if (unit === "US$") return `$${v < 1000 ? trim(v, 3) : Math.round(v).toLocaleString("en-US")}`;
    if (unit === "FLOP/s" || unit === "FLOP/B" || unit === "J") return scaled(v, unit, SI);
    const number = Math.abs(v) < 1e5 ? trim(v, 4) : scaled(v, "", SI);
    return unit ? `${number} ${unit}` : number;
  }

  function tick(v, unit) {
    const text = shown(v, unit);
    // Units stand in the axis label; only those that scale (ms, GiB) and signs stay at the ticks.
    return ["s", "B", "US$", "%"].includes(unit) ? text : text.replace(unit, "").trim();
  }

  // Small helpers -----------------------------------------------------------------------------

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "on") for (const [event, f] of Object.entries(value)) made.addEventListener(event, f);
      else if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const PALETTE = 7;
  const colourOf = (n) => (n < 0 ? style("--muted") : style(`--series-${n % PALETTE}`));
  const faded = (colour) => `${colour}1c`;

  // One chart ---------------------------------------------------------------------------------

  const charts = [];

  class Chart {
    constructor(place, spec) {
      this.place = place;
      this.spec = spec;
      this.logX = Boolean(spec.x.log);
      this.logY = Boolean(spec.y.log);
      this.hidden = this.crowd();
      this.at = null;
      this.tip = element("div", { class: "tip", hidden: "" });
      this.live = element("p", { class: "visually-hidden", "aria-live": "polite" });
      this.canvas = element("div", {
        class: "canvas", tabindex: "0", role: "group",
        "aria-label": `${spec.title}. Arrow keys walk along the points and between methods; ` +
          "plus and minus zoom, zero shows everything.",
        on: { keydown: (event) => this.onKey(event), blur: () => this.showTip(null) },
      });
      place.append(this.tools(), this.canvas, this.legend(), this.live);
      this.draw();
    }

    // More series than colours are a tangle: those without one of their own wait for a click.
    crowd() {
      const late = this.spec.series.filter((s) => s.colour >= PALETTE);
      return new Set(late.length < this.spec.series.length ? late.map((s) => s.label) : []);
    }

    tools() {
      const button = (text, act, pressed) =>
        element("button", { type: "button", "aria-pressed": pressed, on: { click: act } }, text);
      const bar = element("div", { class: "tools" });
      const toggle = (axis, name) => {
        const made = button(`log ${name}`, () => {
          this[axis] = !this[axis];
          made.setAttribute("aria-pressed", String(this[axis]));
          this.draw();
        }, String(this[axis]));
        return made;
      };
      if (this.spec.x.log) bar.append(toggle("logX", "x"));
      if (this.spec.y.log) bar.append(toggle("logY", "y"));
      bar.append(
        button("zoom in", () => this.zoom(0.6)),
        button("zoom out", () => this.zoom(1 / 0.6)),
        button("show all", () => this.draw()),
      );
      return bar;
    }

    legend() {
      const list = element("div", { class: "legend", role: "group", "aria-label": "series shown" });
      const seen = new Map();
      for (const s of this.spec.series) {
        if (s.role === "faint") continue;
        if (!seen.has(s.label)) seen.set(s.label, []);
        seen.get(s.label).push(s);
      }
      for (const [label, members] of seen) {
        const swatch = element("span", { class: `swatch ${members[0].role}${members[0].dash ? " dash" : ""}` });
        swatch.style.setProperty("--c", members[0].colour < 0
          ? "var(--muted)" : `var(--series-${members[0].colour % PALETTE})`);
        const made = element("button", { type: "button", "aria-pressed": String(!this.hidden.has(label)) }, swatch, label);
        made.addEventListener("click", () => {
          const hide = !this.hidden.has(label);
          if (hide) this.hidden.add(label); else this.hidden.delete(label);
          made.setAttribute("aria-pressed", String(!hide));
          this.draw(true);
        });
        list.append(made);
      }
      if (this.hidden.size) list.prepend(element("span", { class: "hint" }, "click a name to draw or hide it"));
      if (this.spec.omitted) list.append(element("span", {}, `${this.spec.omitted} more series not drawn`));
      return list;
    }

    // Ring and line: predicted. Dot: observed. Guide, roof, faint: lines without points.
    series(s) {
      const colour = colourOf(s.colour);
      const background = style("--card");
      const base = { scale: "y", label: s.label, show: !this.hidden.has(s.label), stroke: colour, width: 1.6 };
      const points = (size, fill, width = 1.6) => ({ show: true, size, fill, stroke: colour, width });
      if (s.role === "line") {
        return { ...base, dash: s.dash ? [7, 4] : undefined, points: points(8, background) };
      }
      if (s.role === "dot") return { ...base, paths: () => null, points: points(6, colour) };
      if (s.role === "ring") return { ...base, paths: () => null, points: points(9, background) };
      if (s.role === "cross") {
        return { ...base, stroke: style("--ink"), paths: () => null,
          points: { ...points(11, "transparent", 2), stroke: style("--ink") } };
      }
      return { ...base, width: s.role === "faint" ? 0.8 : 1.4, dash: s.role === "guide" ? [4, 4] : undefined,
        points: { show: false } };
    }

    draw(keepZoom) {
      const zoom = keepZoom && this.plot
        ? { x: [this.plot.scales.x.min, this.plot.scales.x.max], y: [this.plot.scales.y.min, this.plot.scales.y.max] }
        : null;
      if (this.plot) this.plot.destroy();
      this.showTip(null);
      const tables = [], options = [{}], bands = [];
      for (const s of this.spec.series) {
        tables.push([s.x, s.y.map((v) => (this.logY && !(v > 0) ? null : v))]);
        options.push(this.series(s));
      }
      for (const s of this.spec.series) {
        if (!s.lo) continue;
        const edge = { scale: "y", show: !this.hidden.has(s.label), width: 0, stroke: "transparent", points: { show: false } };
        tables.push([s.bx, s.hi, s.lo]);
        bands.push({ series: [options.length, options.length + 1], fill: faded(colourOf(s.colour)) });
        options.push({ ...edge }, { ...edge });
      }
      const ink = style("--ink"), grid = style("--grid");
      const axis = (side, label, unit, size) => ({
        side, label, size, labelSize: 22, stroke: ink, scale: side === 2 ? "x" : "y",
        font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
        grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 },
        space: side === 2 ? 60 : 28,
        filter: (u, splits) => splits,
        splits: (u, n, low, high, step) => this.splits(u, side === 2, low, high, step),
        values: (u, splits) => splits.map((v) => (v === null ? null : tick(v, unit))),
      });
      const scale = (log, base) => (log ? { distr: 3, log: base || 10 } : { distr: 1 });
      const width = Math.max(280, this.canvas.clientWidth || this.place.clientWidth || 800);
      this.width = width;
      this.height = Math.round(Math.min(460, Math.max(300, width * 0.55)));
      this.plot = new uPlot({
        width,
        height: this.height,
        legend: { show: false },
        cursor: { points: { show: false }, drag: { x: true, y: true, uni: 12 } },
        scales: {
          x: { time: false, ...scale(this.logX, this.spec.x.log), range: (u, a, b) => this.range(u, a, b, this.logX) },
          y: { ...scale(this.logY, this.spec.y.log), range: (u, a, b) => this.range(u, a, b, this.logY) },
        },
        axes: [
          axis(2, this.spec.x.label, this.spec.x.unit, 34),
          axis(3, this.spec.y.label, this.spec.y.unit, width < 480 ? 66 : 72),
        ],
        series: options,
        bands,
        hooks: {
          draw: [(u) => { this.drawJoins(u); this.drawRoofNames(u); }],
          setCursor: [(u) => this.onCursor(u)],
        },
      }, uPlot.join(tables), this.canvas);
      this.canvas.append(this.tip);
      if (zoom) this.setScales(zoom.x, zoom.y);
    }

    range(u, low, high, log) {
      if (low === null || high === null || low === undefined) return log ? [1, 10] : [0, 1];
      if (log) {
        const margin = Math.max((high / low) ** 0.06, 1.08);
        return [low / margin, high * margin];
      }
      const margin = (high - low || Math.abs(high) || 1) * 0.06;
      return [low - margin, high + margin];
    }

    // Round numbers only: on a log axis the powers, with 2 and 5 (or every doubling) where they fit.
    splits(u, across, low, high, step) {
      const log = across ? this.logX : this.logY;
      const ticks = [];
      if (!log) {
        // Bytes are read in powers of two.
        if (!across && this.spec.y.unit === "B") step = 2 ** Math.ceil(Math.log2(step));
        for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) {
          // Steps add up to 1e-17 where they mean zero.
          ticks.push(Math.abs(v) < step * 1e-6 ? 0 : Number(v.toPrecision(12)));
        }
        return ticks;
      }
      const base = (across ? this.spec.x.log : this.spec.y.log) || 10;
      const most = Math.max(2, Math.floor(across ? (this.width - 100) / 70 : (this.height - 60) / 30));
      const powers = Math.log(high / low) / Math.log(base);
      const menus = base === 2 ? [[1]] : [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 5], [1, 3], [1]];
      const menu = menus.find((m) => powers * m.length <= most) || [1];
      const every = Math.max(1, Math.ceil((powers * menu.length) / most));
      for (let n = Math.floor(Math.log(low) / Math.log(base) - 1e-9); base ** n <= high; n++) {
        if (menu.length === 1 && n % every) continue;
        for (const m of menu) {
          const v = Number((base ** n * m).toPrecision(12));
          if (v >= low && v <= high) ticks.push(v);
        }
      }
      return ticks;
    }

    // Roofs, limits and bands say what they are at their right end.
    drawRoofNames(u) {
      const context = u.ctx, ratio = uPlot.pxRatio, taken = [], ends = [];
      context.save();
      context.font = `${11 * ratio}px system-ui, sans-serif`;
      context.fillStyle = style("--muted");
      context.textAlign = "right";
      for (const s of this.spec.series) {
        const last = s.y.length - 1;
        if (!["roof", "faint", "guide"].includes(s.role) || last < 1 || this.hidden.has(s.label)) continue;
        if (s.y[last] !== s.y[last - 1]) {
          // A slanting line has room behind its end.
          const end = u.valToPos(s.y[last], "y", true) + 3 * ratio;
          if (ends.some((other) => Math.abs(other - end) < 11 * ratio)) continue;
          ends.push(end);
          context.textAlign = "left";
          context.fillText(s.label, u.valToPos(s.x[last], "x", true) + 4 * ratio, end);
          context.textAlign = "right";
          continue;
        }
        const right = Math.min(u.bbox.left + u.bbox.width - 4 * ratio, u.valToPos(s.x[last], "x", true));
        const y = u.valToPos(s.y[last], "y", true) - 4 * ratio;
        if (y < u.bbox.top || y > u.bbox.top + u.bbox.height) continue;
        const text = s.label.replace(/^roof: /, "");
        const width = context.measureText(text).width;
        let x = right;
        for (const t of taken) if (Math.abs(t.y - y) < 12 * ratio) x = Math.min(x, t.x - t.width - 14 * ratio);
        if (x - width < u.bbox.left) continue;
        taken.push({ x, y, width });
        context.fillText(text, x, y);
      }
      context.restore();
    }

    // A line from every ring to its dot.
    drawJoins(u) {
      const shownNow = new Set(this.spec.series.filter((s) => !this.hidden.has(s.label)).map((s) => s.colour));
      const context = u.ctx;
      context.save();
      context.beginPath();
      context.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      context.clip();
      for (const [x, from, to, colour] of this.spec.joins || []) {
        if (!shownNow.has(colour)) continue;
        context.strokeStyle = colourOf(colour);
        context.lineWidth = uPlot.pxRatio;
        context.beginPath();
        const left = u.valToPos(x, "x", true);
        context.moveTo(left, u.valToPos(from, "y", true));
        context.lineTo(left, u.valToPos(to, "y", true));
        context.stroke();
      }
      context.restore();
    }

    zoom(factor) {
      const part = (scale, log) => {
        const { min, max } = this.plot.scales[scale];
        if (log) {
          const middle = Math.sqrt(min * max), reach = (max / min) ** (factor / 2);
          return [middle / reach, middle * reach];
        }
        const middle = (min + max) / 2, reach = ((max - min) * factor) / 2;
        return [middle - reach, middle + reach];
      };
      this.setScales(part("x", this.logX), part("y", this.logY));
    }

    setScales(x, y) {
      this.plot.batch(() => {
        this.plot.setScale("x", { min: x[0], max: x[1] });
        this.plot.setScale("y", { min: y[0], max: y[1] });
      });
    }

    // Hover and keys ----------------------------------------------------------------------------

    walkable() {
      return this.spec.series.filter((s) =>
        !this.hidden.has(s.label) && ["line", "dot", "ring", "cross"].includes(s.role));
    }

    onCursor(u) {
      const { left, top } = u.cursor;
      if (left === undefined || left < 0) {
        if (document.activeElement !== this.canvas) this.showTip(null);
        return;
      }
      let best = null, distance = 40 ** 2;
      for (const s of this.walkable()) {
        for (let n = 0; n < s.x.length; n++) {
          if (s.y[n] === null) continue;
          const dx = u.valToPos(s.x[n], "x") - left, dy = u.valToPos(s.y[n], "y") - top;
          const d = dx * dx + dy * dy;
          if (d < distance) { distance = d; best = { series: s, n }; }
        }
      }
      this.showTip(best);
    }

    onKey(event) {
      const keys = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      if (event.key in keys) {
        const all = this.walkable();
        if (!all.length) return;
        const [dSeries, dPoint] = keys[event.key];
        let row = this.at ? Math.max(0, all.indexOf(this.at.series)) : 0;
        let n = this.at ? this.at.n + dPoint : 0;
        row = (row + dSeries + all.length) % all.length;
        n = Math.min(Math.max(n, 0), all[row].x.length - 1);
        this.showTip({ series: all[row], n });
        this.live.textContent = this.tip.textContent;
      } else if (event.key === "+" || event.key === "=") this.zoom(0.6);
      else if (event.key === "-") this.zoom(1 / 0.6);
      else if (event.key === "0") this.draw();
      else if (event.key === "Escape") this.showTip(null);
      else return;
      event.preventDefault();
    }

    showTip(at) {
      this.at = at;
      this.tip.hidden = !at;
      if (!at) return;
      const { series: s, n } = at;
      const line = (...parts) => element("div", {}, parts.filter(Boolean).join(" "));
      this.tip.replaceChildren(
        element("strong", {}, s.label),
        line(`${this.spec.x.label.split(" (")[0]}:`, shown(s.x[n], this.spec.x.unit)),
        line(`${this.spec.y.label.split(" (")[0]}:`, shown(s.y[n], this.spec.y.unit)),
        ...(s.t[n] ? [line(s.t[n])] : []),
        ...this.rowTexts(s.r[n]),
      );
      const u = this.plot, box = u.over;
      const left = u.valToPos(s.x[n], "x") + box.offsetLeft, top = u.valToPos(s.y[n], "y") + box.offsetTop;
      const room = this.canvas.clientWidth - this.tip.offsetWidth - 8;
      const beside = left + 14 > room ? left - this.tip.offsetWidth - 14 : left + 14;
      this.tip.style.left = `${Math.max(0, Math.min(beside, room))}px`;
      this.tip.style.top = `${Math.max(0, top - this.tip.offsetHeight - 8)}px`;
    }

    rowTexts(row) {
      if (row < 0 || row === undefined) return [];
      const { columns, texts } = data.table;
      const said = [this.spec.x.label, this.spec.y.label].map((label) => label.split(" (")[0]);
      const lines = [];
      for (const name of ["context_tokens", "batch", "ttft_s", "tpot_s", "state_bytes", "fits", "basis", "status"]) {
        const column = columns.findIndex((c) => c.name === name);
        if (column >= 0 && texts[row][column] !== "-" && !said.includes(columns[column].title)) {
          lines.push(element("div", { class: "minor" }, `${columns[column].title}: ${texts[row][column]}`));
        }
      }
      return lines;
    }
  }

  // The table -----------------------------------------------------------------------------------

  const PAGE = 50;

  class RankedTable {
    constructor(table) {
      this.table = table;
      this.body = table.tBodies[0];
      this.query = "";
      this.sort = null;
      this.falling = false;
      this.page = 0;
      this.words = data.table.texts.map((row) => row.join(" \u0001 ").toLowerCase());
      this.status = element("span", { role: "status" });
      const input = element("input", {
        type: "search", id: "filter", placeholder: "kivi 128k", autocomplete: "off", spellcheck: "false",
        on: { input: (event) => { this.query = event.target.value; this.page = 0; this.render(); } },
      });
      this.back = element("button", { type: "button", on: { click: () => this.turn(-1) } }, "previous");
      this.next = element("button", { type: "button", on: { click: () => this.turn(1) } }, "next");
      table.parentElement.before(element("div", { class: "tools" },
        element("label", { for: "filter" }, "show rows with "), input, this.status, this.back, this.next));
      [...table.tHead.rows[0].cells].forEach((cell, n) => {
        const text = cell.textContent;
        cell.replaceChildren(element("button", {
          type: "button", on: { click: () => { this.falling = this.sort === n && !this.falling; this.sort = n; this.page = 0; this.render(); } },
        }, text));
      });
      this.render();
    }

    turn(by) { this.page += by; this.render(); }

    order() {
      const wanted = this.query.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = [];
      this.words.forEach((text, n) => { if (wanted.every((w) => text.includes(w))) rows.push(n); });
      if (this.sort === null) return rows;
      const { columns, values, texts } = data.table;
      const number = columns[this.sort].is_number;
      const sign = this.falling ? -1 : 1;
      return rows.sort((a, b) => {
        if (!number) return sign * texts[a][this.sort].localeCompare(texts[b][this.sort]) || a - b;
        const x = values[a][this.sort], y = values[b][this.sort];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (x - y) || a - b;
      });
    }

    render(most = PAGE) {
      const rows = this.order();
      const pages = Math.max(1, Math.ceil(rows.length / most));
      this.page = Math.min(Math.max(this.page, 0), pages - 1);
      const first = this.page * most, part = rows.slice(first, first + most);
      const { columns, texts } = data.table;
      this.body.replaceChildren(...part.map((n) => element("tr", {}, ...texts[n].map((text, c) =>
        element("td", { class: columns[c].is_number ? "number" : null }, text)))));
      this.status.textContent = rows.length
        ? ` ${first + 1}\u2013${first + part.length} of ${rows.length} ` : " no row has all of these words ";
      this.back.disabled = this.page === 0;
      this.next.disabled = this.page === pages - 1;
      [...this.table.tHead.rows[0].cells].forEach((cell, n) => {
        if (n === this.sort) cell.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      });
    }
  }

  // Start ---------------------------------------------------------------------------------------

  for (const place of document.querySelectorAll("[data-chart]")) {
    const spec = data.charts[place.dataset.chart];
    if (spec) charts.push(new Chart(place, spec));
  }
  const ranked = document.getElementById("ranked");
  const table = ranked && data.table.columns.length ? new RankedTable(ranked) : null;

  const redraw = () => charts.forEach((chart) => chart.draw(true));
  let width = window.innerWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    redraw();
  });
  // Paper has no pages to turn: print what the file would show without scripts.
  window.addEventListener("beforeprint", () => table && table.render(200));
  window.addEventListener("afterprint", () => table && table.render());
})();
