"""Peers that load from a format of their own, or into a module that has its memory already.

The file is made once, beside the checkpoint, before anything is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def empty(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    """The module without values: on ``meta``, or with memory that nothing was written to."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(_config(folder), dtype=dtype)
    rotary = model.model.rotary_emb  # non-persistent, so no checkpoint has it
    model.model.rotary_emb = type(rotary)(model.config)
    return model  # type: ignore[no-any-return]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def flashpack(folder: Path, dtype: torch.dtype) -> nn.Module:
    """One packed file, assigned to a module on ``meta``. Converts while packing only, so ``dtype`` is the file's."""
    from flashpack import assign_from_file, pack_to_file

    path = folder / f"model-{dtype}.flashpack"
    if not path.exists():
        pack_to_file(state_of(folder), str(path), dtype)
    model = empty(folder, dtype, "meta")
    assign_from_file(model, str(path), device="cpu", ignore_names=["lm_head.weight"], strict_params=False)
    model.tie_weights()
    return model


def tensorizer(folder: Path, dtype: torch.dtype) -> nn.Module:
    """``TensorDeserializer.load_into_module``, as its README does."""
    from tensorizer import TensorDeserializer, TensorSerializer

    path = folder / "model.tensors"
    if not path.exists():
        serializer = TensorSerializer(str(path))
        serializer.write_state_dict(state_of(folder))
        serializer.close()
    model = empty(folder, dtype, "meta")
    with TensorDeserializer(str(path), device="cpu", dtype=dtype) as reader:
        state = dict(reader.items())
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


def distributed_checkpoint(folder: Path, dtype: torch.dtype) -> nn.Module:
    """``torch.distributed.checkpoint`` with its reader of Hugging Face folders, which fills tensors that exist."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    model = empty(folder, dtype, "cpu")
    model.tie_weights()
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return model
