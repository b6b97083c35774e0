"""Every class that Diffusers loads from single files, tiny, in its publishers' layout: by weightlift and by Diffusers
bit-equal, and natively.

By default a selection runs; ``-m full`` runs every class, and those with sizes written down in their conversions wide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.parity import single_files
from tests.parity.compare import native_only
from tests.parity.diffusers_compare import differences

import weightlift as wl
from weightlift.integrations.diffusers.single_file import ORIGINAL

pytestmark = pytest.mark.usefixtures("quiet")

# Joined and swapped halves, dual attention, renames, convolutions for matrices, removed keys, keys of no use.
SELECTED = (
    "AutoencoderDC", "AutoencoderKL", "ControlNetModel", "FluxTransformer2DModel", "Krea2Transformer2DModel",
    "MiniMaxH3Transformer3DModel", "SD3Transformer2DModel", "UNet2DConditionModel", "WanTransformer3DModel",
)  # fmt: skip


def both(cls: Any, given: Any, **options: Any) -> tuple[Any, Any]:
    """A model by weightlift, and by Diffusers."""
    copied = dict(given) if isinstance(given, dict) else given
    theirs = ORIGINAL.__func__(cls, copied, **options)
    with native_only():
        ours = wl.from_single_file(cls, given, **options)
    return ours, theirs


def check(name: str, folder: Path, layout: single_files.Layout, dtypes: Any, own: torch.dtype) -> list[str]:
    cls: Any = getattr(diffusers, name)
    if not hasattr(cls, "from_single_file"):
        pytest.skip(f"{name} has a conversion, but no from_single_file")
    try:
        made = single_files.model(name, layout, own)
    except Exception as error:
        pytest.skip(f"no tiny {name}: {error!r:.150}")
    file = single_files.save(made, name, folder, layout)
    state = made.state_dict()
    del made
    found = []
    for dtype in dtypes:
        ours, theirs = both(cls, str(file), config=str(folder / "configuration"), torch_dtype=dtype)
        found += [f"{dtype}: {item}" for item in differences(ours, theirs)]
        kept = ours.state_dict()
        found += [
            f"{dtype}: {key} is not what was saved"
            for key, value in state.items()
            if not torch.equal(kept[key], value.to(kept[key].dtype))
        ]
        if ours.hf_device_map != theirs.hf_device_map:
            found.append(f"{ours.hf_device_map} for {theirs.hf_device_map}")
    return found


@pytest.mark.parametrize("name", SELECTED)
def test_a_single_file_of_each_kind_is_the_same(name: str, tmp_path: Path) -> None:
    layout = single_files.LAYOUTS.get(name, single_files.Layout())
    assert check(name, tmp_path, layout, (None, torch.bfloat16), torch.float32) == []


@pytest.mark.full
@pytest.mark.parametrize("name", single_files.CLASSES)
def test_every_single_file_is_the_same(name: str, tmp_path: Path) -> None:
    layout = single_files.LAYOUTS.get(name, single_files.Layout())
    assert check(name, tmp_path, layout, (None, torch.bfloat16, torch.float16), torch.float32) == []


@pytest.mark.full
@pytest.mark.parametrize("name", single_files.WIDE)
def test_a_conversion_with_sizes_of_its_own_is_the_same(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path, single_files.WIDE[name], (torch.bfloat16,), torch.bfloat16) == []
