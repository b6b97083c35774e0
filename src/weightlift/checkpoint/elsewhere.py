"""What to do where a folder holds nothing to be read: whose folder it is shows in the names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from weightlift.checkpoint.sniff import NO_GGUF

_WHOSE = tuple(
    (re.compile(pattern), hint)
    for pattern, hint in (
        (
            r"model_index\.json",
            "a pipeline of Diffusers: wl.from_pretrained(DiffusionPipeline, …) loads it; or pass a sub-folder",
        ),
        (
            r".*\.distcp",
            "torch.distributed.checkpoint wrote it: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes a file of it",
        ),
        (r"zero_to_fp32\.py", "DeepSpeed wrote it in parts: the zero_to_fp32.py in it puts the weights together"),
        (r".*\.gguf", NO_GGUF),
        (
            r".*\.(h5|keras|msgpack|onnx|ckpt\.index)",
            "weights of another framework are not readable here; convert them to safetensors",
        ),
        (r".*\.ckpt", "pass the path of the file itself"),
    )
)
_SHOWN = 8


def hint_for(names: Sequence[str], folders: Sequence[str]) -> str | None:
    """What to do next, of a folder with these files and sub-folders; None if nothing is recognised."""
    for pattern, hint in _WHOSE:
        if any(pattern.fullmatch(name) for name in names):
            return hint
    if folders:
        return f"sub-folders are not looked at: pass the one you mean of {first_of(sorted(folders))}"
    return None


def first_of(names: Sequence[str]) -> str:
    """The first few names, as messages show them."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
