// The console. Whatever comes from a database is hostile: it becomes text of a node, never markup, never an address.

import { plot } from "./plots.js";

const $ = (id) => document.getElementById(id);
const OVERVIEW_EVERY = 2000, HISTORY_EVERY = 10000, LETTERS_EVERY = 10000, TAIL_EVERY = 700;
const TAIL_LINES = 300;

function el(name, attributes, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") found.className = value;
    else if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) found.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children) if (child !== null && child !== undefined) found.append(child);
  return found;
}

// -- saying numbers ------------------------------------------------------------------------------------------------

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 s";
  if (value < 0.001) return "< 1 ms";
  if (value < 1) return `${value < 0.01 ? Number((value * 1000).toFixed(1)) : Math.round(value * 1000)} ms`;
  if (value < 10) return `${Number.isInteger(value) ? value : value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(value >= 1e5 ? 0 : 1)} k`;
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit += 1; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// -- talking to the daemon -----------------------------------------------------------------------------------------

let token = sessionStorage.getItem("cdc-token") || "";

async function ask(path, body) {
  const options = { headers: {}, cache: "no-store" };
  if (token) options.headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(answer.error || response.statusText), { status: response.status });
  return answer;
}

// Ask for what needs the token; ask the person for it first when it is missing or wrong.
async function change(path, body) {
  try {
    return await ask(path, body);
  } catch (error) {
    if (error.status !== 401 || !(await askForToken())) throw error;
    return ask(path, body);
  }
}

function askForToken() {
  const dialog = $("token-dialog");
  $("token-input").value = "";
  $("token-error").textContent = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const done = (found) => { dialog.close(); resolve(found); };
    $("token-cancel").onclick = () => done(false);
    dialog.oncancel = () => resolve(false);
    $("token-form").onsubmit = async (event) => {
      event.preventDefault();
      const before = token;
      token = $("token-input").value.trim();
      try {
        await ask("api/token", {});
        sessionStorage.setItem("cdc-token", token);
        done(true);
      } catch (error) {
        token = before;
        $("token-error").textContent = error.message;
      }
    };
  });
}

function confirmed(title, text, verb) {
  const dialog = $("ask-dialog");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = verb;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    $("ask-no").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

let toastTimer = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("shown"), 4000);
}

async function act(path, body, said) {
  try {
    const answer = await change(path, body);
    toast(answer.done || said);
  } catch (error) {
    toast(error.message);
  }
  refresh();
}

// -- the verdict ---------------------------------------------------------------------------------------------------

const WHY = {
  lost: "does not answer", stopped: "is stopped", hanging: "hangs", stalled: "is stalled", unserved: "is served by nobody",
  dropping: "fails and drops ephemeral changes",
};

