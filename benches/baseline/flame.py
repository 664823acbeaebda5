"""Flame graphs of the daemon at work: pictures that come alone, and a burst.

    python benches/baseline/flame.py --program PROGRAM --out docs/images

PROGRAM has its symbols and frame pointers (`make flamegraph` builds it). LiteRT's library has neither: what runs in it stands under its name.
Needs `perf`, and inferno-collapse-perf and inferno-flamegraph (crate inferno).
"""

import argparse
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import compare

RATE = 997  # samples a second; no divisor of any clock's


def recorded(pid, work, scratch):
    """Folded stacks of the process `pid` during `work()`."""
    data = scratch / "perf.data"
    perf = subprocess.Popen(["perf", "record", "-q", "-F", str(RATE), "-g", "-p", str(pid), "-o", data])
    time.sleep(1)
    work()
    perf.send_signal(signal.SIGINT)
    perf.wait(60)
    stacks = subprocess.run(["perf", "script", "-i", data], check=True, capture_output=True).stdout
    return subprocess.run(["inferno-collapse-perf"], input=stacks, check=True, capture_output=True).stdout


def draw(folded, title, path):
    options = ["--title", title, "--minwidth", "0.4", "--width", "1200", "--colors", "rust", "--hash", "--countname", "ns"]
    svg = subprocess.run(["inferno-flamegraph", *options], input=folded, check=True, capture_output=True).stdout
    path.write_bytes(svg)
    print(path)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--program", required=True)
    args.add_argument("--out", type=pathlib.Path, required=True)
    args.add_argument("--bundle", default=compare.ROOT / "models/braintumor")
    args.add_argument("--data", type=pathlib.Path, default=compare.ROOT / "../shared/data/mri")
    args.add_argument("--singles", type=int, default=300)
    args.add_argument("--burst", type=int, default=400)
    args = args.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    images, source = compare.pictures(args.program, args.data, args.singles + args.burst, folder)
    broker = compare.Broker(folder)
    subscriber = compare.Subscriber(broker.port)
    daemon = compare.start("scansentry", args, broker, folder)
    singles, burst = images[: args.singles], images[args.singles :]
    try:
        folded = recorded(daemon.process.pid, lambda: compare.one_by_one(daemon, subscriber, singles), folder)
        draw(folded, f"{len(singles)} {source}, one by one", args.out / "flame-alone.svg")
        files = [daemon.put(data, suffix) for data, suffix in burst]
        folded = recorded(daemon.process.pid, lambda: compare.at_once(daemon, subscriber, files), folder)
        draw(folded, f"{len(burst)} {source}, at once", args.out / "flame-burst.svg")
    finally:
        daemon.stop()
        broker.process.kill()
        broker.process.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
