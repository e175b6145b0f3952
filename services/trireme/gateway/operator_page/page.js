"use strict";

const NOW_MS = 2000;
const HISTORY_MS = 5000;
const HOUR_S = 3600;
const CURVES = [
  { field: "tokens_per_s", title: "tokens/s", digits: 0 },
  { field: "running", title: "running sequences", digits: 0 },
  { field: "waiting", title: "waiting requests", digits: 0 },
  { field: "draw_w", title: "power, W", digits: 1 },
  { field: "grams_co2e_per_kwh", title: "carbon, gCO2e/kWh", digits: 0 },
];

let samples = [];
let chosen = null;

// Texts are only ever set as text: names come from clients.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.map((child) => (child === null || child === undefined ? "" : child)));
  return made;
}

function seconds(value) {
  if (value === null || value === undefined) return "";
  return value < 1 ? `${(1000 * value).toFixed(1)} ms` : `${value.toFixed(2)} s`;
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

function bar(share, label) {
  const fill = element("i");
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return element("div", { class: "bar", role: "img", "aria-label": label, title: label }, fill);
}

function cell(content) {
  if (typeof content === "number") return element("td", { class: "number" }, content.toLocaleString("en"));
  return content instanceof HTMLTableCellElement ? content : element("td", {}, content);
}

function state(isGood, text) {
  return element("td", { class: isGood ? "good" : "bad" }, text);
}

function fill(id, heads, rows, empty) {
  const body = element("tbody");
  for (const row of rows) body.append(element("tr", {}, ...row.map(cell)));
  const isNumber = (column) => body.rows.length > 0 && body.rows[0].cells[column].classList.contains("number");
  const titles = heads.map((title, column) => element("th", { scope: "col", class: isNumber(column) ? "number" : null }, title));
  const head = element("thead", {}, element("tr", {}, ...titles));
  if (!rows.length) body.append(element("tr", {}, element("td", { colspan: heads.length, class: "hint" }, empty)));
  document.getElementById(id).replaceChildren(head, body);
}

function showNow(now) {
  const sick = now.processes.filter((process) => !process.healthy);
  const silent = [...now.stores, ...now.power, ...now.queues].filter((each) => each.silent);
  const headline = document.getElementById("headline");
  if (now.bus !== "answers") headline.textContent = `the bus is ${now.bus}`;
  else if (sick.length || silent.length) {
    const names = [...sick.map((p) => `${p.id}: ${p.status}`), ...silent.map((s) => `${s.id} does not answer: ${s.silent}`)];
    headline.textContent = names.join("; ");
  } else headline.textContent = `all ${now.processes.length} processes are well; seen ${new Date(1000 * now.at_unix_s).toLocaleTimeString()}`;
  headline.className = now.bus !== "answers" || sick.length || silent.length ? "bad" : "good";

  fill("workers", ["worker", "device", "variant", "running", "waiting", "KV", "prefill tok/s", "decode tok/s"],
    now.workers.flatMap((worker) => worker.variants.map((v) => [
      worker.id, worker.device,
      v.ready && !worker.draining ? state(true, v.variant) : state(false, `${v.variant} (${worker.draining ? "draining" : "not ready"})`),
      element("td", { class: "number" }, `${v.running} / ${v.max_sequences}`), v.waiting,
      bar(v.kv_blocks ? v.kv_blocks_used / v.kv_blocks : 0, `${v.kv_blocks_used} of ${v.kv_blocks} blocks`),
      Math.round(v.prefill_tokens_per_s), Math.round(v.decode_tokens_per_s),
    ])), "no worker is registered");

  fill("queues", ["scheduler", "waiting", "oldest", "longest by tenant"],
    now.queues.map((queue) => queue.silent ? [queue.id, state(false, queue.silent), "", ""] : [
      queue.id, queue.waiting + queue.unread, seconds(queue.oldest_s),
      queue.tenants.filter((t) => t.waiting).slice(0, 5).map((t) => `${t.tenant}: ${t.waiting}`).join(", "),
    ]), "no scheduler is registered");

  fill("tiers", ["node", "tier", "used", "", "blocks", "hits", "evictions", "state"],
    now.stores.flatMap((store) => store.silent ? [[store.node, state(false, store.silent), "", "", "", "", "", ""]]
      : store.tiers.map((t) => [
        store.node, t.tier, `${bytes(t.used_bytes)} of ${bytes(t.capacity_bytes)}`,
        bar(t.capacity_bytes ? t.used_bytes / t.capacity_bytes : 0, "share in use"),
        t.blocks, t.hits, t.evictions, state(t.state === "serving", t.state),
      ])), "no KV store is registered");

  fill("power", ["node", "meter", "draw", "carbon", "last hour", "of it idle"],
    now.power.flatMap((node) => node.silent ? [[node.node, state(false, node.silent), "", "", "", ""]]
      : node.meters.map((meter, index) => [
        node.node, element("td", { title: meter.description }, `${meter.meter} ${meter.device}`), `${meter.draw_w.toFixed(1)} W`,
        `${node.grams_co2e_per_kwh.toFixed(0)} gCO2e/kWh (${node.carbon_source})`,
        index ? "" : `${(node.last_hour.metered_joules / 3600).toFixed(2)} Wh, ${node.last_hour.metered_grams_co2e.toFixed(2)} gCO2e`,
        index || !node.last_hour.metered_joules ? "" : `${(100 * node.last_hour.idle_joules / node.last_hour.metered_joules).toFixed(0)} %`,
      ])), "no power service is registered");

  fill("processes", ["service", "id", "node", "pid", "since", "state"],
    now.processes.map((process) => [
      process.service, process.id, process.node, element("td", { class: "number" }, String(process.pid)),
      new Date(1000 * process.started_unix_s).toLocaleString(), state(process.healthy, process.healthy ? "well" : process.status),
    ]), "the registry is empty");
}

function showCurves() {
  const until = samples.length ? samples[samples.length - 1].at_unix_s : 0;
  const span = samples.length ? Math.max(60, until - samples[0].at_unix_s) : HOUR_S;
  const figures = CURVES.map((curve, index) => {
    const most = Math.max(1e-9, ...samples.map((sample) => sample[curve.field]));
    const points = samples.map((sample) => {
      const x = 100 * (1 - (until - sample.at_unix_s) / span);
      return `${x.toFixed(2)},${(38 - 36 * sample[curve.field] / most).toFixed(2)}`;
    });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 40");
    svg.setAttribute("preserveAspectRatio", "none");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", points.length ? `M${points.join("L")}` : "");
    path.setAttribute("class", `c${index}`);
    svg.append(path);
    const last = samples.length ? samples[samples.length - 1][curve.field].toFixed(curve.digits) : "–";
    return element("figure", { "data-curve": curve.field },
      element("figcaption", {}, element("span", {}, curve.title), element("b", {}, last)), svg,
      element("figcaption", {}, element("span", {}, `${Math.round(span / 60)} min ago`),
        element("span", {}, `at most ${samples.length ? most.toFixed(curve.digits) : "–"}`)));
  });
  document.getElementById("curves").replaceChildren(...figures);
}

function showRequests(requests) {
  fill("requests", ["ended request", "tenant", "model", "outcome", "first token", "all", "tokens in", "cached", "out"],
    requests.map((r) => [
      r.request_id, r.tenant, r.variant || r.model, state(r.outcome === "ok", r.outcome), seconds(r.ttft_s), seconds(r.seconds),
      r.prompt_tokens, r.cached_prompt_tokens, r.completion_tokens,
    ]), "none yet");
  document.querySelectorAll("#requests tbody tr").forEach((row, index) => {
    if (!requests.length) return;
    row.tabIndex = 0;
    row.classList.toggle("chosen", requests[index].request_id === chosen);
    row.addEventListener("click", () => choose(requests[index].request_id));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(requests[index].request_id); });
  });
}

