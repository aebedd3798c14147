"use strict";
// The page of one answer: filters, table, plots. The answer is JSON in #answer; no network.

const answer = JSON.parse(document.getElementById("answer").textContent);
const GROUPS = [["machine", "machine"], ["tiers", "tiers"], ["policy", "policy"],
  ["stored", "stored format"], ["weights", "weights"], ["router", "router"],
  ["eviction", "eviction"]];
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f",
  "#444444"];
const slo = answer.question.slo;
// Percentiles are of all requests: of traffic in classes they are held against no single level.
const asks = (name) => Object.keys(answer.question.class_slo).length ? " of all classes"
  : ` (asked: ${number(slo[name])} ms)`;
const base = answer.rows.find((r) => r.fingerprint === answer.best);
const asked = answer.question.target_rps;
let selected = (base || answer.rows[0]).fingerprint;
let target = asked;
let order = { column: null, down: false };

const byId = (id) => document.getElementById(id);
const values = (key) => [...new Set(answer.rows.map((r) => r[key]))];
const number = (v, digits = 3) => (v === null || v === undefined || Number.isNaN(v)) ? "–"
  : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : Number(v.toPrecision(digits)).toString();
const element = (tag, text, attributes = {}) => {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  return made;
};
const policies = values("policy");
const colourOf = (row) => COLOURS[policies.indexOf(row.policy) % COLOURS.length];
const atLoad = (row) => row.fleet || row.at_capacity || {};
const origin = (row, seed) => `run ${row.fingerprint}, ` +
  (seed === undefined ? `seeds ${row.seeds.join(" ")}` : `seed ${seed}`);

// -- filters: checked boxes, kept in the address so that a view can be sent on --------------------

function readAddress() {
  const found = {};
  for (const part of location.hash.slice(1).split("&").filter(Boolean)) {
    const [key, value] = part.split("=");
    found[key] = decodeURIComponent(value || "").split("|");
  }
  return found;
}

function buildFilters() {
  const wanted = readAddress();
  for (const [key, title] of GROUPS) {
    if (values(key).filter((v) => v !== "none").length < 2) continue;
    const group = element("fieldset", null, { "data-key": key });
    group.append(element("legend", title));
    for (const value of values(key)) {
      const label = element("label", null);
      const box = element("input", null, { type: "checkbox", value });
      box.checked = !wanted[key] || wanted[key].includes(value);
      box.addEventListener("change", () => { writeAddress(); draw(); });
      label.append(box, " " + value);
      group.append(label);
    }
    byId("filters").append(group);
  }
  byId("filters").hidden = !byId("filters").children.length;
}

function checked() {
  const found = {};
  for (const group of byId("filters").querySelectorAll("fieldset")) {
    found[group.dataset.key] = [...group.querySelectorAll("input:checked")].map((b) => b.value);
  }
  return found;
}

function writeAddress() {
  const parts = [];
  for (const [key, on] of Object.entries(checked())) {
    if (on.length < values(key).length) parts.push(`${key}=${on.map(encodeURIComponent).join("|")}`);
  }
  if (asked && !simulated()) parts.push(`target=${target}`);
  history.replaceState(null, "", "#" + parts.join("&"));
}

function shown() {
  const on = checked();
  return answer.rows.filter((r) => Object.entries(on).every(([key, list]) => list.includes(r[key])));
}

// -- first screen ---------------------------------------------------------------------------------

