"""What speaks against a plan, name by name, as a user reads it: records in, `Problem`s out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightlift.deferred.inventory import ModuleSpec, TensorSpec
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.nearest import nearest_names
from weightlift.plan.prefixes import quoted
from weightlift.plan.records import Action, Offer, Row, Unexpected

_HINTS = 20


def dropping(condition: str) -> str:
    """What leaves out the keys of which ``condition``, an expression of ``key``, is true."""
    return f"key_mapping=lambda key: None if {condition} else key"


def _dropped(key: str) -> str:
    return f"drop it: {dropping(f'key == {quoted(key)}')}"


def unfit(item: TensorSpec, offer: Offer) -> Problem:
    """For an expanded tensor that has to be filled in place."""
    return Problem(
        f"elements of the {item.kind} share memory (it is expanded), so that it cannot be filled",
        key=offer.key,
        fqn=item.fqn,
        file=offer.entry.file,
        found=f"strides {list(item.stride)} for shape {list(item.shape)}",
        hint="clone() it where the module makes it, as load_state_dict would need it, too",
    )


def unfillable(item: TensorSpec, offer: Offer) -> Problem:
    """For a tensor that torch copies no ordinary value into."""
    return Problem(
        f"the {item.kind} is no strided tensor, so that no value of a checkpoint can be copied into it",
        key=offer.key,
        fqn=item.fqn,
        file=offer.entry.file,
        found=f"a {item.unstrided} tensor in the module",
        hint="make it a strided one in the module, or keep what the constructor computed: pass strict=False and"
        f" {_dropped(offer.key)}",
    )


def mismatched(item: TensorSpec, offer: Offer) -> Problem:
    """For a tensor that is offered in another shape."""
    entry = offer.entry
    return Problem(
        "the shapes differ",
        key=offer.key,
        fqn=item.fqn,
        file=entry.file,
        start=entry.start if entry.file else None,
        end=entry.end if entry.file else None,
        expected=f"{list(item.shape)} as the module has it",
        found=f"{list(entry.shape)} in the checkpoint",
        hint="build the module with the checkpoint's configuration, or pass ignore_mismatched=True to initialise it",
    )


def lacking(rows: Sequence[Row], unexpected: Sequence[Unexpected], saved_as: Mapping[str, str]) -> list[Problem]:
    """For each row that nothing provides, with the most similar of the ``unexpected`` names. ``saved_as``: under which
    others the values of names were saved that were tied."""
    problems: list[Problem] = []
    keys = {item.name: item.key for item in unexpected}
    names = list(keys)
    for row in rows:
        if row.unstrided:
            problems.append(_not_to_be_had(row))
            continue
        hint = "map names with key_mapping, or pass strict=False to initialise what is missing"
        if row.fqn in saved_as:
            hint = (
                f"it was tied to {saved_as[row.fqn]} when this was saved, as the file says: tie them in the module, or"
                " in the callable that builds it"
            )
        # With a prefix missing everywhere a few hints tell it, and each costs a look at all keys.
        elif len(problems) < _HINTS and (near := nearest_names(row.fqn, names)):
            near = [name if name == keys[name] else f"{name} (key {keys[name]})" for name in near]
            hint = f"similar keys: {', '.join(near)}; {hint}"
        problems.append(
            Problem(
                f"the {row.kind} is missing in the checkpoint",
                fqn=row.fqn,
                expected=f"a tensor of shape {list(row.shape)}",
                hint=hint,
            )
        )
    return problems


def _not_to_be_had(row: Row) -> Problem:
    return Problem(
        f"the {row.kind} is missing in the checkpoint, from which no {row.unstrided} tensor can be loaded",
        fqn=row.fqn,
        hint="register it with persistent=False, or pass strict=False to keep what the constructor computed",
    )


def without_value(spec: ModuleSpec, rows: Sequence[Row], options: LoadOptions) -> list[Problem]:
    """What was built on ``meta`` and gets no value. A name that strict finds missing is not told twice."""
    if all(item.device != "meta" for item in spec.tensors):
        return []
    mismatched = {row.fqn for row in rows if row.action is Action.MISMATCHED}
    provided = {
        row.target for row in rows if row.entries or (row.tied_to is not None and row.tied_to not in mismatched)
    }
    told = {row.fqn for row in rows if row.lacking} if options.strict else set()
    return [
        Problem(
            f"the {row.kind} was built without a value, on meta, and nothing provides one",
            fqn=row.fqn,
            # A buffer that is not persistent is never looked for in a checkpoint.
            hint="build it outside torch.device('meta')" + (", or add it to the checkpoint" if item.persistent else ""),
        )
        for item, row in zip(spec.tensors, rows, strict=True)
        if item.device == "meta" and not item.lazy and row.target not in provided and row.fqn not in told
    ]


def unplaced(item: Unexpected, *, computed: bool) -> Problem:
    """For what the checkpoint holds and the module has no place for. ``computed``: the module has a buffer of this
    name that it does not save."""
    entry = item.entry
    file = None if entry is None else entry.file
    if computed:
        what = "the module computes its buffer of this name itself (persistent=False)"
    else:
        what = "no tensor of the module has this name" if entry is not None else "the module has no place for this"
    return Problem(
        what if item.name == item.key else f"renamed to {item.name}; {what}",
        key=item.key,
        file=file,
        start=entry.start if entry is not None and file else None,
        end=entry.end if entry is not None and file else None,
        found=f"a tensor of shape {list(entry.shape)}" if entry is not None else None,
        hint=f"pass strict=False to leave it out, or {_dropped(item.key)}"
        if computed
        else "map names with key_mapping, or pass strict=False to leave it out",
    )
