"""The few figures that are reported, in numpy."""

import numpy as np


def auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None where one class is missing."""
    positive, negative = score[label == 1], score[label == 0]
    if len(positive) == 0 or len(negative) == 0:
        return None
    values, inverse, counts = np.unique(np.concatenate([positive, negative]), return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2.0
    excess = rank[inverse[: len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2.0
    return float(excess / (len(positive) * len(negative)))


def calibration_error(label: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean |observed share - mean probability| over equal-width bins, by bin size."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs(label[which == b].mean() - probability[which == b].mean()) * np.sum(which == b) for b in np.unique(which)]
    return float(np.sum(gaps) / len(label))