function buildCards() {
  const cards = [];
  if (base) {
    const at = atLoad(base);
    if (asked) {
      const sure = base.replicas_high > base.replicas ? `; ${base.replicas_high} to be sure` : "";
      cards.push([number(base.replicas),
        `${base.replicas === 1 ? "replica" : "replicas"} for ${number(asked)} req/s, simulated together${sure}`]);
      if (base.usd_per_h !== null) cards.push(["$" + number(base.fleet_usd_per_h), "per hour, all replicas"]);
    } else if (base.usd_per_h !== null) {
      cards.push(["$" + number(base.usd_per_h), "per replica and hour"]);
    }
    if (base.usd_per_h !== null) {
      cards.push(["$" + number(asked ? base.fleet_usd_per_mtok : base.usd_per_mtok),
        "per million tokens, prompt and output"]);
    }
    cards.push([(base.at_least ? "≥ " : "") + number(base.capacity_rps) + " req/s", `one replica carries (${between(base.low_rps, base.high_rps)})`
      + (base.limit ? `, limited by ${base.limit}` : "")]);
    cards.push([number(at.ttft_ms_p99) + " ms", `TTFT p99${asks("ttft_ms")}`]);
    cards.push([number(at.tpot_ms_p99) + " ms", `TPOT p99${asks("tpot_ms")}`]);
    const classes = Object.entries(at.good_share_by_class || {});
    if (classes.length > 1) {
      const shares = classes.map(([name, share]) => `${name || "no class"} ${number(100 * share)} %`);
      cards.push([number(100 * Math.min(...classes.map(([, share]) => share))) + " %",
        `of the class that keeps its level least (${shares.join(", ")})`]);
    }
  }
  for (const [value, text] of cards) {
    const card = element("div", null, { class: "card", title: origin(base) });
    card.append(element("b", value), element("span", text));
    byId("cards").append(card);
  }
}

const between = (low, high) => low === undefined ? "–"
  : low === high ? number(low) : `${number(low)} to ${number(high)}`;
const parts = (r) => r.capacity_rps === undefined ? "" : "traffic, 95 %: " +
  `${between(r.capacity_low_rps, r.capacity_high_rps)}; kernels, 90 %: ${between(r.kernels_low_rps, r.kernels_high_rps)}`;
const inTiers = (r) => atLoad(r).loaded_share === undefined ? null
  : 100 * Object.values(atLoad(r).loaded_share).reduce((a, b) => a + b, 0);

// At the rate that was asked, replicas are simulated together; at another, they are by division.
const simulated = () => target === asked;
const replicas = (r) => simulated() ? r.replicas : r.capacity_rps && Math.ceil(target / r.capacity_rps);
const perHour = (r) => !target ? r.usd_per_h : simulated() ? r.fleet_usd_per_h
  : r.usd_per_h && replicas(r) * r.usd_per_h;
const perMtok = (r) => (target && simulated() ? r.fleet_usd_per_mtok : null) ?? r.usd_per_mtok;
const surely = (r) => simulated() ? r.replicas_high : r.low_rps ? Math.ceil(target / r.low_rps) : null;
const sureText = (v, sure) => sure && sure > v ? ` (${number(sure)})` : "";
// As the answer chooses: at the unfavourable end of the interval.
const cost = (r) => {
  if (r.capacity_rps === undefined) return Infinity;
  const price = r.usd_per_h ?? 1;
  if (!target) return r.low_rps ? price / r.low_rps : Infinity;
  return surely(r) === null ? Infinity : surely(r) * price;
};

const plain = (v) => number(v);
// Title, value, how it is shown.
const COLUMNS = [
  ["candidate", (r) => r.name, String, "text"],
  ["replicas", replicas, (v, r) => number(v) + sureText(v, target && surely(r))],
  ["$ per hour", perHour, (v, r) => number(v) + sureText(v, target && v !== null && surely(r) * r.usd_per_h)],
  ["one carries, req/s", (r) => r.capacity_rps, plain],
  ["interval", (r) => r.low_rps, (v, r) => between(r.low_rps, r.high_rps)],
  ["limited by", (r) => r.limit || "", String, "text"],
  ["$ per M tokens", perMtok, plain],
  ["TTFT p99, ms", (r) => atLoad(r).ttft_ms_p99, plain],
  ["TPOT p99, ms", (r) => atLoad(r).tpot_ms_p99, plain],
  ["from tiers", inTiers, (v) => v === null ? "–" : Math.round(v) + " %"],
  ["kernels", (r) => r.kernels.split(" from ")[0], String, "text"],
];

