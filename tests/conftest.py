"""What tests of every folder may ask for."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

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


@pytest.fixture
def at_once() -> Callable[[Callable[[int], Any], int], list[Any]]:
    """``at_once(work, 8)``: ``work(number)`` in eight threads at a time. What each gave; raises what one raised."""

    def run(work: Callable[[int], Any], count: int) -> list[Any]:
        found: list[Future[Any]] = [Future() for _ in range(count)]

        def one(number: int) -> None:
            try:
                found[number].set_result(work(number))
            except BaseException as error:
                found[number].set_exception(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [item.result() for item in found]

    return run


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that repositories bring along is copied to a folder of the test's, not to the user's cache."""
    from diffusers.utils import dynamic_modules_utils
    from transformers import dynamic_module_utils

    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in (dynamic_modules_utils, dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
