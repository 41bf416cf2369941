"use strict";
// Everything that comes from the server becomes a text node; no markup is ever parsed.

const $ = (id) => document.getElementById(id);
const KEY = "quire-admin-key";
const PERIOD = 1000;     // between two questions; the server answers all who ask within a second alike
const EXPLAIN_PERIOD = 10000;  // an explanation is read from the whole record
const MOST_ROWS = 100;
const MOST_CELLS = 16384;
const OWNER = 0x0fff, CACHED = 0x1000, HELD = 0x2000, SHARED = 0x4000;  // messages/state.py

let latest = null;       // the last answer
let chosen = 0;          // replica
let cells = new Uint16Array(0);
let perCell = 1;
let grid = { size: 1, perRow: 1 };
let pointed = null;      // the request whose blocks stand out
let open = null;         // the request in the dialog
let timer = 0;
let paused = false;
let asking = false;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const count = (n) => Math.round(n).toLocaleString("en");
const plain = (key) => key.replace(/@[^@]*$/, "");
const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024) return `${n.toFixed(unit === "B" || n >= 100 ? 0 : 1)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(1)} TiB`;
}

const milliseconds = (n) => (n === undefined ? "–" : n < 10 ? n.toFixed(2) : n < 100 ? n.toFixed(1) : count(n));

// --- the server -----------------------------------------------------------------------------------

/** Relative to this page, so that a path prefix of a proxy is kept. */
function call(path) {
  const headers = new Headers();
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("authorization", `Bearer ${key}`);
  return fetch(new URL(path, location.origin + location.pathname).href, { headers, cache: "no-store" });
}

async function poll() {
  clearTimeout(timer);
  if (asking || paused || document.hidden) return;
  asking = true;
  let wait = PERIOD;
  const begun = performance.now();
  try {
    const response = await call("debug/state");
    if (response.status === 401) {
      if ($("key").hidden) {
        $("key").hidden = false;
        $("secret").focus();
      }
      setStatus("waiting", "Locked");
      asking = false;
      return;
    }
    const body = await response.json().catch(() => null);
    if (!response.ok) throw new Error(body?.error?.message ?? body?.detail ?? `HTTP ${response.status}`);
    latest = body;
    say("");
    show();
    if (open !== null) explain();
    wait = Math.max(200, PERIOD - (performance.now() - begun));
  } catch (error) {
    setStatus("offline", "No answer");
    say(`The server does not answer: ${error.message}`);
    wait = 3 * PERIOD;
  }
  asking = false;
  if (!paused && !document.hidden) timer = setTimeout(poll, wait);
}

