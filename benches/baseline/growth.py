"""What 100,000 processed images, 100,000 files in the folder and a backlog of messages change: speed, latency, memory, disk, start.

    python benches/baseline/growth.py [--images 100000] [--json FILE] [--plot docs/images/growth.svg]

Half of the images with the broker there, half while it is away, in blocks; after each block single pictures (rename to message
at a subscriber; while the broker is away, none). Then the broker comes back and the backlog drains, and at last the daemon
starts again on the full folder. Every file stays in the folder. Pictures: the same few, each with a number behind its end.

With a tiny model (the tests' own), whose work does not hide that of the rest; `--bundle models/braintumor` takes the real one.
"""

import argparse
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from compare import Broker, Subscriber, cpu, memory, pictures, start, ROOT

TINY = ROOT / "tests/fixtures/models/int8-four-labels.tflite"
PICTURES = 100
PROBES = 60
FOLDERS = 100


def tiny_bundle(folder):
    """A bundle of the smallest model."""
    model = TINY.read_bytes()
    folder.mkdir()
    (folder / "model.tflite").write_bytes(model)
    (folder / "manifest.toml").write_text(
        f"format = 1\nname = 'tiny'\nversion = '1'\nfile = 'model.tflite'\nsha256 = '{hashlib.sha256(model).hexdigest()}'\n"
        "[input]\nwidth = 28\nheight = 28\n[preprocess]\ncrop.method = 'none'\nresize.filter = 'area'\n[output]\nindex = 1\n"
        "activation = 'softmax'\nlabels = ['glioma', 'meningioma', 'none', 'pituitary']\npositive = ['glioma', 'meningioma', 'pituitary']\n"
    )
    return folder


class Run:
    def __init__(self, args, folder):
        self.args, self.folder, self.written, self.unheard = args, folder, 0, 0
        self.images, _ = pictures(args.program, args.data, PICTURES, folder / "pictures")
        self.broker = Broker(folder)
        self.subscriber = Subscriber(self.broker.port)
        self.blocks = []
        self.begin = time.perf_counter()
        self.daemon = start("scansentry", args, self.broker, folder / "run")

    def pid(self):
        return self.daemon.process.pid

    def put(self):
        data, suffix = self.images[self.written % len(self.images)]
        self.written += 1
        # As scanners do: a folder for each study; the message says nothing of it.
        folder = self.daemon.folder / f"{self.written % FOLDERS}"
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{self.written}.part"
        temporary.write_bytes(data + self.written.to_bytes(8, "little"))
        return temporary, folder / f"{self.written}{suffix}"

    def counts(self):
        command = [self.args.program, "status", "--json"]
        output = subprocess.run(command, env=self.daemon.environment, capture_output=True, text=True, check=True)
        return json.loads(output.stdout)["counts"]

    def heard(self):
        """Waits for the messages of all images."""
        return self.subscriber.wait(self.written - self.unheard)

    def latency(self):
        times = []
        self.heard()
        for _ in range(PROBES):
            temporary, name = self.put()
            time.sleep(0.03)
            begin = time.perf_counter()
            temporary.rename(name)
            times.append((self.heard() - begin) * 1e3)
        return statistics.median(times), statistics.quantiles(times, n=20)[18]

    def block(self, count, probe):
        """`count` images at once."""
        files = [self.put() for _ in range(count)]
        before, used, begin = self.counts()["classified"], cpu(self.pid()), time.perf_counter()
        for temporary, name in files:
            temporary.rename(name)
        while (done := self.counts()["classified"] - before) < count:
            if time.perf_counter() - begin > 60 + count / 10:
                sys.exit(f"{done} of {count} images were classified")
            time.sleep(0.2)
        took = time.perf_counter() - begin
        figures = {
            "images": self.written,
            "images_per_second": count / took,
            "cpu_ms": (cpu(self.pid()) - used) / count * 1e3,
            "memory_mb": memory(self.pid(), "VmRSS"),
            "ledger_mb": (self.folder / "run/state/ledger.sqlite3").stat().st_size / 1e6,
            "waiting": self.counts()["outbox"],
        }
        if probe:
            figures["p50_ms"], figures["p95_ms"] = self.latency()
        self.blocks.append(figures)
        print(json.dumps(figures), file=sys.stderr)