function sorted(rows) {
  const key = order.column === null ? cost : COLUMNS[order.column][1];
  const able = (r) => (r.why_not ? 1 : 0);
  const compare = (a, b) => {
    const [x, y] = [key(a) ?? Infinity, key(b) ?? Infinity];
    return (x < y ? -1 : x > y ? 1 : 0) * (order.down ? -1 : 1);
  };
  return rows.slice().sort((a, b) => able(a) - able(b) || compare(a, b)
    || (b.capacity_rps ?? 0) - (a.capacity_rps ?? 0));
}

function buildTarget() {
  byId("target").hidden = !asked || !base;
  if (!asked) return;
  const box = byId("rate");
  const [low, high] = [Math.log(asked / 20), Math.log(asked * 20)];
  Object.assign(box, { min: low, max: high, step: (high - low) / 200 });
  const wanted = Number((readAddress().target || [])[0]);
  target = wanted > 0 ? wanted : asked;
  box.value = Math.log(target);
  box.addEventListener("input", () => {
    const rate = Math.exp(Number(box.value));
    target = Math.abs(rate / asked - 1) < 0.02 ? asked : Number(rate.toPrecision(2));
    writeAddress();
    drawTarget();
    drawTable(shown());
  });
  drawTarget();
}

function drawTarget() {
  byId("says").textContent = `${number(target)} req/s: ` + (simulated()
    ? "replicas simulated together" : "replicas by division of what one carries") + "; in brackets: to be sure";
}

function drawTable(rows) {
  const body = byId("rows");
  body.replaceChildren();
  const head = element("tr", null);
  COLUMNS.forEach(([title, , , kind], i) => {
    const cell = element("th", title, kind ? { class: kind } : {});
    if (order.column === i) cell.textContent += order.down ? " ↓" : " ↑";
    cell.addEventListener("click", () => {
      order = { column: i, down: order.column === i && !order.down };
      drawTable(shown());
    });
    head.append(cell);
  });
  body.append(head);
  if (!rows.length) {
    const line = element("tr", null, { class: "cannot" });
    line.append(element("td", "No candidate has all of these: check more boxes.", { class: "text", colspan: COLUMNS.length }));
    body.append(line);
  }
  for (const row of sorted(rows)) {
    const line = element("tr", null, { title: `${origin(row)}; ${parts(row)}`, "data-fingerprint": row.fingerprint });
    line.classList.toggle("best", row.fingerprint === answer.best);
    line.classList.toggle("selected", row.fingerprint === selected);
    line.classList.toggle("cannot", Boolean(row.why_not));
    for (const [, value, show, kind] of COLUMNS) line.append(element("td", show(value(row), row), kind ? { class: kind } : {}));
    line.addEventListener("click", () => { selected = row.fingerprint; draw(); });
    body.append(line);
    if (row.why_not || row.note) {
      const why = element("tr", null, { class: "cannot" });
      why.append(element("td", row.why_not || row.note, { class: "text", colspan: COLUMNS.length }));
      body.append(why);
    }
  }
}

// -- plots ----------------------------------------------------------------------------------------

const NARROW = innerWidth < 640;
const layout = (title, x, y, more = {}) => ({
  title: { text: title.replace("|", NARROW ? "<br>" : ": "), font: { size: NARROW ? 12 : 14 } },
  margin: { t: 44, r: 12, l: 60, b: 48 }, font: { size: NARROW ? 10 : 12 },
  xaxis: { title: { text: x }, automargin: true, zeroline: false, ...more.xaxis },
  yaxis: { title: { text: y }, automargin: true, zeroline: false, ...more.yaxis },
  legend: { orientation: "h", y: -0.22 }, hovermode: "closest", ...more.rest,
});
const plot = (id, traces, form) => Plotly.react(id, traces, form, { responsive: true, displayModeBar: false });

