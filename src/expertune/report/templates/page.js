"use strict";
/* Zoom, values under the pointer, and search. The page is complete without it. */
(() => {
  const SIZE = 1000;
  const data = (node) => JSON.parse(node.querySelector('script[type="application/json"]').textContent);
  const words = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
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
        line.append(`${point.name}, ${words(point.step)}: `, value);
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
      this.figure.querySelector(where).replaceChildren(...values.map((value) => {
        const node = document.createElement("span");
        const [side, part] = place(value);
        node.style[side] = `${part}%`;
        node.textContent = value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
          ? value.toExponential() : String(value);
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
    const { rows, names, unit } = data(figure), svg = figure.querySelector("svg");
    const tip = make("tip", figure.querySelector(".field"));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), width = rows[0].length;
      const x = Math.min(width - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * width)));
      const y = Math.min(rows.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows.length)));
      tip.textContent = `layer ${names[y]}, expert ${x}: ${rows[y][x]} ${unit}`;
      tip.style.left = x < width / 2 ? `${100 * (x + 1) / width}%` : "auto";
      tip.style.right = x < width / 2 ? "auto" : `${100 * (1 - x / width)}%`;
      tip.style.top = `${100 * y / rows.length}%`;
      tip.hidden = false;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  const search = document.getElementById("search");
  if (search) {
    const wrong = document.getElementById("wrong"), found = document.getElementById("found");
    const answers = [...document.querySelectorAll(".answer")];
    const filter = () => {
      const wanted = search.value.trim().toLowerCase();
      let shown = 0;
      for (const answer of answers) {
        const fits = answer.textContent.toLowerCase().includes(wanted);
        answer.hidden = !fits || (wrong.checked && answer.dataset.right === "true");
        shown += answer.hidden ? 0 : 1;
      }
      found.textContent = `${shown} of ${answers.length}`;
    };
    search.addEventListener("input", filter);
    wrong.addEventListener("change", filter);
  }
})();
