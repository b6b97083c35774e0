"""What the library warns of while a command runs, in the command line's words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from weightlift.cli.streams import complain
from weightlift.cli.wording import as_flags


@contextmanager
def heard(command: str) -> Iterator[list[str]]:
    """Collect the warnings, so that the command can leave out what its report says. One that fails tells them all."""
    handler = _Handler()
    logger = logging.getLogger("weightlift")
    logger.addHandler(handler)
    try:
        yield handler.texts
    except BaseException:
        tell(command, handler.texts)
        raise
    finally:
        logger.removeHandler(handler)


def tell(command: str, texts: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for text in texts:
        complain(f"weightlift {command}: {as_flags(text)}")


class _Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