function say(problem) {
  if ($("problem").textContent !== problem) $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function setStatus(state, text) {
  $("status").dataset.state = state;
  if ($("status").firstChild.textContent !== text) $("status").firstChild.textContent = text;
  $("status").title = text;
}

// --- what is shown --------------------------------------------------------------------------------

const replica = () => latest.replicas.find((each) => each.replica === chosen) ?? latest.replicas[0] ?? null;
const requests = () => (latest && replica()?.core?.requests) ?? [];
const sum = (values) => values.reduce((a, b) => a + b, 0);

function show() {
  showStatus();
  const of = replica();
  if (!of) return;
  const core = of.core, seconds = of.seconds;
  showFigures(of);
  const running = requests().filter((each) => each.status === "running");
  giveHues(running);
  showBlocks(core);
  const queue = requests().filter((each) => each.status !== "running");
  showRequests("running", running, core?.num_running, runningRow);
  showRequests("queue", queue, core?.num_waiting, waitingRow);
  drawCharts(seconds);
  showLatency();
  showTenants(of);
  showTiers(of.tiers);
  showAdapters(core);
  showDetail();
}

function showStatus() {
  const { phase, engine, replicas, age_seconds: age } = latest;
  const several = replicas.length > 1;
  $("chooser").hidden = !several;
  const options = [...$("replica").options].map((option) => option.textContent);
  const names = replicas.map((each) => (each.state === "ok" ? `${each.replica}` : `${each.replica} (${each.state})`));
  if (several && options.join() !== names.join()) {
    $("replica").replaceChildren(...replicas.map((each, i) => el("option", { value: each.replica }, names[i])));
    $("replica").value = chosen;
  }
  const broken = replicas.filter((each) => each.state !== "ok");
  if (phase !== "ready") setStatus(phase === "failed" ? "offline" : "waiting", latest.failure || `The server is ${phase}`);
  else if (broken.length) setStatus("waiting", broken.map((each) => (several ? `Replica ${each.replica}: ${each.state}` : `The engine is ${each.state}`)).join(", "));
  else if (engine !== "ok") setStatus("waiting", engine);
  else if (age === null) setStatus("waiting", "The engine has not answered yet");
  else if (age > 5) setStatus("waiting", `State of ${duration(age)} ago: the engine has not answered since`);
  else setStatus("ready", replica()?.core?.sleep_level ? `${latest.model}, sleeping` : latest.model);
}

/** Nodes of `items` in `list`, kept by key, so that focus and pointer stay where they are. */
function keyed(list, items, key, make, update) {
  const old = new Map([...list.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const name = String(key(item));
    let node = old.get(name);
    if (!node) {
      node = make(item);
      node.dataset.key = name;
    }
    old.delete(name);
    if (list.children[index] !== node) list.insertBefore(node, list.children[index] ?? null);
    update(node, item);
  });
  for (const node of old.values()) node.remove();
}

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** A number of the core, or until it has answered that of its last step; a zero of that may only be silence. */
const known = (number, column) => (number === undefined && !column.at(-1) ? "–" : count(number ?? column.at(-1)));

function showFigures({ core, seconds }) {
  const ago = (column, n) => sum(column.slice(-1 - n, -1));  // whole seconds: the current one is not over
  const hits = ago(seconds.prefix_hits, 59), queries = ago(seconds.prefix_queries, 59);
  const drafts = ago(seconds.drafts, 59), accepted = ago(seconds.drafts_accepted, 59);
  const { ttft, itl } = latest.latency_ms;
  const usage = core ? 1 - core.blocks.num_free / core.blocks.num_blocks : seconds.kv_usage.at(-1);
  const found = [
    ["Running", known(core?.num_running, seconds.running), ""],
    ["Waiting", known(core?.num_waiting, seconds.waiting), ""],
    ["KV in use", `${(100 * usage).toFixed(usage && usage < .1 ? 1 : 0)}`, "%"],
    ["Generated", count(ago(seconds.output_tokens, 5) / 5), "tok/s"],
    ["Prompts", count(ago(seconds.prompt_tokens, 5) / 5), "tok/s"],
    ["TTFT, p50", milliseconds(ttft.p50), "ms"],
    ["ITL, p50", milliseconds(itl.p50), "ms"],
    ["Prefix hits", queries ? `${Math.round((100 * hits) / queries)}` : "–", queries ? "%" : ""],
  ];
  if (drafts) found.push(["Drafts", `${Math.round((100 * accepted) / drafts)}`, "% accepted"]);
  keyed($("figures"), found, ([name]) => name,
    ([name]) => el("li", {}, el("span", {}, name), el("b", {}), el("small", {})),
    (node, [, value, unit]) => { text(node.children[1], value); text(node.children[2], unit); });
}

// --- requests -------------------------------------------------------------------------------------

const name = (id) => `r${id}`;
const hues = new Map();  // of the requests that run, each the colour that fewest others have
const NUM_HUES = 12;

function giveHues(running) {
  const ids = new Set(running.map((request) => request.request_id));
  for (const id of hues.keys()) if (!ids.has(id) && id !== open?.id) hues.delete(id);
  const uses = new Array(NUM_HUES).fill(0);
  for (const place of hues.values()) uses[place]++;
  for (const id of ids) {
    if (hues.has(id)) continue;
    const place = uses.indexOf(Math.min(...uses));
    uses[place]++;
    hues.set(id, place);
  }
}

/** One that waits holds no block, so it has no colour. */
const hue = (id) => (hues.has(id) ? `--c${hues.get(id)}` : "--line");

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (variable) => style.getPropertyValue(variable).trim();
}

