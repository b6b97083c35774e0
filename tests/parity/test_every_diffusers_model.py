"""Every model class of Diffusers, tiny, loaded by weightlift and by Diffusers: bit-equal, and natively.

By default a selection runs; ``-m full`` runs every class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.parity import diffusers_tiny as tiny
from tests.parity.compare import DTYPES, in_each_dtype, save_in_two
from tests.parity.diffusers_compare import both, same_info

from weightlift.integrations.diffusers.model import ORIGINAL

# Down and up blocks, joint and single transformer blocks, parts kept in fp32, buffers, 3D, audio, motion, adapters.
SELECTED = (
    "AutoencoderKL", "AutoencoderOobleck", "AutoencoderTiny", "ControlNetUnionModel", "FluxTransformer2DModel",
    "MotionAdapter", "PriorTransformer", "T2IAdapter", "Transformer2DModel", "UNet1DModel", "UniDiffuserTextDecoder",
    "WanTransformer3DModel",
)  # fmt: skip
# Diffusers gives each name of a tied tensor one of its own; here they stay tied, as the class has them.
TIED = ("UniDiffuserTextDecoder",)


pytestmark = pytest.mark.usefixtures("quiet")


def save(model: Any, folder: Path) -> None:
    """In two files where that works; as a pickle where tensors share memory, which safetensors does not write."""
    try:
        save_in_two(model, folder)
    except RuntimeError:
        model.save_pretrained(folder, safe_serialization=False)


def check(name: str, folder: Path) -> list[str]:
    """What differs for one class, in float32 and bfloat16. Skips what can't be built or saved here at all."""
    cls: Any = getattr(diffusers, name)
    try:
        arguments = tiny.tiny_arguments(name)
        torch.manual_seed(0)
        model = cls(**arguments)
    except Exception as error:
        pytest.skip(f"no tiny {name}: {error!r:.150}")
    try:
        save(model, folder)
        for dtype in DTYPES:
            ORIGINAL.__func__(cls, folder, dtype=dtype)
    except Exception as error:
        pytest.skip(f"Diffusers itself can't: {error!r:.150}")
    found = in_each_dtype(both, cls, folder, same_info)
    return [item for item in found if not (name in TIED and "ties" in item)]


@pytest.mark.parametrize("name", SELECTED)
def test_a_model_of_each_kind_is_the_same(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("name", tiny.CLASSES)
def test_every_class_is_the_same(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path) == []
