"""Checkpoints that are quantised already, where the quantiser only replaces modules before their tensors are loaded.

compressed-tensors is such a one: it puts packed weights and scales in the places of dense weights, and what the
checkpoint holds goes into them as it is. It works on shapes alone, as in Transformers: while it does, the model's
parameters are on the meta device, and afterwards they are what they were, or memory that is reserved for what is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, get_hf_quantizer
from transformers.utils.quantization_config import QuantizationMethod

from weightlift.deferred.inventory import Inventory
from weightlift.integrations.constructors import Built
from weightlift.integrations.exclusive import NotNative
from weightlift.plan.records import Offer

_WHY = "its quantiser makes tensors of its own from what the checkpoint holds"


def quantiser(config: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of Transformers' ``get_hf_quantizer``, which logs and warns: what is left to Transformers is told from
    the checkpoint's configuration, before that."""
    written = _written(config)
    method = _method(written)
    if method in AUTO_QUANTIZATION_CONFIG_MAPPING:  # of others Transformers itself says that it has none
        _refuse_method(method)
        _refuse_converted(written.get("dequantize") or written.get("run_compressed") is False)
    return get_hf_quantizer(config, given, *args, **kwargs)


def _written(config: Any) -> dict[str, Any]:
    """What a checkpoint's configuration says of its quantiser; that of the text model within it counts, too."""
    found = getattr(config, "quantization_config", None)
    if not found:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return found if isinstance(found, dict) else {}


def _method(written: dict[str, Any]) -> Any:
    """bitsandbytes has two, told apart by what they load in, also where no method is named."""
    for bits in ("4bit", "8bit"):
        if written.get(f"load_in_{bits}"):
            return f"{QuantizationMethod.BITS_AND_BYTES.value}_{bits}"
    return written.get("quant_method")


def refuse_quantised(config: Any) -> None:
    """Raise `NotNative` unless the quantiser of a configuration only replaces modules."""
    found = getattr(config, "quantization_config", None)
    _refuse_method(getattr(found, "quant_method", None))
    _refuse_converted(getattr(found, "dequantize", False) or getattr(found, "use_optimized_inference", False))


def _refuse_converted(converted: Any) -> None:
    if converted:
        raise NotNative("compressed tensors that are converted while they load", _WHY)


def _refuse_method(method: Any) -> None:
    name = str(getattr(method, "value", method))
    if name != "compressed-tensors":
        raise NotNative(f"a model quantised by {name}", _WHY)


def refuse_integers(
    offers: Mapping[str, Offer], places: Mapping[str, torch.Tensor | None], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Raise `NotNative` for integers of a quantised checkpoint that fit but are of another dtype than their places,
    which in Transformers take the integers' dtype."""
    for name, offer in offers.items():
        place, wanted, found = places[name], dtypes.get(name), offer.entry.dtype
        if place is None or found.is_floating_point or offer.entry.shape != tuple(place.shape):
            continue
        if found != wanted:
            raise NotNative(f"{name}, of {found} where the model has {wanted}", "the place becomes what the value is")


class ShapesOnly:
    """A context in which, once `show` was called, a model's parameters are shapes."""

    def __init__(self) -> None:
        self._built: Built | None = None
        self._hidden: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def show(self, built: Built) -> None:
        """Put shapes in the places of parameters; names that share one share its shape."""
        self._built = built
        shown: dict[int, nn.Parameter] = {}
        for slot in Inventory.of(built.model).slots:
            if slot.kind == "parameter":
                if id(slot.tensor) not in shown:
                    empty = torch.empty_like(slot.tensor, device="meta")
                    shape = nn.Parameter(empty, requires_grad=slot.tensor.requires_grad)
                    shown[id(slot.tensor)] = shape
                    self._hidden[id(shape)] = (shape, slot.tensor)
                slot.put(shown[id(slot.tensor)])

    def __enter__(self) -> ShapesOnly:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is None and self._built is not None:
            self._built.extend(self._restore)

    def _restore(self) -> None:
        """To be run while the recorder is on: what is new gets memory that is reserved."""
        assert self._built is not None
        made: dict[int, torch.Tensor] = {}
        for slot in Inventory.of(self._built.model).slots:
            if not slot.tensor.is_meta:
                continue
            if id(slot.tensor) in self._hidden:
                slot.put(self._hidden[id(slot.tensor)][1])
                continue
            if id(slot.tensor) not in made:
                made[id(slot.tensor)] = _reserved(slot.tensor)
            slot.put(made[id(slot.tensor)])
        self._hidden.clear()  # dense weights that were replaced go, and with them what would have initialised them


def _reserved(shape: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(shape.shape, dtype=shape.dtype)
    if not isinstance(shape, nn.Parameter):
        return memory
    made = nn.Parameter(memory, requires_grad=shape.requires_grad)
    made.__dict__.update(shape.__dict__)
    return made