async function choose(requestId) {
  chosen = requestId;
  const line = await get(`api/requests/${encodeURIComponent(requestId)}`);
  const whole = Math.max(1e-9, line.end_unix_s - line.start_unix_s);
  const fall = element("div", { class: "fall" });
  for (const phase of line.phases) {
    const mark = element("i", { class: phase.name });
    mark.style.left = `${100 * (phase.start_unix_s - line.start_unix_s) / whole}%`;
    mark.style.width = `${100 * (phase.end_unix_s - phase.start_unix_s) / whole}%`;
    fall.append(element("span", {}, phase.name.replace("_", " ")), element("div", { class: "track" }, mark),
      element("span", { class: "number" }, seconds(phase.end_unix_s - phase.start_unix_s)));
  }
  const told = [
    ["request", line.request_id], ["trace", line.trace_id || "none"], ["worker", line.worker_id], ["decision", line.decision],
    ["attempts", line.attempts], ["preemptions", line.preemptions],
    ["tokens", `${line.prompt_tokens} in (${line.cached_prompt_tokens} cached), ${line.completion_tokens} out`],
    ["KV loaded", `${line.kv_loaded_blocks} blocks in ${seconds(line.kv_load_s)}`],
    ["energy", `${line.joules.toFixed(2)} J, ${line.grams_co2e.toPrecision(3)} gCO2e`],
    ...line.events.map((event) => [event.name, `after ${seconds(event.at_unix_s - line.start_unix_s)} ${event.detail}`]),
  ];
  document.getElementById("waterfall").replaceChildren(
    element("h2", {}, `${seconds(whole)} in all`), fall,
    element("dl", {}, ...told.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, String(text))])));
  showRequests(await get("api/requests"));
}

async function get(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`);
  return response.json();
}

function repeat(work, periodMs) {
  const turn = async () => {
    try {
      if (!document.hidden) await work();
    } catch (error) {
      const headline = document.getElementById("headline");
      headline.className = "bad";
      headline.textContent = `the gateway does not answer: ${error.message}`;
    }
    setTimeout(turn, periodMs);
  };
  turn();
}

repeat(async () => {
  showNow(await get("api/now"));
  showRequests(await get("api/requests"));
}, NOW_MS);
repeat(async () => {
  const since = samples.length ? samples[samples.length - 1].at_unix_s : 0;
  const news = await get(`api/history?since_unix_s=${since}`);
  samples = [...samples, ...news.samples].filter((sample) => sample.at_unix_s > Date.now() / 1000 - HOUR_S);
  showCurves();
}, HISTORY_MS);
