"use strict";
/* Zoom, values under the pointer, and search. The page is complete without it. */
(() => {
  const SIZE = 1000;
  const data = (node) => JSON.parse(node.querySelector('script[type="application/json"]').textContent);
  const words = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });
  const make = (name, parent) => {
    const node = document.createElement("div");
    node.className = name;
    node.hidden = true;
    parent.append(node);
    return node;
  };

  function ticks(low, high) {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const apart = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let number = Math.ceil(low / apart - 1e-9); number * apart <= high * (1 + 1e-9); number++) {
      found.push(Number((number * apart).toPrecision(12)));
    }
    return found;
  }

  /* As many digits as tell the figures of an axis apart. */
  function labels(values) {
    const largest = Math.max(0, ...values.map(Math.abs));
    const apart = Math.min(...values.slice(1).map((value, place) => value - values[place])) || largest || 1;
    const power = (value) => Math.floor(Math.log10(value) + 1e-9);
    if (largest && (largest < 1e-3 || largest >= 1e7)) {
      const digits = Math.max(0, Math.floor(Math.log10(largest)) - power(Math.min(apart, largest)));
      return (value) => value ? value.toExponential(digits).replace("+", "") : "0";
    }
    const places = Math.max(0, -power(Math.min(apart, largest || 1)));
    return (value) => value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  }

  class Chart {
    constructor(figure) {
      Object.assign(this, data(figure));
      this.figure = figure;
      this.group = figure.dataset.chart;
      this.plot = figure.querySelector(".plot");
      this.svg = figure.querySelector("svg");
      this.across = [this.bounds[0], this.bounds[1]];
      this.up = [this.bounds[2], this.bounds[3]];
      this.cursor = make("cursor", this.plot);
      this.range = make("range", this.plot);
      this.tip = make("tip", this.plot);
      this.marks = [...figure.querySelectorAll("[data-step]")];
      this.listen();
    }

    step(event) {
      const box = this.plot.getBoundingClientRect();
      const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      return this.across[0] + part * (this.across[1] - this.across[0]);
    }

    listen() {
      let from = null;
      this.svg.addEventListener("pointerdown", (event) => {
        from = event.clientX;
        this.svg.setPointerCapture(event.pointerId);
        this.show(this.step(event));
      });
      this.svg.addEventListener("pointermove", (event) => {
        this.show(this.step(event));
        if (from === null) return;
        const box = this.plot.getBoundingClientRect();
        const [left, right] = [from, event.clientX].sort((a, b) => a - b);
        this.range.hidden = right - left < 8;
        this.range.style.left = `${left - box.left}px`;
        this.range.style.width = `${right - left}px`;
      });
      this.svg.addEventListener("pointerup", (event) => {
        if (from !== null && Math.abs(event.clientX - from) >= 8) {
          const start = this.step({ clientX: Math.min(from, event.clientX) });
          const end = this.step({ clientX: Math.max(from, event.clientX) });
          if (end > start) zoom([start, end], this.group);
        }
        this.range.hidden = true;
        from = null;
      });
      this.svg.addEventListener("pointercancel", () => { from = null; this.range.hidden = true; });
      this.svg.addEventListener("pointerleave", () => { if (from === null) this.hide(); });
      this.svg.addEventListener("blur", () => this.hide());
      this.svg.addEventListener("dblclick", () => zoom(null, this.group));
      this.svg.addEventListener("keydown", (event) => {
        if (event.key === "Escape") return zoom(null, this.group);
        const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!way) return;
        event.preventDefault();
        const steps = this.series[0].points.map((point) => point[0]);
        const now = this.at === undefined ? 0 : steps.findIndex((step) => step >= this.at);
        this.show(steps[Math.min(steps.length - 1, Math.max(0, now + way))]);
      });
    }

    show(step) {
      const near = this.series.map(({ name, points }) => {
        const seen = points.filter((point) => point[0] >= this.across[0] && point[0] <= this.across[1]);
        let best = seen[0];
        for (const point of seen) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
        return best && { name, step: best[0], value: best[1] };
      });
      const reach = (this.across[1] - this.across[0]) / 40;
      const known = near.filter((point) => point && Math.abs(point.step - step) <= reach);
      if (!known.length) return this.hide();
      this.at = known[0].step;
      this.tip.replaceChildren();
      for (const point of known) {
        const line = document.createElement("div");
        const value = document.createElement("b");
        value.textContent = words(point.value);
        line.append(`${point.name}, ${point.step.toLocaleString("en")}: `, value);
        this.tip.append(line);
      }
      const part = (this.at - this.across[0]) / (this.across[1] - this.across[0] || 1);
      this.cursor.style.left = `${100 * part}%`;
      this.tip.style.left = part < 0.5 ? `calc(${100 * part}% + 10px)` : "auto";
      this.tip.style.right = part < 0.5 ? "auto" : `calc(${100 * (1 - part)}% + 10px)`;
      this.cursor.hidden = this.tip.hidden = false;
    }

    hide() {
      this.cursor.hidden = this.tip.hidden = true;
    }

    zoom(across) {
      this.across = across || [this.bounds[0], this.bounds[1]];
      const seen = this.series.flatMap(({ points }) =>
        points.filter((point) => point[0] >= this.across[0] && point[0] <= this.across[1]).map((point) => point[1]));
      let [low, high] = [this.bounds[2], this.bounds[3]];
      if (across && seen.length) {
        [low, high] = [Math.min(...seen), Math.max(...seen)];
        const air = (high - low || Math.abs(high) || 1) * 0.08;
        [low, high] = [low - air, high + air];
        if (this.zero) low = Math.max(0, low);
      }
      this.up = [low, high];
      this.plot.classList.toggle("zoomed", Boolean(across));
      this.hide();
      this.draw();
    }

    draw() {
      const x = (step) => (step - this.across[0]) / (this.across[1] - this.across[0]);
      const y = (value) => 1 - (value - this.up[0]) / (this.up[1] - this.up[0]);
      this.series.forEach(({ points }, number) => {
        const spots = points.map(([step, value]) => `${(SIZE * x(step)).toFixed(1)} ${(SIZE * y(value)).toFixed(1)}`);
        for (const path of this.svg.querySelectorAll(`[data-series="${number}"]`)) {
          const dots = path.classList.contains("spots");
          path.setAttribute("d", dots ? spots.map((spot) => `M${spot}h.01`).join("") : `M${spots.join("L")}`);
        }
      });
      for (const mark of this.marks) mark.setAttribute("d", `M${SIZE * x(Number(mark.dataset.step))} 0V${SIZE}`);
      const steps = ticks(...this.across).filter(Number.isInteger), values = ticks(...this.up);
      this.svg.querySelector(".grid").setAttribute("d", values.map((v) => `M0 ${SIZE * y(v)}H${SIZE}`).join(""));
      this.label(".x", steps, (step) => ["left", 100 * x(step)]);
      this.label(".y", values, (value) => ["top", 100 * y(value)]);
    }

    label(where, values, place) {
      const text = labels(values);
      this.figure.querySelector(where).replaceChildren(...values.map((value) => {
        const node = document.createElement("span");
        const [side, part] = place(value);
        node.style[side] = `${part}%`;
        node.textContent = text(value);
        return node;
      }));
    }
  }

  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure));
  const reset = document.getElementById("reset");
  function zoom(across, group) {
    for (const chart of charts) if (chart.group === group) chart.zoom(across);
    if (reset && group === reset.dataset.group) reset.hidden = !across;
  }
  if (reset) reset.addEventListener("click", () => zoom(null, reset.dataset.group));

  for (const figure of document.querySelectorAll("[data-map]")) {
    const { layers, highest, row, names, column, columns, unit, ...first } = data(figure);
    let { rows } = first;
    const svg = figure.querySelector("svg"), tip = make("tip", figure.querySelector(".field"));
    const inside = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), width = rows[0].length;
      const x = inside((event.clientX - box.left) / box.width, width);
      const y = inside((event.clientY - box.top) / box.height, rows.length);
      tip.textContent = `${row} ${names[y]}, ${column} ${columns[x] ?? x}: ${rows[y][x]} ${unit}`;
      tip.style.left = x < width / 2 ? `${100 * (x + 1) / width}%` : "auto";
      tip.style.right = x < width / 2 ? "auto" : `${100 * (1 - x / width)}%`;
      tip.style.top = `${100 * y / rows.length}%`;
      tip.hidden = false;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
    const chosen = figure.querySelector("select");
    if (chosen) chosen.addEventListener("change", () => {
      ({ rows } = layers[Number(chosen.value)]);
      const levels = [...svg.querySelectorAll("path")], paths = levels.map(() => "");
      rows.forEach((values, y) => {
        const colors = values.map((value) => inside(value / (highest || 1), levels.length));
        for (let x = 0, end; x < colors.length; x = end) {
          for (end = x + 1; colors[end] === colors[x]; end++);
          paths[colors[x]] += `M${x} ${y}h${end - x}v1h-${end - x}z`;
        }
      });
      levels.forEach((path, level) => path.setAttribute("d", paths[level]));
    });
  }

  const search = document.getElementById("search");
  if (search) {
    const PAGE = 10;
    const kind = document.getElementById("kind"), found = document.getElementById("found");
    const more = document.getElementById("more");
    const answers = [...document.querySelectorAll(".answer")].map((node) => ({
      node,
      kinds: node.dataset.kinds.split(" "),
      text: [...node.querySelectorAll(".prompt, .text")].map((part) => part.textContent).join("\n").toLowerCase(),
    }));
    let most = PAGE;
    const filter = () => {
      const wanted = search.value.trim().toLowerCase();
      let fitting = 0;
      for (const { node, kinds, text } of answers) {
        const fits = text.includes(wanted) && (!kind.value || kinds.includes(kind.value));
        fitting += fits ? 1 : 0;
        node.hidden = !fits || fitting > most;
      }
      found.textContent = `${Math.min(most, fitting)} of ${fitting} examples are shown.`;
      more.hidden = fitting <= most;
    };
    const anew = () => {
      most = PAGE;
      filter();
    };
    search.addEventListener("input", anew);
    kind.addEventListener("change", anew);
    more.addEventListener("click", () => {
      most += 5 * PAGE;
      filter();
    });
    anew();
  }
})();