/** total: undefined as long as the engine has not answered. */
function showRequests(where, found, total, update) {
  const shown = found.slice(0, MOST_ROWS);
  text($(`${where}-count`), total ? count(total) : "");
  $(`${where}-none`).hidden = total !== 0;
  keyed($(where), shown, (each) => each.request_id, newRow, update);
  if (total > shown.length) {
    const more = el("li", { class: "note" }, `and ${count(total - shown.length)} more`);
    more.dataset.key = "more";
    $(where).append(more);
  }
}

function newRow(request) {
  const id = request.request_id;
  const swatch = el("span", { class: "swatch" });
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i", {}));
  bar.style.display = "block";
  const node = el("button", { type: "button", "aria-haspopup": "dialog" }, swatch,
    el("span", { class: "name" }, name(id), el("em", {})), el("span", { class: "time" }), bar, el("span", { class: "text" }));
  node.addEventListener("click", () => showRequest(id));
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => point(id));
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => point(null));
  return el("li", {}, node);
}

const who = (request) =>
  [request.tenant === "default" ? "" : request.tenant, request.adapter ? plain(request.adapter) : ""].filter(Boolean).join(", ");

/** How far it is: of its prompt until that is computed, then of the most that it may generate. */
function progress(request) {
  const { prompt_tokens: prompt, output_tokens: output = 0, computed_tokens: computed = 0, max_tokens: most = 0 } = request;
  const inPrompt = computed < prompt && !output;
  return {
    inPrompt,
    share: inPrompt ? computed / prompt : most ? output / most : 1,
    text: inPrompt ? `prompt: ${count(computed)} of ${plural(prompt, "token")} computed` : `${count(output)} of at most ${plural(most, "token")}, after ${count(prompt)} of prompt`,
  };
}

function runningRow(node, request) {
  const [swatch, title, time, bar, line] = node.firstChild.children;
  const { share, inPrompt, text: words } = progress(request);
  text(title.lastChild, who(request));
  text(time, duration(request.seconds ?? 0));
  swatch.style.background = `var(${hue(request.request_id)})`;
  bar.hidden = false;
  bar.firstChild.style.width = `${(100 * Math.min(1, share)).toFixed(1)}%`;
  bar.firstChild.style.background = inPrompt ? "var(--c0)" : "var(--c4)";
  text(line, words);
}

function reason(request) {
  const wait = request.wait;
  if (!wait) return "";
  const behind = wait.because_of === undefined || wait.because_of === null ? "" : ` (${name(wait.because_of)})`;
  const needs = wait.needed && wait.reason === "no free blocks" ? `: needs ${plural(wait.needed, "block")}, ${count(wait.free ?? 0)} free` : "";
  return `${wait.reason}${needs}${behind}`;
}

function waitingRow(node, request) {
  const [swatch, title, time, bar, line] = node.firstChild.children;
  swatch.style.background = "var(--line)";
  bar.hidden = true;
  text(title.lastChild, who(request));
  text(time, duration(request.seconds ?? 0));
  const found = reason(request), words = `, prompt of ${plural(request.prompt_tokens, "token")}${request.status === "waiting" ? "" : `, ${request.status}`}`;
  if (line.textContent !== found + words) line.replaceChildren(el("b", {}, found), words);
}

// --- the map of blocks ----------------------------------------------------------------------------

/** One cell per block; or, of a pool too large for that, cells in the order of holders, each for several. */
function layOut(core) {
  const { blocks } = core;
  if (blocks.cells) {
    const data = atob(blocks.cells);
    const found = new Uint16Array(data.length / 2);
    for (let i = 0; i < found.length; i++) found[i] = data.charCodeAt(2 * i) | (data.charCodeAt(2 * i + 1) << 8);
    return [found, 1];
  }
  const each = Math.ceil(blocks.num_blocks / MOST_CELLS);
  const found = new Uint16Array(Math.ceil(blocks.num_blocks / each));
  let at = 0, exact = 0;
  const fill = (value, number) => {
    exact += number;
    const end = Math.min(found.length, Math.round(exact / each));
    found.fill(value, at, Math.max(at, end));
    at = Math.max(at, end);
  };
  core.requests.forEach((request, index) => {
    if (request.blocks) fill(index + 1, request.blocks - (request.shared_blocks ?? 0));
  });
  const first = core.requests.findIndex((request) => request.shared_blocks);
  fill(SHARED | (first + 1), blocks.num_shared);
  const held = blocks.num_blocks - blocks.num_free;
  fill(HELD, Math.max(0, held - exact));
  const own = sum(core.requests.map((request) => Math.floor(((request.computed_tokens ?? 0)) / blocks.block_size) - (request.shared_blocks ?? 0)).filter((n) => n > 0));
  fill(CACHED, Math.max(0, Math.min(blocks.num_free, blocks.num_cached - own - blocks.num_shared)));
  return [found, each];
}