// Colour is the policy, the symbol the machine; a policy has one entry in the legend.
const LOG = { type: "log", dtick: "D2", tickformat: "~g" };
const labelOf = (row) => NARROW ? row.name.replace(" · ", "<br>") : row.name;
const shapesOf = (rows) => values("machine").length < 2 ? [] : [...new Set(rows.map((r) => r.machine))].map((m) => ({
  type: "scatter", mode: "markers", x: [null], y: [null], name: m, legendgroup: m, hoverinfo: "skip",
  marker: { color: "#57606a", symbol: values("machine").indexOf(m) } }));
const legendOf = (row, traces) => ({ name: row.policy, legendgroup: row.policy,
  showlegend: !traces.some((t) => t.legendgroup === row.policy) });

function drawCapacity(rows) {
  const able = sorted(rows).filter((r) => r.capacity_rps !== undefined).reverse();
  const bar = {
    type: "bar", orientation: "h", y: able.map(labelOf), x: able.map((r) => r.capacity_rps),
    marker: { color: able.map(colourOf) },
    error_x: {
      type: "data", symmetric: false,
      array: able.map((r) => r.high_rps - r.capacity_rps),
      arrayminus: able.map((r) => r.capacity_rps - r.low_rps),
    },
    text: able.map((r) => `${parts(r)}<br>${origin(r)}`), textposition: "none",
    hovertemplate: "%{y}<br>%{x:.3g} req/s<br>%{text}<extra></extra>",
  };
  plot("capacity", [bar], layout("What one replica carries|interval of traffic and kernels", "requests per second", "",
    { rest: { height: Math.max(300, 90 + (NARROW ? 44 : 34) * able.length) } }));
}

function frontOf(points) {
  const sorted = points.slice().sort((a, b) => a.usd_per_mtok - b.usd_per_mtok || a.ttft_ms_p99 - b.ttft_ms_p99);
  const front = [];
  for (const p of sorted) if (!front.length || p.ttft_ms_p99 < front[front.length - 1].ttft_ms_p99) front.push(p);
  return front;
}

function drawPareto(rows) {
  const traces = [];
  const all = [];
  for (const row of rows) {
    const points = (row.points || []).filter((p) => p.usd_per_mtok !== null);
    all.push(...points);
    traces.push({
      type: "scatter", mode: "markers", x: points.map((p) => p.usd_per_mtok),
      ...legendOf(row, traces), y: points.map((p) => p.ttft_ms_p99), marker: { color: colourOf(row), size: 7, opacity: 0.75,
        symbol: values("machine").indexOf(row.machine) },
      text: points.map((p) => `${number(p.rate_rps)} req/s, ${origin(row, p.seed)}`),
      hovertemplate: "%{text}<br>$%{x:.3g} per M tokens<br>TTFT p99 %{y:.0f} ms<extra>" + row.name + "</extra>",
    });
  }
  const front = frontOf(all);
  traces.push(...shapesOf(rows), { type: "scatter", mode: "lines", name: "Pareto front", legendgroup: "front", x: front.map((p) => p.usd_per_mtok),
    y: front.map((p) => p.ttft_ms_p99), line: { color: "#1b1f24", width: 1, shape: "hv" }, hoverinfo: "skip" });
  plot("pareto", traces, layout("Cost against TTFT p99|runs that keep the level, Pareto front", "$ per million tokens",
    "TTFT p99, ms", { xaxis: LOG, yaxis: LOG }));
  document.body.dataset.front = front.length;
}

