"""Every model of timm and torchvision: deferred and loaded, against its own constructor and ``load_state_dict``.

``pip install timm torchvision; python -m tests.parity.vision_models [--only NAME …] [--largest MB] [--first N]``: a
line for each model that differs, then the figures. These are constructors that people wrote by hand, 1,500 of them;
larger ones than ``--largest`` (250) are built only. The tests install neither library.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import nn

import weightlift as wl


def builders() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every name with what builds the model, without weights."""
    import timm
    import torchvision

    for name in timm.list_models():
        yield f"timm {name}", partial(timm.create_model, name, pretrained=False)
    parts = (torchvision.models.detection, torchvision.models.segmentation)
    with_backbone = {name for part in parts for name in torchvision.models.list_models(module=part)}
    for name in torchvision.models.list_models():
        more = {"weights_backbone": None} if name in with_backbone else {}
        yield f"torchvision {name}", partial(torchvision.models.get_model, name, weights=None, **more)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and the tensors that modules hold beside them, in whatever attribute."""
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            if not name.startswith("_"):
                found |= {f"{prefix}.{name}{place}": tensor for place, tensor in _within(value)}
    return found


def _within(value: object) -> Iterator[tuple[str, torch.Tensor]]:
    items = enumerate(value) if isinstance(value, list | tuple) else ()
    items = value.items() if isinstance(value, dict) else items
    if isinstance(value, torch.Tensor):
        yield "", value
    for key, item in items:
        if isinstance(item, torch.Tensor):
            yield f"[{key}]", item


def state_for(module: nn.Module) -> dict[str, torch.Tensor]:
    """New values for all that is saved, the same ones for names of one memory; with its metadata."""
    generator = torch.Generator().manual_seed(1)
    state = module.state_dict()
    known: dict[object, str] = {}
    for name, tensor in list(state.items()):
        first = known.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, name)
        new = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 1
        state[name] = state[first].clone() if first != name else new.to(tensor.dtype)
    return state


def differing(found: nn.Module, wanted: nn.Module) -> list[str]:
    """Names whose tensors are not the same, bit by bit, in dtype, strides and requires_grad."""
    ours, theirs = tensors_of(found), tensors_of(wanted)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name])
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def looks(tensor: torch.Tensor) -> object:
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.device

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return looks(one) == looks(other) and torch.equal(raw(one), raw(other))


def result(build: Callable[[], nn.Module], largest_bytes: float) -> str:
    """What came of one model: "equal", "built", "refused as by torch", or what differs."""
    try:
        handle = wl.defer(build)
    except Exception as error:
        try:
            build()
        except Exception as theirs:
            return "refused as by its constructor" if type(theirs) is type(error) else f"raises {error!r}"
        return f"raises {error!r}"
    if handle.nbytes > largest_bytes:
        return "built"
    torch.manual_seed(0)
    wanted = build()
    state = state_for(wanted)
    wanted.load_state_dict(state)
    different = differing(handle.load(state, copy=True), wanted)
    return f"{len(different)} tensors differ: {', '.join(different[:4])}" if different else "equal"


def main() -> None:
    """Look at all that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--largest", type=float, default=250.0, metavar="MB")
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    count: Counter[str] = Counter()
    start = time.monotonic()
    for name, build in islice(builders(), arguments.first, None):
        if arguments.only and name.split()[1] not in arguments.only:
            continue
        found = result(build, arguments.largest * 1e6)
        known = found in ("equal", "built", "refused as by its constructor")
        count[found if known else "differs"] += 1
        if not known:
            print(f"{name}: {found}", flush=True)
    print(dict(count), f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
