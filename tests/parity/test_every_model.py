"""Every architecture of Transformers, tiny, loaded by weightlift and by Transformers: bit-equal, and natively.

By default a selection runs; ``-m full`` runs every model type and every class of it, heads included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity import tiny
from tests.parity.compare import DTYPES, both, in_each_dtype, save_in_two

# Ties, sub-models, merged experts, split projections, buffers, encoder-decoders, audio, vision, frozen and fp32 parts.
SELECTED = (
    "bert", "llama", "gpt2", "gptj", "t5", "bart", "mixtral", "qwen2_moe", "deepseek_v3", "clip", "llava", "colpali",
    "vit", "swin", "wav2vec2", "whisper", "mamba", "gemma3_text", "switch_transformers", "xlnet", "hrm_text",
    "sam3_video",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("quiet")


def check(model_type: str, cls: Any, folder: Path) -> list[str]:
    """What differs for one class, in float32 and bfloat16. Skips what can't be built or saved here at all."""
    try:
        config = tiny.tiny_config(model_type, cls)
    except ImportError as error:
        pytest.skip(f"{cls.__name__} needs a package: {str(error).split(chr(10))[1]}")
    except Exception as error:
        pytest.skip(f"no tiny {cls.__name__}: {error!r:.150}")
    torch.manual_seed(0)
    try:
        save_in_two(cls(config), folder)
        tiny.save_beside(model_type, folder)
        for dtype in DTYPES:
            cls.from_pretrained(folder, dtype=dtype)
    except Exception as error:
        pytest.skip(f"Transformers itself can't: {error!r:.150}")
    return in_each_dtype(both, cls, folder)


@pytest.mark.parametrize("model_type", SELECTED)
def test_a_model_of_each_kind_is_the_same(model_type: str, tmp_path: Path) -> None:
    assert check(model_type, tiny.heads_first(model_type)[0], tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_every_class_of_every_model_type_is_the_same(model_type: str, tmp_path: Path) -> None:
    found, skipped = {}, []
    classes = tiny.classes_of(model_type)
    for cls in classes:
        try:
            found[cls.__name__] = check(model_type, cls, tmp_path / cls.__name__)
        except pytest.skip.Exception as reason:
            skipped.append(f"{cls.__name__}: {reason}")
    if len(skipped) == len(classes):
        pytest.skip("; ".join(skipped) or "no model class of its own")
    assert {name: items for name, items in found.items() if items} == {}
