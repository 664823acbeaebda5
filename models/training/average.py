"""One network of several seeds: the mean of their weights (Wortsman et al. 2022, "model soups").

    average.py --data DIR --runs DIR

For each run, RUN-mean.npz beside its seeds, of the same form. It costs no more than one network to
run. The seeds start from the same weights and differ by the order of views, dropout and MixStyle, so they stay close enough.
"""

import argparse
from pathlib import Path

import numpy as np

from train import restore, save


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    plain = np.load(args.data / "plain.npy", mmap_mode="r")
    for run in sorted({path.stem.rsplit("-", 1)[0] for path in args.runs.glob("*.npz")}):
        seeds = [dict(np.load(path)) for path in sorted(args.runs.glob(f"{run}-[0-9]*.npz"))]
        weights = [name for name in seeds[0] if name.startswith(("w", "h"))]
        net, heads = restore({name: np.mean([seed[name] for seed in seeds], 0) for name in weights})
        save(args.runs / f"{run}-mean.npz", net, heads, seeds[0]["ids"], seeds[0]["slices"], plain)
        print(f"{run}: {len(seeds)} seeds", flush=True)


if __name__ == "__main__":
    main()