def measure(args, folder):
    run = Run(args, folder)
    step = args.images // 20
    for _ in range(10):
        run.block(step, True)
    port = run.broker.port
    run.broker.process.terminate()
    run.broker.process.wait()
    for _ in range(10):
        run.block(step, False)
    waiting, before, begin = run.counts()["outbox"], memory(run.pid(), "VmRSS"), time.perf_counter()
    run.broker = Broker(folder, port)
    peak = before
    while run.counts()["outbox"]:
        peak = max(peak, memory(run.pid(), "VmRSS"))
        time.sleep(0.5)
    drained = {"messages": waiting, "seconds": time.perf_counter() - begin, "memory_before_mb": before, "memory_peak_mb": peak}
    run.subscriber, run.unheard = Subscriber(port), run.written
    time.sleep(1)
    run.block(step // 10, True)
    run.daemon.stop()
    run.daemon = start("scansentry", args, run.broker, folder / "run")
    used = cpu(run.pid())
    temporary, name = run.put()
    begin = time.perf_counter()
    temporary.rename(name)
    first = run.heard() - begin
    time.sleep(10)
    again = {
        "files": sum(1 for _ in run.daemon.folder.rglob("*.*")),
        "start_to_ready_ms": run.daemon.ready * 1e3,
        "first_result_ms": first * 1e3,
        "cpu_s_of_the_first_walk": cpu(run.pid()) - used,
        "memory_mb": memory(run.pid(), "VmRSS"),
    }
    run.daemon.stop()
    run.broker.process.kill()
    return {"blocks": run.blocks, "drained": drained, "started_again": again}


def plot(report, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scansentry"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    blocks = report["blocks"]
    kinds = [
        ("images_per_second", "images a second"),
        ("p50_ms", "latency, ms (median; dotted: p95)"),
        ("memory_mb", "resident memory, MB"),
        ("ledger_mb", "ledger, MB"),
    ]
    away = [b["images"] for b in blocks if "p50_ms" not in b]
    for axis, (key, title) in zip(axes.flat, kinds):
        having = [b for b in blocks if key in b]
        axis.plot([b["images"] for b in having], [b[key] for b in having], marker=".")
        if key == "p50_ms":
            axis.plot([b["images"] for b in having], [b["p95_ms"] for b in having], ":")
        if away:
            axis.axvspan(away[0], away[-1], alpha=0.1)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("images processed, all still in the folder (shaded: broker away)")
    figure.savefig(path, metadata={"Date": None})


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--program", default=str(ROOT / "target/release/scansentry"))
    args.add_argument("--bundle", type=pathlib.Path, help="default: a tiny model")
    args.add_argument("--data", type=pathlib.Path, default=ROOT / "../shared/data/mri")
    args.add_argument("--images", type=int, default=100_000)
    args.add_argument("--dir", help="where the folders lie; default: the system's temporary folder")
    args.add_argument("--json", type=pathlib.Path)
    args.add_argument("--plot", type=pathlib.Path)
    args = args.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        args.bundle = args.bundle or tiny_bundle(pathlib.Path(folder, "tiny"))
        report = measure(args, pathlib.Path(folder))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(report, args.plot)
    first, last = report["blocks"][0], report["blocks"][-1]
    for key in ("p50_ms", "p95_ms", "memory_mb"):
        print(f"{key}: {first[key]:.1f} after {first['images']} images, {last[key]:.1f} after {last['images']}")
    print(json.dumps({"drained": report["drained"], "started_again": report["started_again"]}, indent=1))


if __name__ == "__main__":
    main()
