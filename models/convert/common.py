"""What the parts of the converter share: where the training pipeline's modules are, the one kind of error, talking to the user."""

import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "training"))


class Refused(Exception):
    """One line `what: value; hint`: the input cannot be converted as it was given."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".;: ")


def say(what: str, text: str) -> None:
    """One line on standard output."""
    print(f"{what + ':':<12} {text}", flush=True)


def silence() -> None:
    """Sends what libraries write to standard error nowhere; Python's own `sys.stderr` still reaches the user."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
