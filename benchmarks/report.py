"""Results as a table in Markdown, as JSON, and as a chart in SVG; all say where and when they were measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from html import escape
from importlib import metadata
from pathlib import Path

from benchmarks.harness import CEILING, OURS, Result

_PEERS = (
    "torch", "transformers", "diffusers", "accelerate", "safetensors", "fastsafetensors", "runai-model-streamer",
    "tensorizer", "flashpack", "instanttensor",
)  # fmt: skip


def machine(scale: float = 1.0) -> dict[str, str]:
    """What the figures depend on; ``scale`` of the models is said where it is not 1."""
    found = {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load average": f"{os.getloadavg()[0]:.1f}",
    }
    if scale != 1.0:
        found["scale"] = f"{scale} of the models' size"
    import torch

    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    versions = {}
    for name in _PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def as_json(results: list[Result], where: dict[str, str], date: str) -> str:
    """Every round's figures."""
    return json.dumps({"date": date, "machine": where, "results": [asdict(r) for r in results]}, indent=1)


def as_markdown(results: list[Result], where: dict[str, str], date: str) -> str:
    """A table a case."""
    lines = [f"Measured on {date}: " + "; ".join(f"{name} {value}" for name, value in where.items()) + ".", ""]
    for result in results:
        lines += [f"### {result.case}: {result.title}", "", f"Demanded: {result.target}.", ""]
        lines += ["| | " + " | ".join(_COLUMNS) + " |", "|-|" + "-:|" * len(_COLUMNS)]
        lines += [_row(result, name) for name in sorted(result.seconds, key=result.median)]
        lines += [""]
        lines += [f"- {name} did not run: {why}" for name, why in result.failed.items()]
        lines += [""] if result.failed else []
    return "\n".join(lines)


_COLUMNS = (
    "median", "range", "× ours (median of pairs, range)", "of the ceiling", "first in its process",
    "own memory above start",
)  # fmt: skip


def _row(result: Result, name: str) -> str:
    times, ceiling = result.seconds[name], result.ceiling()
    cells = (
        f"**{name}**" if name == OURS else name,
        f"{statistics.median(times):.3f} s",
        f"{min(times):.3f}–{max(times):.3f}",
        "" if name == OURS or OURS not in result.seconds else _ratio(result.ratios(name)),
        "" if ceiling is None or name.startswith(CEILING) else f"{ceiling / result.median(name):.0%}",
        f"{statistics.median(result.first[name]):.3f} s",
        f"{max(result.peak_bytes[name]) / 1e6:,.0f} MB",
    )
    return "| " + " | ".join(cells) + " |"


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def as_svg(results: list[Result]) -> str:
    """Bars: each contender's median time over ours, a block a case; ceilings are hollow."""
    row, left, width = 18, 250, 860
    parts: list[str] = []
    y = 10
    for result in results:
        if OURS not in result.seconds:
            continue
        ratios = {name: statistics.median(result.ratios(name)) for name in result.seconds}
        top = max(ratios.values())
        parts.append(f'<text x="8" y="{y + 13}" class="case">{escape(result.case)}: {escape(result.title)}</text>')
        y += row + 2
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1]):
            length = max(1.0, ratio / top * (width - left - 130))
            kind = "ours" if name == OURS else "ceiling" if name.startswith(CEILING) else "peer"
            parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 5}" class="{kind}"/>')
            label = f"{result.median(name):.3f} s" + ("" if name == OURS else f", {ratio:.2f}×")
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 12}">{label}</text>')
            y += row
        y += 12
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1d2430}.case{font-weight:600}.ours{fill:#2f7d4f}.peer{fill:#9aa7b8}"
        ".ceiling{fill:none;stroke:#9aa7b8}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