function drawLevel(rows) {
  const traces = [];
  for (const row of rows.filter((r) => r.trials)) {
    const trials = row.trials.slice().sort((a, b) => a.rate_rps - b.rate_rps);
    traces.push({
      type: "scatter", mode: "markers", ...legendOf(row, traces), x: trials.map((t) => t.rate_rps),
      y: trials.map((t) => 100 * t.good_share), marker: { color: colourOf(row),
        symbol: values("machine").indexOf(row.machine) },
      text: trials.map((t) => `${origin(row, t.seed)}, TTFT p99 ${number(t.metrics.ttft_ms_p99)} ms`),
      hovertemplate: "%{x:.3g} req/s: %{y:.1f} %<br>%{text}<extra>" + row.name + "</extra>",
    });
  }
  traces.push(...shapesOf(rows));
  const level = 100 * answer.question.attainment;
  plot("level", traces, layout("Requests that keep the level|every run", "requests per second", "% of requests",
    { xaxis: LOG, rest: { shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1,
      y0: level, y1: level, line: { dash: "dot", color: "#57606a" } }] } }));
}

function drawWhatIf() {
  const effects = answer.what_if.filter((e) => e.ratio !== null);
  effects.sort((a, b) => Math.abs(Math.log(a.ratio)) - Math.abs(Math.log(b.ratio)));
  const bar = {
    type: "bar", orientation: "h", y: effects.map((e) => e.what), x: effects.map((e) => 100 * (e.ratio - 1)),
    marker: { color: effects.map((e) => e.ratio < 1 ? "#d55e00" : "#0072b2") },
    error_x: { type: "data", symmetric: false, array: effects.map((e) => 100 * ((e.high ?? e.ratio) - e.ratio)),
      arrayminus: effects.map((e) => 100 * (e.ratio - (e.low ?? e.ratio))) },
    text: effects.map((e) => `${number(e.capacity_rps)} req/s, $${number(e.usd_per_mtok)} per M tokens, run ${e.fingerprint}`),
    textposition: "none", hovertemplate: "%{y}: %{x:+.1f} %<br>%{text}<extra></extra>",
  };
  if (effects.length) plot("whatif", [bar], layout("What if|capacity of the best, against now (paired, 95 %)", "% of capacity", "",
    { rest: { height: Math.max(300, 90 + 30 * effects.length) } }));
  for (const e of answer.what_if) if (e.ratio === null) byId("cannot").append(element("li", `${e.what}: ${e.why_not}`));
}

// -- where numbers come from ----------------------------------------------------------------------

function fill(id, titles, lines) {
  const body = byId(id);
  body.replaceChildren();
  const head = element("tr", null);
  titles.forEach((t, i) => head.append(element("th", t, i === 1 ? {} : { class: "text" })));
  body.append(head);
  for (const cells of lines) {
    const line = element("tr", null);
    cells.forEach((c, i) => line.append(element("td", c, i === 1 ? {} : { class: "text" })));
    body.append(line);
  }
}

function drawOrigin() {
  const row = answer.rows.find((r) => r.fingerprint === selected);
  byId("of").textContent = `${row.name} (${origin(row)}; click another row to see its own)`;
  const gib = (n) => (n / 2 ** 30).toFixed(2);
  const memory = row.memory.map((m) => [m.what, gib(m.n_bytes), m.kind, m.source]);
  memory.push([`KV, ${row.kv_tokens.toLocaleString("en")} tokens in all`,
    gib(row.memory.reduce((sum, m) => sum + m.n_bytes, 0)), row.kv_source, ""]);
  fill("memory", ["GPU memory", "GiB", "kind", "source"], memory);
  fill("provenance", ["figure", "value", "kind", "source"],
    row.provenance.map((p) => [`${p.row}: ${p.figure}`, number(p.value, 4), p.kind, p.source]));
}

function draw() {
  const rows = shown();
  drawTable(rows);
  drawCapacity(rows);
  drawPareto(rows);
  drawLevel(rows);
  drawOrigin();
  document.body.dataset.shown = rows.length;
}

buildFilters();
buildCards();
buildTarget();
draw();
if (answer.what_if.length) drawWhatIf(); else byId("what-if").hidden = true;
addEventListener("hashchange", () => { byId("filters").replaceChildren(); buildFilters(); buildTarget(); draw(); });
document.body.dataset.ready = "1";