function showBlocks(core) {
  if (!core) {
    cells = new Uint16Array(0);
    text($("blocks-size"), "");
    $("blocks").setAttribute("aria-label", "The engine shows no blocks");
    drawBlocks();
    return;
  }
  const { num_blocks: all, num_free: free, num_shared: shared, block_size: size } = core.blocks;
  [cells, perCell] = layOut(core);
  let cached = 0;
  for (const cell of cells) cached += (cell & CACHED) !== 0;
  cached *= perCell;
  const about = perCell > 1 ? `, each square is ${perCell} blocks, in the order of holders` : "";
  text($("blocks-size"), `${count(all)} of ${size} tokens each${about}`);
  const legend = [
    ["own", "of one request", all - free - shared], ["shared", "shared", shared],
    ["cached", `free, ${perCell > 1 ? "about " : ""}cached`, cached], ["free", "free, empty", Math.max(0, free - cached)],
  ];
  keyed($("legend"), legend, ([kind]) => kind, ([kind]) => el("li", {}, el("i", { class: kind }), el("span", {})),
    (node, [, label, number]) => text(node.lastChild, `${label} ${count(number)}`));
  $("blocks").setAttribute("aria-label", `Map of ${count(all)} blocks: ${legend.map(([, label, number]) => `${count(number)} ${label}`).join(", ")}`);
  drawBlocks();
}

/** The largest square, up to 20 pixels, with which all cells fit in a height that leaves room for the rest. */
function cellSize(width, number) {
  for (let size = 20; size > 2; size--) {
    if (Math.ceil(number / Math.floor(width / size)) * size <= 250) return size;
  }
  return 2;
}

function drawBlocks() {
  const canvas = $("blocks"), width = canvas.clientWidth;
  if (!width) return;
  const size = cellSize(width, cells.length), perRow = Math.floor(width / size);
  const height = Math.max(size, Math.ceil(cells.length / perRow) * size);
  grid = { size, perRow };
  const context = sized(canvas, width, height);
  const colour = colours(), gap = size > 4 ? 1 : size > 2 ? .5 : 0;
  const found = requests();
  const index = pointed === null ? -1 : found.findIndex((request) => request.request_id === pointed) + 1;
  const styles = new Map();
  const paintOf = (cell) => {
    if (cell & HELD) return colour("--held");
    if (cell & OWNER) return colour(hue(found[(cell & OWNER) - 1]?.request_id));
    return colour(cell & CACHED ? "--cached" : "--free");
  };
  const byPaint = new Map();
  cells.forEach((cell, place) => {
    if (!byPaint.has(cell)) byPaint.set(cell, []);
    byPaint.get(cell).push(place);
  });
  for (const [cell, places] of byPaint) {
    const faded = index > 0 && (cell & OWNER) !== index;
    if (!styles.has(cell)) styles.set(cell, paintOf(cell));
    context.globalAlpha = faded ? .25 : 1;
    context.fillStyle = styles.get(cell);
    for (const place of places) {
      context.fillRect((place % perRow) * size, Math.floor(place / perRow) * size, size - gap, size - gap);
    }
    if (cell & SHARED) {  // a mark, so that colour is not all that tells
      context.fillStyle = colour("--ink");
      const dot = Math.max(1, Math.round(size * .36)), inset = (size - gap - dot) / 2;
      for (const place of places) {
        context.fillRect((place % perRow) * size + inset, Math.floor(place / perRow) * size + inset, dot, dot);
      }
    }
  }
  context.globalAlpha = 1;
}

