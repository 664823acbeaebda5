"""What a good engineer would build in an afternoon instead of ScanSentry: watch a folder, classify with the same model, publish over MQTT.

    python pipeline.py --folder DIR --bundle models/braintumor --port 1883 [--workers N]

One process; with `--workers N` the pictures are classified in N processes of their own. The same steps and the same model
as ScanSentry, QoS 1. Nothing is remembered: what was on its way when it stops is lost, and what came while it was
stopped is never seen. Prints "ready" when it watches.
"""

import argparse
import json
import multiprocessing
import pathlib
import queue
import sys
import threading
import time

import cv2
import numpy as np
import paho.mqtt.client as mqtt
from ai_edge_litert.interpreter import Interpreter
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models/training"))
from preprocess import brain_roi, model_input  # noqa: E402


class Model:
    def __init__(self, bundle):
        cv2.setNumThreads(1)
        self.interpreter = Interpreter(str(pathlib.Path(bundle) / "model.tflite"), num_threads=1)
        self.interpreter.allocate_tensors()
        self.input = self.interpreter.get_input_details()[0]
        outputs = self.interpreter.get_output_details()
        self.output = next(o for o in outputs if np.prod(o["shape"]) == 1)
        self.scale, self.zero = self.output["quantization"]

    def classify(self, path):
        start = time.perf_counter()
        bgr = cv2.imread(path)
        if bgr is None:
            return {"file": path, "error": "not an image"}
        roi = brain_roi(bgr)
        self.interpreter.set_tensor(self.input["index"], model_input(bgr, roi)[None])
        self.interpreter.invoke()
        raw = int(self.interpreter.get_tensor(self.output["index"]).ravel()[0])
        probability = (raw - self.zero) * self.scale
        return {
            "file": path,
            "probability": probability,
            "tumour": bool(probability >= 0.5),
            "roi": roi,
            "ms": (time.perf_counter() - start) * 1e3,
        }


_model = None


def begin(bundle):
    global _model
    _model = Model(bundle)


def in_worker(path):
    return _model.classify(path)


class Handler(FileSystemEventHandler):
    def __init__(self, files):
        self.files = files

    def take(self, path):
        if not path.endswith(".part"):
            self.files.put(path)

    def on_closed(self, event):
        self.take(event.src_path)

    def on_moved(self, event):
        self.take(event.dest_path)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--folder", required=True)
    args.add_argument("--bundle", default=ROOT / "models/braintumor")
    args.add_argument("--port", type=int, default=1883)
    args.add_argument("--workers", type=int, default=1)
    args = args.parse_args()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.max_queued_messages_set(0)
    client.connect("127.0.0.1", args.port)
    client.loop_start()
    files = queue.Queue()

    def publish(result):
        client.publish("baseline/result", json.dumps(result), qos=1)

    if args.workers > 1:
        pool = multiprocessing.get_context("spawn").Pool(args.workers, begin, (str(args.bundle),))
        pool.map(len, [""] * args.workers)

        def work():
            while True:
                pool.apply_async(in_worker, (files.get(),), callback=publish)
    else:
        begin(args.bundle)

        def work():
            while True:
                publish(in_worker(files.get()))

    observer = Observer()
    observer.schedule(Handler(files), args.folder, recursive=True)
    observer.start()
    threading.Thread(target=work, daemon=True).start()
    print("ready", flush=True)
    observer.join()


if __name__ == "__main__":
    main()
