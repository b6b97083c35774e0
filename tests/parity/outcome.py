"""What comes of a load: a model or an error, and all that is said meanwhile."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import weightlift as wl


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "on cpu": lambda: torch.device("cpu"),
    "double": lambda: _default_dtype(torch.float64),
    "half": lambda: _default_dtype(torch.bfloat16),
    "no grad": torch.no_grad,
}
"""What a caller may have set around a load."""


@contextlib.contextmanager
def drop_in() -> Iterator[None]:
    """Loads go through weightlift within, whoever asks for them."""
    wl.install()
    try:
        yield
    finally:
        wl.uninstall()


@dataclass
class Outcome:
    """A model and its loading info, or an error; the messages of its library; those of loads that were not native."""

    model: Any = None
    info: Any = None
    error: Exception | None = None
    said: Counter[str] = field(default_factory=Counter)
    fell_back: list[str] = field(default_factory=list)


class _Said(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def outcome_of(load: Callable[[], Any], library: str, folder: Path) -> Outcome:
    """What comes of ``load()``. Of each message its words, sorted: names are listed in the order of a set."""
    outcome = Outcome()
    loggers = [logging.getLogger(library), logging.getLogger("weightlift")]
    handlers = [_Said(logging.WARNING), _Said(logging.INFO)]
    level = loggers[1].level
    loggers[1].setLevel(logging.INFO)
    for logger, handler in zip(loggers, handlers):
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # a file that is left open says so whenever it goes
            outcome.model, outcome.info = load()
    except Exception as error:
        outcome.error = error
    finally:
        for logger, handler in zip(loggers, handlers):
            logger.removeHandler(handler)
        loggers[1].setLevel(level)
    texts = [*handlers[0].messages, *(str(item.message) for item in warned if "determinis" not in str(item.message))]
    outcome.said = Counter(" ".join(sorted(re.split(r"[\s,'\[\]]+", text.replace(str(folder), "…")))) for text in texts)
    outcome.fell_back = [text for text in handlers[1].messages if "by its own library" in text]
    return outcome
