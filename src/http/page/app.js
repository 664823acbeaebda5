// The frame around the views: which one is shown, the theme, and what is said about the connection.

import { fill, h } from "./dom.js";
import { connect, listen, live } from "./live.js";
import { clock, count, name } from "./words.js";
import { alertsView, chartsView, liveView, notFound, resultsView, scanView, studyView, uploadView, wallView } from "./views.js";

const main = document.getElementById("main");
const trouble = document.getElementById("trouble");
const ROUTES = [
  [/^\/$/, liveView, "Live"],
  [/^\/results$/, resultsView, "Results"],
  [/^\/alerts$/, alertsView, "Alerts"],
  [/^\/charts$/, chartsView, "Charts"],
  [/^\/upload$/, uploadView, "Upload"],
  [/^\/study\/([\w-]+)\/([\w-]+)\/([0-9a-f]{32})$/, studyView, "Study"],
  [/^\/scan\/([\w-]+)\/([\w-]+)\/([0-9a-f]{32})$/, scanView, "Scan"],
  [/^wall$/, wallView, "Wall"],
];

let shown = null;
let title = "Live";
let first = true;

function route() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const found = ROUTES.map(([pattern, view, word]) => [(path || "/").match(pattern), view, word]).find(([match]) => match);
  const [match, view, word] = found ?? [[], notFound, "Not found"];
  shown?.end?.();
  title = word;
  document.documentElement.classList.toggle("wall", view === wallView);
  shown = view(fill(main), match.slice(1), new URLSearchParams(query));
  for (const link of document.querySelectorAll("#views a")) {
    const current = link.getAttribute("href").slice(1) === (path || "/");
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  tellTitle();
  if (!first) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  first = false;
}

function tellTitle() {
  const waiting = [...live.alerts.values()].filter((alert) => !alert.acknowledged_by).length;
  document.title = `${waiting ? `(${waiting}) ` : ""}${title} - ScanSentry`;
}

function tellTrouble() {
  const lines = [];
  if (live.loaded && !live.server.connected) {
    lines.push(`Connection to the server lost at ${clock(live.server.since)}. What is shown is from before; trying again.`);
  } else if (live.loaded && !live.broker.connected) {
    const since = live.broker.since ? ` since ${clock(new Date(live.broker.since))}` : "";
    lines.push(`Broker away${since} (${live.broker.reason ?? "no reason given"}). Results are kept by the appliances and come later.`);
  }
  else if (live.loaded && live.broker.reason) lines.push(`Broker: ${live.broker.reason}.`);
  if (live.storage) lines.push(`${live.storage}`);
  const text = lines.join(" ");
  if (trouble.textContent !== text) fill(trouble, text && h("p", { class: "trouble" }, text));
  document.documentElement.classList.toggle("stale", lines.length > 0);
}

function announce(alerts) {
  const words = alerts.map((alert) => `New alert: tumour pattern found by this model, ${name(alert)}, ${count(alert.positives ?? 1, "picture")}.`);
  document.getElementById("announce").textContent = words.join(" ");
}

// What this dashboard does not have, by its configuration.
function partOf({ share, follow }) {
  return [
    follow?.length && `This dashboard follows ${follow.join(", ")} only.`,
    share && `One of the dashboards of the group ${share}: alerts and appliances are all here, of the results only its share; the others have the rest.`,
  ].filter(Boolean);
}

listen((kind, data) => {
  if (kind === "state") {
    document.getElementById("upload-link").hidden = !live.upload;
    fill(document.getElementById("part"), partOf(live.about).map((line) => h("p", { class: "notice" }, line)));
    fill(document.getElementById("about"), `ScanSentry ${live.about.version} · dashboard ${live.about.name}`);
  }
  if (kind === "connection") tellTrouble();
  if (kind === "alerts" && data.raised.length) announce(data.raised);
  if (kind === "alerts" || kind === "state") tellTitle();
});

const THEMES = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
function theme(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  themeButton.textContent = `Theme: ${choice}`;
  try { localStorage.setItem("theme", choice); } catch { /* a private window */ }
}
function savedTheme() {
  try { return localStorage.getItem("theme"); } catch { return null; }
}
let chosen = THEMES.includes(savedTheme()) ? savedTheme() : "system";
theme(chosen);
themeButton.addEventListener("click", () => {
  chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
  theme(chosen);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

addEventListener("hashchange", route);
connect();
route();
