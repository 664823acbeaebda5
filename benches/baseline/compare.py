"""ScanSentry beside the Python pipeline, measured from outside in one run: the same model, pictures, Mosquitto and machine.

    python benches/baseline/compare.py [--program target/release/scansentry] [--rounds 3] [--idle 600] [--quarter] [--json FILE]

Each daemon is started on an empty folder; pictures are renamed into it one by one (latency: rename to message at a
subscriber), then all at once (burst). Rounds alternate between the daemons, so that a disturbance hits all; the table has
medians over the rounds. Times of a busy machine mean little, ratios more. Pictures: ../shared/data/mri, every K-th JPEG, or
without it those that `scansentry simulate` draws.

`--quarter` is a small board: each daemon has one CPU for a quarter of the time, in slices of some milliseconds, and 512 MB (control groups; as
root). Broker and subscriber have the rest of the machine.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import paho.mqtt.client as mqtt

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
TICK = os.sysconf("SC_CLK_TCK")
PATIENCE = 120


def unit_environment():
    """What systemd gives the daemon."""
    unit = (ROOT / "systemd/scansentry.service").read_text()
    words = [word for line in unit.splitlines() if line.startswith("Environment=") for word in line.removeprefix("Environment=").split()]
    return dict(word.split("=", 1) for word in words)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pictures(program, data, count, folder):
    """`count` files with distinct content: [(bytes, suffix)]."""
    index = data / "index.csv"
    if index.exists():
        with index.open(newline="") as table:
            files = [data / row["file"] for row in csv.DictReader(table)]
        files = [f for f in files if f.suffix.lower() in (".jpg", ".jpeg")]
        chosen = {f.read_bytes(): f.suffix for f in files[:: max(1, len(files) // (count + 50))]}
        source = "real MRI JPEGs"
    else:
        subprocess.run([program, "simulate", "--to", folder, "--count", str(count), "--rate", "1000"], check=True, capture_output=True)
        chosen = {f.read_bytes(): f.suffix for f in sorted(folder.rglob("*")) if f.suffix in (".png", ".jpg", ".jpeg")}
        source = "generated slices"
    return [(data, suffix) for data, suffix in list(chosen.items())[:count]], source


class Broker:
    def __init__(self, folder, port=None):
        self.port = port or free_port()
        config = folder / "mosquitto.conf"
        user = "user root\n" if os.geteuid() == 0 else ""
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n{user}")
        program = "/usr/sbin/mosquitto" if os.path.exists("/usr/sbin/mosquitto") else "mosquitto"
        self.process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Subscriber:
    """Counts results and says when the n-th came. It takes as little as it can of what is measured: MQTT 3.1.1 has no properties to be read, and who
    waits is woken once."""

    def __init__(self, port):
        self.times, self.wanted, self.reached = [], 0, threading.Event()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.on_message = self.message
        for _ in range(100):
            try:
                self.client.connect("127.0.0.1", port)
                break
            except OSError:
                time.sleep(0.05)
        self.client.subscribe([("baseline/result", 1), ("scansentry/+/+/result", 1)])
        self.client.loop_start()

    def message(self, *_):
        self.times.append(time.perf_counter())
        if len(self.times) == self.wanted:
            self.reached.set()

    def wait(self, count):
        self.reached.clear()
        self.wanted = count
        if len(self.times) < count and not self.reached.wait(PATIENCE):
            sys.exit(f"{len(self.times)} of {count} results came in {PATIENCE} s")
        return self.times[count - 1]


def tree(pid):
    """The process and what it started."""
    pids = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += tree(int(child))
    return pids


def cpu(pid):
    """CPU seconds of the tree so far."""
    ticks = 0
    for p in tree(pid):
        fields = pathlib.Path(f"/proc/{p}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def memory(pid, key):
    """`VmRSS` now or `VmHWM` at most, MB, summed over the tree. A page counts as often as it is mapped, in one process or in several."""
    total = 0
    for p in tree(pid):
        text = pathlib.Path(f"/proc/{p}/status").read_text()
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)
    return total / 1024


class Footprint:
    """The most memory that the tree had at a time, MB: what it has by itself, and each part of a file that it has mapped
    once, however often; what forked processes have not written since counts for each. (`Pss` would share the interpreter's pages with this very
    program.) A look takes milliseconds of a processor: between the pictures that come one by one, and twice a second while many are on their way."""

    def __init__(self, pid):
        self.pid, self.peak = pid, 0

    def look(self):
        self.peak = max(self.peak, self.now())

    @contextlib.contextmanager
    def watching(self):
        end = threading.Event()

        def watch():
            while not end.wait(0.5):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self.look()

    def now(self):
        own, files = 0, {}
        for p in tree(self.pid):
            for line in pathlib.Path(f"/proc/{p}/smaps").read_text().splitlines():
                words = line.split()
                if "-" in words[0]:
                    # Addresses, permissions, offset, device, inode.
                    _, _, offset, device, inode = words[:5]
                elif words[0] == "Rss:":
                    resident = int(words[1])
                elif words[0] == "Anonymous:":
                    own += int(words[1])
                    file = (device, inode, offset)
                    files[file] = max(files.get(file, 0), resident - int(words[1]))
        return (own + sum(files.values())) / 1024


class SmallBoard:
    """A control group (version 1 or 2) with one CPU for a quarter of the time, and memory."""

    MEMORY = 512 << 20
    # Short ones: with the kernel's 100 ms, all work of a picture could fall into one slice, or wait for the next.
    PERIOD_US, QUOTA_US = 8000, 2000

    def __init__(self):
        root, name = pathlib.Path("/sys/fs/cgroup"), f"scansentry-bench-{os.getpid()}"
        if (root / "cgroup.controllers").exists():
            (root / "cgroup.subtree_control").write_text("+cpu +cpuset +memory")
            limits = {
                root: {"cpuset.cpus": "0", "cpu.max": f"{self.QUOTA_US} {self.PERIOD_US}", "memory.max": self.MEMORY},
            }
        else:
            limits = {
                root / "cpuset": {"cpuset.cpus": "0", "cpuset.mems": "0"},
                root / "cpu": {"cpu.cfs_period_us": self.PERIOD_US, "cpu.cfs_quota_us": self.QUOTA_US},
                root / "memory": {"memory.limit_in_bytes": self.MEMORY},
            }
        self.groups = [above / name for above in limits]
        for group, values in zip(self.groups, limits.values()):
            group.mkdir(exist_ok=True)
            for key, value in values.items():
                (group / key).write_text(str(value))

    def enter(self):
        for group in self.groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def wait_until_empty(self):
        """The one before may be slow to end, in the time of the next."""
        while any((group / "cgroup.procs").read_text() for group in self.groups):
            time.sleep(0.01)

    def remove(self):
        for group in self.groups:
            group.rmdir()


class Daemon:
    def __init__(self, command, environment, folder, board=None):
        self.folder, self.number = folder, 0
        self.environment = os.environ | environment
        # Into a file: read here line by line, it would take time from the broker and the subscriber.
        log = folder.parent / "log"
        if board:
            board.wait_until_empty()
        start = time.perf_counter()
        with log.open("wb") as to:
            self.process = subprocess.Popen(command, env=self.environment, preexec_fn=board and board.enter, stdout=to, stderr=to)
        while b"ready" not in log.read_bytes():
            if self.process.poll() is not None:
                sys.exit(f"{command[0]} ended")
            time.sleep(0.001)
        self.ready = time.perf_counter() - start

    def put(self, data, suffix):
        """As scanners do: written under another name, then renamed; the time of the rename."""
        self.number += 1
        temporary = self.folder / f"{self.number}.part"
        temporary.write_bytes(data)
        return temporary, self.folder / f"{self.number}{suffix}"

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def start(kind, args, broker, folder, board=None):
    export = folder / "export"
    export.mkdir(parents=True, exist_ok=True)
    if kind == "scansentry":
        environment = unit_environment() | {
            "SCANSENTRY__WATCH__FOLDER": str(export),
            "SCANSENTRY__STATE__DIR": str(folder / "state"),
            "SCANSENTRY__MODEL__BUNDLE": str(args.bundle),
            "SCANSENTRY__MQTT__URL": f"mqtt://127.0.0.1:{broker.port}",
            "SCANSENTRY__ALERT__ENABLED": "false",
        }
        return Daemon([args.program, "run"], environment, export, board)
    command = [sys.executable, HERE / "pipeline.py", "--folder", export, "--bundle", args.bundle, "--port", str(broker.port)]
    workers = {"python": 1, "python, 2 workers": 2}[kind]
    return Daemon([*command, "--workers", str(workers)], {}, export, board)


def one_by_one(daemon, subscriber, images, between=lambda: None):
    """Seconds from the rename to the message, for each picture; every tenth time `between` is called before it."""

    def run():
        # Once it has renamed the file, this thread has nothing to do that is measured: what is measured goes first.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        latency = []
        for number, (data, suffix) in enumerate(images):
            if number % 10 == 0:
                between()
            temporary, name = daemon.put(data, suffix)
            time.sleep(0.03)
            begin = time.perf_counter()
            temporary.rename(name)
            latency.append(subscriber.wait(daemon.number) - begin)
        return latency

    # A thread for it, that takes the low priority with it when it ends.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def at_once(daemon, subscriber, files):
    """Seconds from the first rename to the last message, for files that `daemon.put` wrote."""
    begin = time.perf_counter()
    for temporary, name in files:
        temporary.rename(name)
    return subscriber.wait(daemon.number) - begin


def measure(kind, args, images, idle, board):
    """One round with one daemon."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.dir))
    broker = Broker(folder)
    subscriber = Subscriber(broker.port)
    daemon = start(kind, args, broker, folder, board)
    pid = daemon.process.pid
    footprint = Footprint(pid)
    singles, burst = images[: args.singles], images[args.singles :]
    try:
        for data, suffix in singles[:10]:
            temporary, name = daemon.put(data + b"warm", suffix)
            temporary.rename(name)
            subscriber.wait(daemon.number)
        latency = one_by_one(daemon, subscriber, singles, footprint.look)
        steady = memory(pid, "VmRSS")
        files = [daemon.put(data, suffix) for data, suffix in burst]
        before = cpu(pid)
        with footprint.watching():
            seconds = at_once(daemon, subscriber, files)
        time.sleep(0.5)
        figures = {
            "p50 ms": statistics.median(latency) * 1e3,
            "p95 ms": statistics.quantiles(latency, n=20)[18] * 1e3,
            "p99 ms": statistics.quantiles(latency, n=100)[98] * 1e3,
            "max ms": max(latency) * 1e3,
            "burst images/s": len(burst) / seconds,
            "CPU ms an image": (cpu(pid) - before) / len(burst) * 1e3,
            "steady MB": steady,
            "peak MB": memory(pid, "VmHWM"),
            "peak MB, pages once": footprint.peak,
            "start to ready ms": daemon.ready * 1e3,
        }
        if idle:
            before = cpu(pid)
            time.sleep(idle)
            figures["idle CPU %"] = (cpu(pid) - before) / idle * 100
        return figures
    finally:
        daemon.stop()
        broker.process.kill()
        broker.process.wait()
        shutil.rmtree(folder)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--program", default=str(ROOT / "target/release/scansentry"))
    args.add_argument("--bundle", default=ROOT / "models/braintumor")
    args.add_argument("--data", type=pathlib.Path, default=ROOT / "../shared/data/mri")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--singles", type=int, default=200)
    args.add_argument("--burst", type=int, default=500)
    args.add_argument("--idle", type=float, default=0, help="seconds without a picture at the end of the first round of each daemon")
    args.add_argument("--quarter", action="store_true", help="as on a small board: one CPU for a quarter of the time, 512 MB")
    args.add_argument("--dir", help="where the folders lie; default: the system's temporary folder")
    args.add_argument("--json", type=pathlib.Path)
    args = args.parse_args()
    board = SmallBoard() if args.quarter else None
    with tempfile.TemporaryDirectory() as scratch:
        images, source = pictures(args.program, args.data, args.singles + args.burst, pathlib.Path(scratch))
    kinds = ["python", "python, 2 workers", "scansentry"]
    rounds = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds:
            rounds[kind].append(measure(kind, args, images, args.idle if number == 0 else 0, board))
            print(f"round {number + 1}, {kind}", file=sys.stderr)
    if board:
        board.remove()
    medians = {
        kind: {name: statistics.median(r[name] for r in of if name in r) for name in of[0]} for kind, of in rounds.items()
    }
    machine = "a quarter of one core, 512 MB" if board else f"{os.cpu_count()} cores"
    print(f"{len(images)} {source}, {args.rounds} rounds, {machine}, {model_name()}\n")
    print("| | " + " | ".join(kinds) + " | ratio to python |")
    print("|---|" + "---|" * (len(kinds) + 1))
    for name in medians["python"]:
        row = [medians[kind][name] for kind in kinds]
        ratio = row[-1] / row[0] if row[0] else float("nan")
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + f" | {ratio:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"source": source, "rounds": rounds, "medians": medians}, indent=1))


def model_name():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    main()