function sized(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function cellAt(event) {
  const column = Math.floor(event.offsetX / grid.size), row = Math.floor(event.offsetY / grid.size);
  const place = row * grid.perRow + column;
  return column < grid.perRow && place < cells.length ? place : -1;
}

function ownerAt(place) {
  const owner = place < 0 ? 0 : cells[place] & OWNER;
  return owner ? requests()[owner - 1]?.request_id ?? null : null;
}

function pointAtBlock(event) {
  const place = cellAt(event), cell = cells[place] ?? 0, owner = ownerAt(place);
  const what = cell & HELD ? "held by a transfer"
    : owner !== null ? (cell & SHARED ? `shared, first held by ${name(owner)}` : `held by ${name(owner)}`)
      : cell & CACHED ? "free, its content is cached" : "free, empty";
  const where = perCell > 1 ? plural(perCell, "block") : `Block ${count(place + 1)}`;
  text($("where"), place < 0 ? "" : `${where}: ${what}`);
  point(owner);
}

function point(id) {
  if (pointed === id) return;
  pointed = id;
  drawBlocks();
}

// --- the last minute ------------------------------------------------------------------------------

const CHARTS = [
  { title: "Tokens a second", columns: [["prompt_tokens", "prompt", "prompts"], ["output_tokens", "output", "generated"]], kind: "bars" },
  { title: "Requests", columns: [["running", "running", "running"], ["waiting", "waiting", "waiting"]], kind: "lines" },
  { title: "Steps a second", columns: [["steps", "steps", "steps"], ["preemptions", "preemptions", "preemptions"]], kind: "marks" },
];
const PAINT = { prompt: "--c0", output: "--c4", running: "--c2", waiting: "--c1", steps: "--c5", preemptions: "--c1" };

function drawCharts(seconds) {
  if (!$("charts").children.length) {
    for (const chart of CHARTS) {
      const legend = el("ul", { class: "legend" }, el("li", {}, chart.title),
        ...chart.columns.map(([, kind, label]) => el("li", {}, el("i", { class: kind }), label)));
      $("charts").append(el("figure", {}, el("figcaption", {}, legend), el("canvas", { role: "img" })));
    }
  }
  CHARTS.forEach((chart, index) => drawChart($("charts").children[index].lastChild, chart, seconds));
}

function drawChart(canvas, chart, seconds) {
  const width = canvas.clientWidth, height = 92, floor = height - 16;
  if (!width) return;
  const context = sized(canvas, width, height), colour = colours();
  const [first, second] = chart.columns.map(([column]) => seconds[column]);
  const tops = first.map((value, i) => (chart.kind === "bars" ? value + second[i] : chart.kind === "lines" ? Math.max(value, second[i]) : value));
  const top = Math.max(1, ...tops), step = width / first.length;
  const y = (value) => floor - (value / top) * (floor - 12);
  const bar = (i, from, to) => context.fillRect(i * step, y(to), Math.max(1, step - 1), y(from) - y(to));
  const [one, two] = chart.columns.map(([, kind]) => colour(PAINT[kind]));
  context.fillStyle = colour("--line");
  context.fillRect(0, floor, width, 1);
  if (chart.kind === "lines") {
    [[first, one, []], [second, two, [5, 3]]].forEach(([values, paint, dash]) => {
      context.strokeStyle = paint;
      context.lineWidth = 2;
      context.setLineDash(dash);
      context.beginPath();
      values.forEach((value, i) => {
        context.lineTo(i * step, y(value));
        context.lineTo((i + 1) * step, y(value));
      });
      context.stroke();
    });
    context.setLineDash([]);
  } else {
    first.forEach((value, i) => {
      context.fillStyle = one;
      bar(i, 0, value);
      context.fillStyle = two;
      if (chart.kind === "bars") bar(i, value, value + second[i]);
      else if (second[i]) {
        context.beginPath();
        context.moveTo(i * step + step / 2, 1);
        context.lineTo(i * step + step / 2 + 4, 9);
        context.lineTo(i * step + step / 2 - 4, 9);
        context.fill();
      }
    });
  }
  context.fillStyle = colour("--dim");
  context.font = "11px system-ui, sans-serif";
  context.fillText("60 s ago", 0, height - 3);
  context.textAlign = "right";
  context.fillText("now", width, height - 3);
  context.fillText(count(top), width, 9);
  context.textAlign = "left";
  const words = chart.columns.map(([column, , label]) =>
    chart.kind === "lines" ? `${label} now ${count(seconds[column].at(-1))}` : `${label} ${count(sum(seconds[column]))} in all`);
  canvas.setAttribute("aria-label", `${chart.title} in the last minute: ${words.join(", ")}; at most ${count(top)}`);
}

// --- tables ---------------------------------------------------------------------------------------

function rows(table, found) {
  keyed($(table).tBodies[0], found, ([first]) => first,
    ([first, ...rest]) => el("tr", {}, el("th", { scope: "row", title: first }, first), ...rest.map(() => el("td", {}))),
    (node, [, ...rest]) => rest.forEach((value, i) => text(node.children[i + 1], value)));
}

function showLatency() {
  const { ttft, itl } = latest.latency_ms;
  const row = (label, of, unit) => [label, ...[of.p50, of.p90, of.p99].map(milliseconds), of.count ? plural(of.count, unit) : "–"];
  rows("latency", [row("To first token", ttft, "request"), row("Between tokens", itl, "token")]);
}

function showTenants({ core, service }) {
  const found = new Map();
  const of = (tenant) => {
    if (!found.has(tenant)) found.set(tenant, { running: 0, waiting: 0, service: 0 });
    return found.get(tenant);
  };
  for (const request of core?.requests ?? []) of(request.tenant)[request.status === "running" ? "running" : "waiting"]++;
  for (const [tenant, charged] of Object.entries(service)) of(tenant).service = charged;
  const total = sum(Object.values(service));
  text($("tenants-note"), total ? "share of the service of the last minute" : "");
  $("tenants-none").hidden = found.size > 0;
  $("tenants").hidden = !found.size;
  const sorted = [...found].sort(([a, x], [b, y]) => y.service - x.service || y.running - x.running || a.localeCompare(b));
  rows("tenants", sorted.slice(0, 20).map(([tenant, each]) =>
    [tenant, count(each.running), count(each.waiting), total ? `${Math.round((100 * each.service) / total)} %` : "–"]));
}

function showTiers(tiers) {
  const found = Object.entries(tiers);
  $("tiers-section").hidden = !found.length;
  rows("tiers", found.map(([tier, each]) => [
    each.is_off ? `${tier} (off)` : tier, count(each.blocks ?? 0),
    each.capacity_bytes ? `${bytes(each.bytes ?? 0)} of ${bytes(each.capacity_bytes)}` : bytes(each.bytes ?? 0),
    count(each.saved_blocks ?? 0), count(each.loaded_blocks ?? 0),
  ]));
}

function showAdapters(core) {
  const found = new Map((latest.served_adapters ?? []).map((adapter) => [adapter, { running: 0, waiting: 0, memory: false }]));
  const of = (adapter) => {
    if (!found.has(adapter)) found.set(adapter, { running: 0, waiting: 0, memory: false });
    return found.get(adapter);
  };
  for (const adapter of core?.adapters ?? []) of(plain(adapter)).memory = true;
  for (const request of core?.requests ?? []) {
    if (request.adapter) of(plain(request.adapter))[request.status === "running" ? "running" : "waiting"]++;
  }
  $("adapters-section").hidden = !found.size;
  rows("adapters", [...found].slice(0, 50).map(([adapter, each]) => [adapter, count(each.running), count(each.waiting), each.memory ? "yes" : "no"]));
}

// --- one request ----------------------------------------------------------------------------------

function showRequest(id) {
  open = { id, request: requests().find((each) => each.request_id === id) ?? null, ended: false };
  $("why").replaceChildren();
  for (const part of ["why", "why-title"]) $(part).hidden = true;
  const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = `var(${hue(id)})`;
  $("detail-title").replaceChildren(swatch, `Request ${name(id)}`);
  showDetail();
  $("detail").showModal();
  point(id);
  explain();
}

function showDetail() {
  if (!open) return;
  const now = requests().find((each) => each.request_id === open.id);
  open.ended = !now && open.request !== null;
  open.request = now ?? open.request;
  const request = open.request;
  if (!request) return;
  const { share, inPrompt, text: words } = progress(request);
  const state = open.ended ? "It has ended." : request.wait ? `${request.status[0].toUpperCase()}${request.status.slice(1)}: ${reason(request)}.` : `Running: ${words}.`;
  text($("detail-state"), state);
  $("detail-bar").firstChild.style.width = `${(100 * Math.min(1, request.wait ? 0 : share)).toFixed(1)}%`;
  $("detail-bar").firstChild.style.background = inPrompt ? "var(--c0)" : "var(--c4)";
  const facts = [
    ["Tenant", request.tenant], ["Adapter", request.adapter ? plain(request.adapter) : ""], ["Priority", request.priority ? String(request.priority) : ""],
    ["Prompt", plural(request.prompt_tokens, "token")],
    ["Found in the cache", request.cached_tokens ? plural(request.cached_tokens, "token") : ""],
    ["Computed", plural(request.computed_tokens ?? 0, "token")],
    ["Generated", `${count(request.output_tokens ?? 0)} of at most ${count(request.max_tokens ?? 0)}`],
    ["KV blocks", request.blocks ? `${count(request.blocks)}${request.shared_blocks ? `, of which others hold ${count(request.shared_blocks)} too` : ""}` : "none"],
    ["Since it came", duration(request.seconds ?? 0)], ["Of that, queued", duration(request.queued_seconds ?? 0)],
    ["Preempted", request.preemptions ? plural(request.preemptions, "time") : ""],
  ].filter(([, value]) => value);
  keyed($("facts"), facts.flatMap(([label, value]) => [["dt", label, label], ["dd", label, value]]), ([tag, label]) => `${tag} ${label}`,
    ([tag]) => el(tag, {}), (node, [, , value]) => text(node, value));
}

/** Its explanation, if the server has one: the facts have to do otherwise. */
async function explain() {
  const { id, ended } = open, now = performance.now();
  if (open.asked !== undefined && now - open.asked < EXPLAIN_PERIOD && ended === open.askedEnded) return;
  open.asked = now;
  open.askedEnded = ended;
  try {
    const response = await call(`debug/requests/${name(id)}`);
    if (!response.ok || open?.id !== id) return;
    const found = (await response.json()).requests ?? [];
    const own = found.filter((each) => each.id === name(id));  // a client may have sent this name as its id
    const sentences = (own.find((each) => each.replica === chosen) ?? own[0])?.explanation;
    if (!Array.isArray(sentences) || open?.id !== id) return;
    for (const part of ["why", "why-title"]) $(part).hidden = !sentences.length;
    keyed($("why"), sentences.map((sentence, i) => [i, String(sentence)]), ([i]) => i, () => el("li", {}), (node, [, sentence]) => text(node, sentence));
  } catch { /* the next look says that the server does not answer */ }
}

$("detail").addEventListener("close", () => { open = null; point(null); });
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

// --- the page -------------------------------------------------------------------------------------

$("blocks").addEventListener("pointermove", pointAtBlock);
$("blocks").addEventListener("pointerleave", () => { text($("where"), ""); point(null); });
$("blocks").addEventListener("click", (event) => {
  const owner = ownerAt(cellAt(event));
  if (owner !== null) showRequest(owner);
});
$("replica").addEventListener("change", () => { chosen = Number($("replica").value); show(); });
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  text($("pause"), paused ? "Continue" : "Pause");
  if (!paused) poll();
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("secret").value);
  $("secret").value = "";
  $("key").hidden = true;
  poll();
});
document.addEventListener("visibilitychange", poll);
for (const query of ["(prefers-color-scheme: dark)"]) matchMedia(query).addEventListener("change", () => latest && show());
let resizing = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => latest && replica() && (drawBlocks(), drawCharts(replica().seconds)));
}).observe(document.querySelector("main"));
poll();