function showVerdict(state) {
  const sinks = state.databases.flatMap((d) => d.sinks);
  const letters = sinks.reduce((sum, sink) => sum + (sink.dead_letters || 0), 0);
  const retrying = sinks.filter((sink) => sink.state === "retrying").length;
  const paused = sinks.filter((sink) => sink.paused).length;
  const drift = state.databases.reduce((sum, d) => sum + d.drift.length, 0);
  const notes = [];
  if (retrying) notes.push(`${many(retrying, "sink")} retrying`);
  if (letters) notes.push(many(letters, "dead letter"));
  if (drift) notes.push("triggers have drifted");
  if (state.reload.error) notes.push("the last reload was refused");
  if (paused) notes.push(`${many(paused, "sink")} paused`);
  const unknown = sinks.some((sink) => sink.pending === null) || !sinks.length;
  const kind = state.troubles.length ? "bad" : notes.length ? "warn" : unknown ? "unknown" : "good";
  const behind = Math.max(0, ...sinks.map((sink) => sink.lag_seconds || 0));
  const lost = state.troubles.filter((t) => t.sink === null).length, halted = state.troubles.filter((t) => t.sink !== null).length;
  const trouble = [
    lost ? `${lost} of ${many(state.databases.length, "database")} ${lost === 1 ? "does" : "do"} not answer` : "",
    halted ? `${halted} of ${many(sinks.length, "sink")} ${halted === 1 ? "does" : "do"} not deliver` : "",
  ].filter(Boolean).join(", ");
  const title = trouble || (notes.length ? "Delivering, with something to look at" : unknown ? "Looking" : "All is delivered");
  const text = state.troubles.length
    ? [...new Set(state.troubles.map((t) => (t.sink ? `${t.database} / ${t.sink}` : t.database)))].slice(0, 6).join(" · ")
    : notes.length ? notes.join(" · ")
    : unknown ? "Not everything is known yet"
    : `${many(sinks.length, "sink")} of ${many(state.databases.length, "database")}, ${behind < 1 ? "up to date" : `at most ${seconds(behind)} behind`}`;
  const place = $("verdict");
  place.className = `verdict ${kind}`;
  place.replaceChildren(el("div", { class: "lamp" }), el("div", {}, el("h2", {}, title), el("p", {}, text)));
  document.title = `${{ good: "", warn: "! ", bad: "✗ ", unknown: "" }[kind]}cdc · ${title.toLowerCase()}`;

  const items = state.troubles.map((t) => el("li", { class: "bad" },
    el("b", {}, `${t.database}${t.sink ? ` / ${t.sink}` : ""} ${WHY[t.reason] || t.reason}${t.seconds ? `, for ${seconds(t.seconds)}` : ""}`),
    el("span", {}, t.detail)));
  const seen = new Set();
  for (const database of state.databases) {
    const oldest = database.oldest_transaction;
    if (oldest && !seen.has(`${oldest.pid} ${oldest.prepared}`)) { // one cluster may hold several of the databases
      seen.add(`${oldest.pid} ${oldest.prepared}`);
      const who = oldest.prepared ? `prepared as ${oldest.prepared}` : `pid ${oldest.pid}`;
      const age = oldest.age_seconds === null ? "is open" : `has been open for ${seconds(oldest.age_seconds)}`;
      items.push(el("li", {}, el("b", {}, `A transaction in database ${oldest.database} ${age}`),
        el("span", {}, `${who}, ${[oldest.application, oldest.state].filter(Boolean).join(", ")}. Until it ends its changes are not delivered and the outbox is not given back.`)));
    }
    for (const sentence of database.drift.slice(0, 5)) {
      items.push(el("li", {}, el("b", {}, `${database.name}: trigger drift`), el("span", {}, `${sentence} (run cdc migrate)`)));
    }
    if (database.drift.length > 5) items.push(el("li", {}, el("b", {}, `${database.name}: and ${database.drift.length - 5} more`)));
    for (const sink of database.unknown_sinks) {
      items.push(el("li", {}, el("b", {}, `${database.name} / ${sink} is in no configuration`),
        el("span", {}, "Its position keeps the outbox from being given back (cdc sinks forget, if it is not coming back).")));
    }
  }
  if (state.reload.error) items.unshift(el("li", { class: "bad" }, el("b", {}, "The configuration was not reloaded; the old one stays"), el("span", {}, state.reload.error)));
  $("troubles").replaceChildren(...items);
}

// -- sinks ---------------------------------------------------------------------------------------------------------

const STATE = { running: "good", retrying: "warn", stalled: "warn", dropping: "bad", stopped: "bad", waiting: "", paused: "warn" };
const before = new Map(); // database/sink → [when, delivered]: the rate between two looks

function rate(name, sink, now) {
  const last = before.get(name);
  before.set(name, [now, sink.delivered]);
  if (!last || now <= last[0] || sink.delivered < last[1]) return sink.rate;
  return (sink.delivered - last[1]) / (now - last[0]);
}

function figure(value, label, kind, title) {
  return el("div", { class: `figure ${kind || ""}`, title: title || null }, el("b", {}, value), el("span", {}, label));
}

