"""How each peer loads a Transformers checkpoint folder, by its own documentation. Each function returns a ready module.

``dtype`` is the one wanted; a loader that can't convert does what its users write: convert afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import llama, own_formats
from benchmarks.harness import OURS, Ready, touch

Load = Callable[[Path, torch.dtype], nn.Module]


def _class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def weightlift(folder: Path, dtype: torch.dtype, *, copy: bool = False) -> nn.Module:
    import weightlift as wl

    return wl.from_pretrained(_class(), folder, dtype=dtype, **({"disable_mmap": True} if copy else {}))  # type: ignore[no-any-return]


def weightlift_load(folder: Path, dtype: torch.dtype, *, copy: bool = False) -> nn.Module:
    """The bare module, as the readers of tensors below give it: no generation config, no loading info."""
    from transformers import AutoConfig

    import weightlift as wl

    config = AutoConfig.from_pretrained(folder)
    return wl.load(lambda: _class().from_config(config), folder, dtype=dtype, copy=copy)


def transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _class().from_pretrained(folder, dtype=dtype)  # type: ignore[no-any-return]


def accelerate(folder: Path, dtype: torch.dtype) -> nn.Module:
    """``init_empty_weights`` and ``load_checkpoint_and_dispatch``, as accelerate's guide to big models does."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig

    with init_empty_weights():
        model = _class().from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"}, dtype=dtype)  # type: ignore[no-any-return]


def _assigned(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Empty module, ``load_state_dict(assign=True)``, tie: what one writes around a reader of tensors."""
    model = own_formats.empty(folder, dtype, "meta")
    state = {name: value.to(dtype) for name, value in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model


def safetensors(folder: Path, dtype: torch.dtype) -> nn.Module:
    return _assigned(folder, own_formats.state_of(folder), dtype)


def fastsafetensors(folder: Path, dtype: torch.dtype) -> nn.Module:
    from fastsafetensors import ParallelLoader

    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    loader = ParallelLoader(None, files, device="cpu", nogds=True, use_tqdm_on_load=False)
    try:
        return _assigned(folder, dict(loader.iterate_weights()), dtype)
    finally:
        loader.close()


def runai(folder: Path, dtype: torch.dtype) -> nn.Module:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in sorted(folder.glob("*.safetensors"))])
        return _assigned(folder, dict(streamer.get_tensors()), dtype)


LOADS: dict[str, Load] = {
    OURS: weightlift,
    f"{OURS}.load": weightlift_load,
    "transformers": transformers,
    "accelerate": accelerate,
    "safetensors": safetensors,
    "fastsafetensors": fastsafetensors,
    "runai-model-streamer": runai,
    "tensorizer": own_formats.tensorizer,
    "flashpack": own_formats.flashpack,
    "torch.distributed.checkpoint": own_formats.distributed_checkpoint,
}


def contenders(dtype: torch.dtype, names: tuple[str, ...] = tuple(LOADS)) -> dict[str, Callable[[Path], Ready]]:
    """Each loads ``folder`` and touches every page, after a tiny load of the same kind."""
    return {name: partial(_ready, LOADS[name], dtype) for name in names}


_COPYING = ("fastsafetensors", "runai-model-streamer", "tensorizer", "torch.distributed.checkpoint")


def copying(dtype: torch.dtype) -> dict[str, Callable[[Path], Ready]]:
    """The same where every tensor must end in memory of its own: those that map are told to copy."""
    loads: dict[str, Load] = {
        OURS: partial(weightlift, copy=True),
        f"{OURS}.load": partial(weightlift_load, copy=True),
        "transformers": lambda folder, dtype: _own(transformers(folder, dtype)),
        "safetensors": lambda folder, dtype: _own(safetensors(folder, dtype)),
        "accelerate": lambda folder, dtype: _own(accelerate(folder, dtype)),
        "flashpack": lambda folder, dtype: _own(own_formats.flashpack(folder, dtype)),
        **{name: LOADS[name] for name in _COPYING},
    }
    return {name: partial(_ready, load, dtype) for name, load in loads.items()}


def _own(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def _ready(load: Load, dtype: torch.dtype, folder: Path) -> Ready:
    load(folder / llama.TINY, dtype)

    def timed() -> nn.Module:
        model = load(folder, dtype)
        touch(model)
        return model

    return timed
