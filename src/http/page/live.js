// What the page knows, kept up to date by the server's events. Views listen for changes.
//
// The connection is judged by its ticks (every 5 s): without one for 15 s, or after an error, the server counts as lost, what is shown is
// marked as old, and the page tries again until it is back. Then everything is asked for anew.

const SILENCE_MS = 15_000;
const AGAIN_MS = 2_000;
const KEPT_ROWS = 60;
const RELOAD_MS = 500;

export const live = {
  appliances: new Map(),
  alerts: new Map(),
  rows: [],
  openAlerts: 0,
  loaded: false,
  server: { connected: false, since: new Date(), heard: null },
  broker: { connected: true, since: null, reason: null },
  storage: null,
  upload: null,
  about: {},
};

const listeners = new Set();
let token = "";
let source = null;
let heard = 0;
let again = 0;
let reload = 0;

// `listener(kind, data)` with kind state | rows | previews | appliances | alerts | connection; returns what ends it.
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(kind, data) {
  for (const listener of [...listeners]) {
    // One view that cannot show something must not keep the news from the others.
    try { listener(kind, data); } catch (error) { console.error(error); }
  }
}

const keyOf = (thing) => `${thing.site}/${thing.device}`;
const alertKey = (alert) => `${keyOf(alert)}/${alert.alert_id}`;
export const needsAttention = (alert) => !alert.closed || !alert.acknowledged_by;

// The server's JSON, or an error whose message is the server's line.
export async function ask(path, { method = "GET", body } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method, body: body && JSON.stringify(body), credentials: "same-origin",
      headers: method === "GET" ? {} : { "content-type": "application/json", "x-scansentry-token": token },
    });
  } catch {
    throw new Error("server: does not answer; the page tries again by itself");
  }
  if (response.status === 401) {
    location.assign("/login");
    throw new Error("login: is needed");
  }
  let answer = {};
  try { answer = await response.json(); } catch { /* an error without JSON */ }
  if (!response.ok) throw new Error(answer.error ?? `server: answered with ${response.status}; try again`);
  return answer;
}

export const uploadToken = () => token;

function tick(data) {
  live.broker = data.broker;
  live.storage = data.storage;
  live.server.heard = new Date();
  tell("connection");
}

async function load() {
  const [state, results] = await Promise.all([ask("/api/state"), ask(`/api/results?limit=${KEPT_ROWS}`)]);
  token = state.token;
  live.appliances = new Map(state.appliances.map((a) => [keyOf(a), a]));
  live.alerts = new Map(state.alerts.map((a) => [alertKey(a), a]));
  live.openAlerts = state.open_alerts;
  live.rows = results.rows;
  live.upload = state.upload;
  live.about = { name: state.name, version: state.version, share: state.share, follow: state.follow };
  live.loaded = true;
  tick(state);
  tell("state");
}

function reloadSoon() {
  reload ||= setTimeout(() => { reload = 0; load().catch(lost); }, RELOAD_MS);
}

function lost() {
  if (live.server.connected) live.server = { ...live.server, connected: false, since: new Date() };
  tell("connection");
  source?.close();
  clearTimeout(again);
  again = setTimeout(connect, AGAIN_MS);
}

function on(name, handle) {
  source.addEventListener(name, (event) => {
    heard = Date.now();
    handle(JSON.parse(event.data));
  });
}

export function connect() {
  source?.close();
  source = new EventSource("/api/events");
  heard = Date.now();
  source.onerror = () => {
    // A login that has ended shows in the next question, not here.
    if (live.loaded) ask("/api/state").catch(() => {});
    lost();
  };
  on("hello", async () => {
    try {
      await load();
      live.server = { connected: true, since: new Date(), heard: new Date() };
      tell("connection");
    } catch {
      lost();
    }
  });
  on("tick", tick);
  on("resync", () => load().catch(lost));
  on("results", ({ rows, more }) => {
    const known = new Set(rows.map((row) => `${keyOf(row)}/${row.scan_id}/${row.frame}`));
    const fresh = rows.toReversed();
    live.rows = [...fresh, ...live.rows.filter((row) => !known.has(`${keyOf(row)}/${row.scan_id}/${row.frame}`))].slice(0, KEPT_ROWS);
    tell("rows", { rows: fresh, more });
  });
  on("previews", (previews) => {
    const byScan = new Map(previews.map((p) => [`${keyOf(p)}/${p.scan_id}/${p.frame}`, p]));
    for (const row of live.rows) Object.assign(row, byScan.get(`${keyOf(row)}/${row.scan_id}/${row.frame}`));
    tell("previews", byScan);
  });
  on("appliances", (appliances) => {
    for (const appliance of appliances) live.appliances.set(keyOf(appliance), appliance);
    tell("appliances", appliances);
  });
  on("alerts", (alerts) => {
    const raised = [];
    // The server lists the newest alerts only, and says how many there are.
    const partly = live.openAlerts > live.alerts.size;
    for (const alert of alerts) {
      const key = alertKey(alert);
      if (needsAttention(alert)) {
        if (!live.alerts.has(key) && !alert.acknowledged_by) raised.push(alert);
        live.alerts.set(key, alert);
      } else {
        live.alerts.delete(key);
      }
    }
    if (partly) reloadSoon();
    else live.openAlerts = live.alerts.size;
    tell("alerts", { alerts, raised });
  });
}

setInterval(() => {
  if (Date.now() - heard > SILENCE_MS && live.server.connected) lost();
}, 1000);

export const rowKey = (row) => `${keyOf(row)}/${row.scan_id}/${row.frame}`;
export const sortedAlerts = () => [...live.alerts.values()].sort((a, b) => b.raised_at.localeCompare(a.raised_at));
export const sortedAppliances = () => [...live.appliances.values()].sort((a, b) => keyOf(a).localeCompare(keyOf(b)));

export function acknowledge(alert, takeBack = false) {
  const { site, device, alert_id } = alert;
  return ask("/api/ack", { method: "POST", body: { site, device, alert_id, take_back: takeBack } });
}