function showSink(state, database, sink) {
  const name = `${database.name}/${sink.name}`;
  const elsewhere = sink.state === "waiting" && sink.owner && sink.owner !== state.owner;
  const label = elsewhere ? "standby" : sink.state;
  const lag = sink.lag_seconds || 0;
  const actions = el("div", { class: "actions" });
  if (state.can_change) {
    const paused = sink.paused;
    actions.append(el("button", { class: "small", type: "button",
      onclick: async () => {
        if (paused || (await confirmed(`Pause ${sink.name}?`, `What ${database.name} changes waits in the outbox until you resume it.`, "Pause"))) {
          act(paused ? "api/sinks/resume" : "api/sinks/pause", { database: database.name, sink: sink.name }, paused ? "Resumed." : "Paused.");
        }
      } }, paused ? "Resume" : "Pause"));
  }
  const current = sink.stopped_because || (["retrying", "dropping", "waiting"].includes(sink.state) && !elsewhere ? sink.last_error : null);
  const old = !current && sink.last_error && sink.last_error_seconds < 900 ? sink.last_error : null;
  return el("div", { class: "sink" },
    el("div", { class: "name" }, el("span", { class: "called" }, sink.name), el("span", { class: `state ${elsewhere ? "" : STATE[sink.state] || ""}`, title: sink.owner || null }, label),
      el("span", { class: "kind" }, elsewhere ? `${sink.type}, served by ${sink.owner}` : sink.type || "")),
    figure(sink.lag_seconds === null ? "–" : lag < 0.05 ? "0 s" : seconds(lag), "behind", lag > 60 ? "bad" : lag > 5 ? "warn" : ""),
    figure(`${number(sink.pending)}${sink.pending_capped ? "+" : ""}`, "pending"),
    figure(`${number(rate(name, sink, state.now))}/s`, "delivered", "", `${sink.delivered} since the daemon began`),
    figure(seconds(sink.p99_seconds), "99 % within", "", `median ${seconds(sink.p50_seconds)}`),
    figure(number(sink.dead_letters), "dead letters", sink.dead_letters ? "bad" : ""),
    actions,
    current ? el("div", { class: "error" }, `${current}${sink.last_error_seconds !== null && !sink.stopped_because ? ` (${seconds(sink.last_error_seconds)} ago)` : ""}`)
      : old ? el("div", { class: "error old" }, `works again; last error ${seconds(sink.last_error_seconds)} ago: ${old}`) : null,
    sink.parked ? el("div", { class: "error old" }, `Later events of their keys wait behind ${many(sink.parked, "dead letter")}.`) : null,
    sink.dropped ? el("div", { class: "error old" }, `${many(sink.dropped, "ephemeral change")} dropped so far`) : null,
    ...sink.backfills.map((backfill) => showBackfill(state, database, sink, backfill)));
}

function showBackfill(state, database, sink, backfill) {
  const text = backfill.state === "failed" ? `Backfill of ${backfill.table} has failed: ${backfill.reason}`
    : `Backfill of ${backfill.table}: ${Math.round(backfill.share * 100)} %, ${number(backfill.rows_read)} rows`
      + (backfill.state === "paused" ? ", paused" : backfill.remaining_seconds === null ? "" : `, ${seconds(backfill.remaining_seconds)} left`);
  const line = el("div", { class: backfill.state === "failed" ? "error" : "error old" }, `${text} `);
  if (backfill.state !== "failed") line.append(el("progress", { max: "1", value: String(backfill.share), "aria-label": text }));
  if (state.can_change && backfill.state !== "failed") {
    const paused = backfill.state === "paused";
    line.append(" ", el("button", { class: "small", type: "button",
      onclick: () => act(paused ? "api/backfills/resume" : "api/backfills/pause", { database: database.name, sink: sink.name }, paused ? "Resumed." : "Paused."),
    }, paused ? "Resume rows" : "Pause rows"));
  }
  return line;
}

function showDatabase(state, database) {
  const facts = el("div", { class: "facts" });
  const say = (text, kind, title) => facts.append(el("span", { class: kind || "", title: title || null }, text));
  if (!database.up && !database.trouble && database.silent_seconds < 10) say("being looked at");
  else if (!database.up) say(database.trouble ? `no answer for ${seconds(database.silent_seconds)}: ${database.trouble}` : `no answer for ${seconds(database.silent_seconds)}`, "bad");
  else {
    say(database.armed ? "asleep, rung by writers" : "awake, polling", "", "Whether NOTIFY wakes the daemon, or it polls");
    const full = database.outbox_bytes > database.outbox_alarm_bytes;
    say(`outbox ${bytes(database.outbox_bytes)}`, full ? "bad" : "");
    if (database.notify_queue_usage > 0.1) say(`notification queue ${Math.round(database.notify_queue_usage * 100)} % full`, "warn");
    say(database.drift.length ? `drift in ${many(database.drift.length, "table")}` : "no drift", database.drift.length ? "warn" : "");
  }
  return el("article", { class: "database" },
    el("div", { class: "title" }, el("h3", {}, database.name), facts),
    ...database.sinks.map((sink) => showSink(state, database, sink)),
    database.sinks.length ? null : el("div", { class: "sink quiet" }, "No sink is fed from this database."));
}

