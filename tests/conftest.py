"""What tests of every folder may ask for."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet() -> Iterator[None]:
    """Transformers and Diffusers say nothing of what is deprecated, or unusual in tiny configurations."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture
def no_bars() -> Iterator[None]:
    """Diffusers shows no progress bars."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is gone is gone with its last reference, and nothing comes between two looks at the memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
