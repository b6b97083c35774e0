"""A trace as a file: Chrome trace events, or one self-contained page with a timeline, throughput and memory."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from weightlift.ambient import outside_modes
from weightlift.transfer.convert import copy_serially
from weightlift.transfer.trace import Trace

_CEILING_BYTES = 32 << 20


def write(trace: Trace, path: str | os.PathLike[str], *, title: str) -> None:
    """Write a page (``.html``) or Chrome trace events (any other suffix). Raises OSError, and leaves no part then."""
    target = Path(path)
    as_page = target.suffix.lower() in (".html", ".htm")
    text = page(trace, title=title) if as_page else json.dumps(trace.chrome_events())
    was_there = target.exists()  # maybe as a pipe, and with permissions of its own: then it is written to
    try:
        # The name of a folder may hold bytes that are no text.
        target.write_text(text, encoding="utf-8", errors="backslashreplace")
    except BaseException:
        if not was_there:
            target.unlink(missing_ok=True)
        raise


def page(trace: Trace, *, title: str) -> str:
    """The page's text. It loads nothing from anywhere; keys from a checkpoint can't become markup in it."""
    template = resources.files("weightlift.transfer").joinpath("trace_page.html").read_text("utf-8")
    data = json.dumps(_data(trace, title))
    # "</script>" and "<!--" inside a string would end the script that holds it.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {"{{TITLE}}": html.escape(title), "{{DATA}}": data}
    return re.sub("|".join(parts), lambda match: parts[match[0]], template)  # at once: a title may look like a place


def _data(trace: Trace, title: str) -> dict[str, Any]:
    spans = trace.spans
    workers = list(dict.fromkeys(span.worker for span in spans))
    number = {name: index for index, name in enumerate(workers)}
    return {
        "title": title,
        "choices": {name: str(value) for name, value in trace.choices.items()},
        "workers": workers,
        "spans": [
            [kind, name, number[worker], round(start_s * 1e6), round(end_s * 1e6), nbytes]  # microseconds
            for kind, name, worker, start_s, end_s, nbytes in spans
        ],
        "memory": [[round(s.at_s, 6), s.resident_bytes, s.own_bytes] for s in trace.samples],
        "copy_bytes_per_s": copy_bandwidth(),
    }


@functools.lru_cache(maxsize=1)
def copy_bandwidth() -> float:
    """Bytes a second that one thread copies from memory to memory here; measured once a process, in about 20 ms."""
    best = float("inf")
    with outside_modes():
        source, target = (torch.zeros(_CEILING_BYTES, dtype=torch.uint8, device="cpu") for _ in range(2))
        for _ in range(3):
            start = time.perf_counter()
            copy_serially([target], [source])
            best = min(best, time.perf_counter() - start)
    return _CEILING_BYTES / best