let overview = null;

async function showOverview() {
  try {
    overview = await ask("api/overview");
    $("connection").textContent = "";
  } catch (error) {
    overview = null;
    $("connection").textContent = "no answer";
    $("verdict").className = "verdict bad";
    $("verdict").replaceChildren(el("div", { class: "lamp" }), el("div", {}, el("h2", {}, "The daemon does not answer"), el("p", {}, `${error.message}. Trying on; what is shown below is old.`)));
    document.title = "✗ cdc · no answer";
    return;
  }
  const state = overview;
  $("owner").textContent = state.owner;
  $("version").textContent = `cdc ${state.version}`;
  $("token-button").hidden = !state.can_change;
  const sinks = state.databases.flatMap((d) => d.sinks);
  $("totals").textContent = sinks.length ? `${number(sinks.reduce((sum, sink) => sum + sink.delivered, 0))} events since the daemon began` : "";
  showVerdict(state);
  $("databases").replaceChildren(...(state.databases.length ? state.databases.map((d) => showDatabase(state, d)) : [el("p", { class: "empty" }, "No database is configured.")]));
  $("letters-section").hidden = !sinks.some((sink) => sink.dead_letters);
}

// -- plots ---------------------------------------------------------------------------------------------------------

let past = { interval: 10, sinks: [] };

async function showHistory() {
  try {
    past = await ask("api/history");
  } catch {
    return; // the verdict says it
  }
  const select = $("plot-sink"), chosen = select.value;
  const names = past.sinks.map((one) => `${one.database} / ${one.sink}`);
  if (select.options.length !== names.length + 1 || names.some((name, index) => select.options[index + 1].textContent !== name)) {
    select.replaceChildren(el("option", { value: "" }, "all sinks"), ...names.map((name) => el("option", { value: name }, name)));
    select.value = names.includes(chosen) ? chosen : "";
  }
  drawPlots();
}

// All sinks as one: rates and backlogs add up, of latencies the worst counts.
function merged(chosen) {
  const sinks = past.sinks.filter((one) => !chosen || `${one.database} / ${one.sink}` === chosen);
  if (sinks.length === 1) return sinks[0];
  const slots = new Map();
  const add = (a, b) => (b === null ? a : a === null ? b : a + b), worst = (a, b) => (b === null ? a : a === null ? b : Math.max(a, b));
  for (const one of sinks) {
    one.at.forEach((moment, index) => {
      const slot = Math.round(moment / past.interval);
      const here = slots.get(slot) || { at: moment, rate: null, p50: null, p99: null, pending: null };
      here.rate = add(here.rate, one.rate[index]);
      here.pending = add(here.pending, one.pending[index]);
      here.p50 = worst(here.p50, one.p50[index]);
      here.p99 = worst(here.p99, one.p99[index]);
      slots.set(slot, here);
    });
  }
  const rows = [...slots.entries()].sort((a, b) => a[0] - b[0]).map(([, row]) => row);
  return Object.fromEntries(["at", "rate", "p50", "p99", "pending"].map((key) => [key, rows.map((row) => row[key])]));
}

function drawPlots() {
  const data = merged($("plot-sink").value);
  const now = overview ? overview.now : Date.now() / 1000;
  const options = { now, interval: past.interval };
  plot($("plot-rate"), [{ at: data.at, values: data.rate, area: true }], { ...options, format: number, description: "Events per second over the last hour" });
  plot($("plot-latency"), [{ at: data.at, values: data.p50 }, { at: data.at, values: data.p99, second: true }],
    { ...options, format: (value) => (value ? seconds(value) : "0"), description: "Seconds from change to acknowledgement over the last hour" });
  plot($("plot-pending"), [{ at: data.at, values: data.pending, area: true }], { ...options, format: number, description: "Pending events over the last hour" });
  const last = (values) => (values.length ? values[values.length - 1] : null);
  $("now-rate").textContent = last(data.rate) === null ? "" : `${number(last(data.rate))}/s`;
  $("now-latency").textContent = last(data.p99) === null ? "" : seconds(last(data.p99));
  $("now-pending").textContent = last(data.pending) === null ? "" : number(last(data.pending));
}

