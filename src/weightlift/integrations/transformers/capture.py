"""What Transformers' classes declare that they can record, for `weightlift.capture`.

Read from the classes' own ``_can_record_outputs`` and from the decorator of their forwards; nothing is changed.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from weightlift.capture.declared import Declaration, Scope, Site
from weightlift.capture.select import Selected, original, walk

_MODULE = "transformers.utils.output_capturing"


def declaration(model: nn.Module) -> Declaration | None:
    """The scopes and sites of a Transformers model, also of one within a wrapper, as PEFT's and DDP's; else None."""
    scopes: list[Scope] = []
    sites: list[Site] = []
    names: dict[int, str] = {}
    owners: dict[str, list[tuple[str, OutputRecorder]]] = {}
    outermost: list[Selected] = []
    for item in walk(model):
        module = original(item.module)
        names[id(module)] = item.fqn
        around = _nearest(item.fqn, owners)
        if isinstance(module, PreTrainedModel):
            outermost += [Selected(item.fqn, module)] if around is None else []
            around = item.fqn
            owners[item.fqn] = _tasks(module)
            tie = _ties_last(module)
            if tie is not None:
                keys = tuple(dict.fromkeys(key for key, _ in owners[item.fqn]))
                scopes.append(Scope(item.fqn, keys, ("vision_hidden_states", "last_hidden_state") if tie else ()))
        # The nearest model around a module declares what is recorded of it.
        for key, spec in () if around is None else owners[around]:
            if _matches(module, item.fqn, spec):
                initial = key == "hidden_states" and getattr(spec, "capture_initial_hidden_state", True)
                sites.append(Site(item.fqn, key, spec.index, bool(initial)))
    if not outermost:
        return None
    alone = outermost[0] if len(outermost) == 1 else None
    return Declaration(tuple(scopes), tuple(sites), {} if alone is None else _aliases(alone, scopes, names))


def _nearest(fqn: str, owners: dict[str, Any]) -> str | None:
    """The name of the model that a module lies in, or is."""
    while fqn and fqn not in owners:
        fqn = fqn.rpartition(".")[0]
    return fqn if fqn in owners else None


def _tasks(model: PreTrainedModel) -> list[tuple[str, OutputRecorder]]:
    tasks = []
    for key, specs in (getattr(model, "_can_record_outputs", None) or {}).items():
        for spec in specs if isinstance(specs, list) else [specs]:
            if isinstance(spec, str):
                spec = OutputRecorder(target_class=None, index=_default(key), class_name=spec)
            elif not isinstance(spec, OutputRecorder):
                spec = OutputRecorder(target_class=spec, index=_default(key))
            tasks.append((key, spec))
    return tasks


def _default(key: str) -> int:
    return 0 if "hidden_states" in key else 1


def _matches(module: nn.Module, fqn: str, spec: OutputRecorder) -> bool:
    by_class = spec.target_class is not None and isinstance(module, spec.target_class)
    by_name = spec.class_name is not None and f".{fqn}".endswith(spec.class_name)
    if not (by_class or by_name):
        return False
    return spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f".{fqn}."


def _ties_last(model: PreTrainedModel) -> bool | None:
    """Whether the last hidden state of this model is its normalised output; None if its forward gathers nothing."""
    function: Any = type(model).forward
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and function.__globals__.get("__name__") == _MODULE:
            cells = dict(zip(code.co_freevars, function.__closure__ or ()))
            if "tie_last_hidden_states" in cells:
                configured = getattr(model.config, "tie_last_hidden_states", None)
                return bool(cells["tie_last_hidden_states"].cell_contents if configured is None else configured)
        function = getattr(function, "__wrapped__", None)
    return None


def _aliases(whole: Selected, scopes: list[Scope], names: dict[int, str]) -> dict[str, str]:
    model: Any = whole.module
    known = {scope.fqn for scope in scopes}
    aliases = {"": whole.fqn} if whole.fqn in known else {}
    for alias, look in (("decoder", "get_decoder"), ("encoder", "get_encoder")):
        try:
            found = names.get(id(original(getattr(model, look)())))
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if found in known:
            aliases[alias] = found
    if aliases.get("") == whole.fqn:
        return aliases
    if getattr(model.config, "is_encoder_decoder", False):
        return {**aliases, **({"": aliases["decoder"]} if "decoder" in aliases else {})}
    decoder = aliases.get("decoder")
    outer = [fqn for fqn in known if not any(fqn != other and fqn.startswith(other + ".") for other in known)]
    if len(outer) == 1:
        return {"": outer[0]}
    if decoder is not None and (decoder.rpartition(".")[2] in ("language_model", "decoder")):
        return {"": decoder}
    return {}
