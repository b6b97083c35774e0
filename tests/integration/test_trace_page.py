"""The trace page in a real browser (Debian's chromium; .ci/run installs it)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl
from weightlift.transfer import trace_page
from weightlift.transfer.trace import Trace

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1200,1300",
)  # fmt: skip


def _dom(page: Path, profile: Path) -> str:
    assert _CHROMIUM is not None
    done = subprocess.run(
        [_CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")
def test_the_page_draws_itself_and_keys_stay_text(tmp_path: Path) -> None:
    evil = "a</script><script>document.documentElement.dataset.owned=1</script><b>"
    module = nn.Module()
    module.register_parameter("fine", nn.Parameter(torch.zeros(3, 4)))
    module._parameters[evil] = nn.Parameter(torch.zeros(5))
    save_file({"fine": torch.ones(3, 4), evil: torch.ones(5)}, tmp_path / "model.safetensors")
    page = tmp_path / "trace.html"
    wl.load(module, tmp_path, trace=page, workers=1)
    dom = _dom(page, tmp_path / "profile")
    assert 'data-ready="1"' in dom  # the last statement of the script ran
    assert "data-owned" not in dom
    rows = re.findall(r"<tr><td>(.*?)</td>", dom)
    assert rows
    assert re.search(r"<li><b>68 B</b><span>moved or mapped</span></li>", dom), dom[-3000:]
    assert not re.search(r"(src|href)=.https?:", dom)


@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")
def test_a_load_of_very_many_tensors_is_drawn(tmp_path: Path) -> None:
    """A browser takes some hundred thousand arguments of a function, and no more."""
    trace = Trace()
    for number in range(200_000):
        trace.add("read", f"layers.{number}.weight", trace.now(), 1)
    trace_page.write(trace, tmp_path / "trace.html", title="many")
    dom = _dom(tmp_path / "trace.html", tmp_path / "profile")
    assert 'data-ready="1"' in dom and "<b>200000</b><span>spans</span>" in dom