// -- dead letters --------------------------------------------------------------------------------------------------

async function showLetters() {
  if (!overview || $("letters-section").hidden) return;
  let found;
  try {
    found = await ask("api/dead-letters");
  } catch (error) {
    $("letters").replaceChildren(el("p", { class: "empty" }, error.status === 401 ? "Showing them needs the token, because row values are shown here." : error.message));
    return;
  }
  const open = new Set([...$("letters").querySelectorAll("details[open]")].map((one) => one.dataset.id));
  $("letters").replaceChildren(...found.letters.map((letter) => showLetter(letter, open)));
  if (found.more) $("letters").append(el("p", { class: "quiet" }, "There are more; cdc dead-letters list shows them all."));
  const groups = [...new Set(found.letters.map((l) => JSON.stringify([l.database, l.sink])))].map((text) => JSON.parse(text));
  $("letters-actions").replaceChildren(...(overview.can_change ? groups.map(([database, sink]) => el("button", { class: "small", type: "button",
    onclick: async () => {
      if (await confirmed(`Replay all of ${database} / ${sink}?`, "Each is delivered again; what fails again stays a dead letter.", "Replay all")) {
        act("api/dead-letters/replay", { database, sink }, "They are delivered again.");
      }
    } }, `Replay all of ${sink}`)) : []));
}

function showLetter(letter, open) {
  const id = `${letter.database}/${letter.sink}/${letter.id}`;
  const body = { database: letter.database, sink: letter.sink, ids: [letter.id] };
  const actions = el("div", { class: "actions" });
  if (overview.can_change) {
    actions.append(
      el("button", { class: "small", type: "button", onclick: () => act("api/dead-letters/replay", body, "It is delivered again.") }, "Replay"),
      el("button", { class: "small danger", type: "button", onclick: async () => {
        if (await confirmed("Discard this event?", `${letter.event_id} will never be delivered to ${letter.sink}.`, "Discard")) act("api/dead-letters/discard", body, "Discarded.");
      } }, "Discard"));
  }
  return el("article", { class: "letter" },
    el("div", { class: "what" }, `${letter.database} / ${letter.sink}: ${letter.op || "event"} ${letter.table || ""}`),
    el("div", { class: "when" }, `${letter.event_id} · ${new Date(letter.died_at).toLocaleString()}${letter.attempts > 1 ? ` · ${letter.attempts} attempts` : ""}${letter.parked ? " · later events of its key wait" : ""}${letter.wanted ? " · to be delivered again" : ""}`),
    actions,
    el("div", { class: "why" }, letter.reason),
    letter.event ? el("details", { "data-id": id, open: open.has(id) }, el("summary", {}, "event"), el("pre", {}, letter.event)) : null);
}

// -- live tail -----------------------------------------------------------------------------------------------------

const tail = { on: false, run: 0, after: null, events: [], timer: 0 };

function text(raw) { // a JSON value without the quotes a person does not need
  if (raw.startsWith('"') && raw.endsWith('"')) {
    try {
      const value = JSON.parse(raw);
      return value === "" || value !== value.trim() ? raw : value;
    } catch { /* it was cut */ }
  }
  return raw;
}

