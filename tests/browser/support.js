// What the browser tests and the screenshots share: a real Mosquitto, the real program, a real Chromium, generated slices.

import { spawn, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, openSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const ROOT = join(dirname(fileURLToPath(import.meta.url)), "../..");
const PROGRAM = process.env.SCANSENTRY_PROGRAM ?? join(ROOT, "target/debug/scansentry");
const BROWSER = process.env.SCANSENTRY_CHROMIUM ?? "/usr/bin/chromium";
export const PATIENCE = 60_000;

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export async function waitFor(what, condition, patience = PATIENCE) {
  const end = Date.now() + patience;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`waited too long for ${what}`);
    await pause(50);
  }
}

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

function ended(child) {
  return child.exitCode !== null || child.signalCode !== null ? Promise.resolve() : new Promise((resolve) => child.once("exit", resolve));
}

// A broker, an appliance with its dashboard, and a browser; all in temporary folders, all gone after close().
export class Stage {
  static async open({ config = "" } = {}) {
    const stage = new Stage();
    stage.folder = mkdtempSync(join(tmpdir(), "scansentry-browser-"));
    stage.port = await freePort();
    stage.http = await freePort();
    stage.url = `http://127.0.0.1:${stage.http}`;
    writeFileSync(join(stage.folder, "mosquitto.conf"),
      `listener ${stage.port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location ${stage.folder}/\nmax_queued_messages 0\n${process.getuid() === 0 ? "user root\n" : ""}`);
    mkdirSync(stage.export);
    writeFileSync(join(stage.folder, "config.toml"), `
[watch]
folder = '${stage.export}'
settle_ms = 200
[model]
bundle = '${join(ROOT, "models/braintumor")}'
[state]
dir = '${join(stage.folder, "state")}'
[mqtt]
url = 'mqtt://127.0.0.1:${stage.port}'
backoff_min_ms = 100
backoff_max_s = 1
[http]
listen = '127.0.0.1:${stage.http}'
[dashboard]
enabled = true
[log]
format = "text"
${config}`);
    await stage.startBroker();
    await stage.startDaemon();
    stage.browser = await chromium.launchPersistentContext(join(stage.folder, "profile"), {
      executablePath: BROWSER, headless: true, viewport: { width: 1280, height: 900 }, reducedMotion: "reduce", colorScheme: "light",
      args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
    });
    stage.errors = [];
    return stage;
  }

  get export() { return join(this.folder, "export"); }

  async startBroker() {
    const log = openSync(join(this.folder, "mosquitto.log"), "a");
    this.broker = spawn("mosquitto", ["-c", join(this.folder, "mosquitto.conf")], { stdio: ["ignore", log, log], env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` } });
    await waitFor("the broker", () => this.publish("probe", "{}").status === 0);
  }

  async stopBroker() {
    this.broker.kill("SIGTERM");
    await ended(this.broker);
  }

  async startDaemon() {
    const log = openSync(join(this.folder, "log"), "a");
    this.daemon = spawn(PROGRAM, ["run", "--config", join(this.folder, "config.toml")], { stdio: ["ignore", log, log] });
    await waitFor("the dashboard", async () => {
      if (this.daemon.exitCode !== null) throw new Error(`the daemon ended:\n${readFileSync(join(this.folder, "log"), "utf8")}`);
      try { return (await (await fetch(`${this.url}/api/state`)).json()).broker.connected; } catch { return false; }
    });
  }

  async stopDaemon() {
    this.daemon.kill("SIGTERM");
    await ended(this.daemon);
  }

  // A page with its errors gathered: the console must stay empty but for the losses that a test makes.
  async page(hash = "", { width = 1280, height = 900 } = {}) {
    const page = await this.browser.newPage();
    await page.setViewportSize({ width, height });
    page.on("pageerror", (error) => this.errors.push(String(error)));
    page.on("console", (message) => {
      if (message.type() === "error" && !/Failed to load resource|ERR_/.test(message.text())) this.errors.push(message.text());
    });
    await page.goto(`${this.url}/${hash}`);
    await page.waitForFunction(() => !document.querySelector("main .loading"));
    return page;
  }

  publish(topic, payload, ...more) {
    return spawnSync("mosquitto_pub", ["-h", "127.0.0.1", "-p", String(this.port), "-V", "5", "-q", "1", "-t", topic, "-s", ...more], { input: payload });
  }

  // Phantom slices as files, every second one with a lesion.
  slices(count, seed = 1, ...more) {
    const folder = join(this.folder, `slices-${seed}`);
    const done = spawnSync(PROGRAM, ["simulate", "--to", folder, "--count", String(count), "--rate", "0", "--seed", String(seed), ...more]);
    if (done.status !== 0) throw new Error(String(done.stderr));
    return readdirSync(folder).filter((name) => !name.startsWith(".")).sort().map((name) => join(folder, name));
  }

  // As scanners do it: a temporary name, then the real one.
  scan(file, name) {
    const target = join(this.export, name);
    mkdirSync(dirname(target), { recursive: true });
    writeFileSync(`${target}.part`, readFileSync(file));
    renameSync(`${target}.part`, target);
  }

  async state() {
    return (await fetch(`${this.url}/api/state`)).json();
  }

  async results(query = "") {
    return (await (await fetch(`${this.url}/api/results?limit=200${query}`)).json()).rows;
  }

  async close() {
    await this.browser?.close();
    for (const child of [this.daemon, this.broker]) {
      if (!child) continue;
      child.kill("SIGTERM");
      await Promise.race([ended(child), pause(10_000)]);
      child.kill("SIGKILL");
    }
    rmSync(this.folder, { recursive: true, force: true });
  }
}