function showEvent(event) {
  const line = el("li", {},
    el("time", { datetime: event.ts }, new Date(event.ts).toLocaleTimeString([], { hour12: false })),
    el("span", { class: `op ${event.op}` }, event.op),
    el("span", { class: "table" }, `${event.database}.${event.schema === "public" ? "" : `${event.schema}.`}${event.table}`));
  const cell = (column, was, is) => line.append(el("span", { class: "cell" }, el("span", { class: "col" }, `${column} `),
    was === undefined ? null : el("span", { class: "was" }, text(was)), was !== undefined && is !== undefined ? " → " : null,
    is === undefined ? null : el("span", { class: "is" }, text(is))));
  if (event.key) line.append(el("span", { class: "id" }, Object.values(event.key).map(text).join(" / ")));
  if (event.truncated) line.append(el("span", { class: "quiet" }, "too large: only the key is known"));
  else if (event.op === "update" && event.before !== undefined) {
    for (const column of event.changed || []) cell(column, event.before ? event.before[column] : undefined, event.after ? event.after[column] : undefined);
  } else if (event.after || event.before) {
    for (const [column, value] of Object.entries(event.after || event.before)) {
      if (!(event.key && column in event.key) && value !== "null") event.after ? cell(column, undefined, value) : cell(column, value, undefined);
    }
  } else if (event.changed) line.append(el("span", { class: "quiet" }, event.changed.join(", ")));
  return line;
}

function matches(event, wanted) {
  return wanted.every((word) => event.haystack.includes(word));
}

function drawTail() {
  const wanted = $("tail-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = tail.events.filter((event) => event.gap || matches(event, wanted));
  $("tail").replaceChildren(...found.map((event) => event.gap ? el("li", { class: "gap" }, `${number(event.gap)} more passed by`) : showEvent(event)));
  if (tail.on) {
    const base = overview && !overview.shows_values ? "Row values are hidden (http.show_values). " : "";
    $("tail-note").textContent = base + (tail.error || (found.length ? "" : wanted.length && tail.events.length ? "Nothing that matches yet." : "Waiting for changes…"));
  }
}

async function readTail() {
  const run = tail.run;
  const over = () => run !== tail.run; // stopped, perhaps started again, while the daemon was asked
  try {
    const answer = await ask(`api/tail${tail.after === null ? "" : `?after=${tail.after}`}`);
    if (over()) return;
    const first = tail.after === null;
    tail.after = answer.last;
    tail.error = Object.entries(answer.errors).map(([name, error]) => `${name}: ${error}`).join(" · ");
    const fresh = answer.events.map((event) => ({ ...event,
      haystack: [event.database, event.schema, event.table, event.op, ...(event.changed || []), JSON.stringify([event.key, event.before, event.after])].join(" ").toLowerCase() })).reverse();
    if (answer.missed > 0) fresh.push({ gap: answer.missed });
    if (fresh.length) tail.events = [...fresh, ...tail.events].slice(0, TAIL_LINES);
    if (first || fresh.length || !tail.events.length || tail.error) drawTail();
  } catch (error) {
    if (over()) return;
    if (error.status === 401) {
      if (!(await askForToken())) { toggleTail(false); $("tail-note").textContent = "The tail shows row values here, and needs the token."; return; }
    } else {
      tail.error = error.message;
      drawTail();
    }
  }
  if (!over()) tail.timer = setTimeout(readTail, TAIL_EVERY);
}

function toggleTail(on) {
  clearTimeout(tail.timer);
  Object.assign(tail, { on, run: tail.run + 1, after: null, error: "" });
  $("tail-toggle").textContent = on ? "Stop" : "Start";
  $("tail-note").textContent = on ? "Starting…" : "Stopped.";
  if (on) readTail();
}

// -- going on ------------------------------------------------------------------------------------------------------

async function refresh() {
  await showOverview();
  await showLetters();
}

function every(action, pause) {
  const again = async () => {
    if (!document.hidden) await action().catch(() => {});
    setTimeout(again, pause);
  };
  again();
}

$("tail-toggle").addEventListener("click", () => toggleTail(!tail.on));
$("tail-filter").addEventListener("input", drawTail);
$("token-button").addEventListener("click", async () => { if (await askForToken()) toast("The token is right."); });
$("plot-sink").addEventListener("change", drawPlots);
addEventListener("resize", drawPlots);
document.addEventListener("visibilitychange", () => { if (!document.hidden) { refresh(); showHistory(); } });
showOverview().then(() => { every(showHistory, HISTORY_EVERY); every(showLetters, LETTERS_EVERY); setTimeout(() => every(showOverview, OVERVIEW_EVERY), OVERVIEW_EVERY); });
