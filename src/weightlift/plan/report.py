"""What a plan says to a reader: the lists torch and Transformers users know, a table, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weightlift.checkpoint.entry import TensorEntry, nbytes_of
from weightlift.errors import told
from weightlift.folding import as_one, folded, unnumbered
from weightlift.plan.records import Action, Decisions, Part, Row
from weightlift.visible import visible


@dataclass(frozen=True, slots=True, repr=False)
class LoadReport:
    """The outcome of matching, by name. ``mismatched_keys`` holds (fqn, shape in the checkpoint, shape in the module).

    ``missing_keys`` are names of the module that nothing provides, as torch counts them but without tied names that
    another name provides, and without those that a state-dict hook excused. Tensors are among the ``initialised``, in
    an ``existing`` module among the ``kept``, extra state in neither; texts about a plan that is ``refused`` call them
    missing. ``left_out`` holds (fqn, fqn of the same memory whose value was taken instead), once a plan was executed
    without ``strict``.
    ``loaded_bytes`` are those of the results, ``read_bytes`` those of the checkpoint's tensors: they differ by casts.
    ``mismatched_ties`` holds (fqn, fqn of the tied name that provides its value) of mismatched keys that have one.
    ``unexpected_names`` are what key mapping and state-dict hooks made of the ``unexpected_keys``, one for each.
    """

    loaded: tuple[str, ...]
    tied: tuple[str, ...]
    initialised: tuple[str, ...]
    kept: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    loaded_bytes: int
    read_bytes: int
    left_out: tuple[tuple[str, str], ...] = ()
    existing: bool = False
    mismatched_ties: tuple[tuple[str, str], ...] = ()
    refused: bool = False
    unexpected_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        left_out = [f"{fqn} (that of {kept})" for fqn, kept in self.left_out]
        lines = [self.headline(), *self.notes(), *_listing("left out, as the same memory has another value", left_out)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<LoadReport: {self.headline()}>"  # the lists may have thousands of names

    def headline(self) -> str:
        """How many of each, and bytes, in one line."""
        size = human_bytes(self.loaded_bytes)
        if self.read_bytes != self.loaded_bytes:
            size += f", {human_bytes(self.read_bytes)} in the checkpoint"
        # What is missing for a plan that is refused is not initialised, and nothing is kept in its place.
        missing = set(self.missing_keys) if self.refused else set()
        initialised, kept = (len(names) - len(missing.intersection(names)) for names in (self.initialised, self.kept))
        return (
            f"{len(self.loaded)} loaded ({size}), {len(self.tied)} tied, {initialised} initialised, {kept} kept,"
            f"{f' {len(missing)} missing,' if missing else ''}"
            f" {len(self.mismatched_keys)} mismatched, {len(self.unexpected_keys)} unexpected"
        )

    def warning(self) -> str:
        """What did not match, in one line; empty when all did."""
        return "; ".join(line.strip() for line in self.notes())

    def notes(self) -> list[str]:
        """A line for each kind of what did not match; empty when all did."""
        done = "" if self.refused else ", kept as it was" if self.existing else ", initialised"
        lines = _listing(f"missing in the checkpoint{done}", self.missing_keys)
        lines += _listing("in the checkpoint, not in the module", self.unexpected())
        provided = dict(self.mismatched_ties)
        lone = [_unequal(*item) for item in self.mismatched_keys if item[0] not in provided]
        tied = [f"{_unequal(*item)} = {provided[item[0]]}" for item in self.mismatched_keys if item[0] in provided]
        lines += _listing(f"of another shape{done}", lone)
        return lines + _listing("of another shape, with the value of a tied name", tied)

    def unexpected(self) -> list[str]:
        """Unexpected keys for a reader: of one that was renamed the name that nobody has, too."""
        names = self.unexpected_names or self.unexpected_keys
        pairs = zip(self.unexpected_keys, names, strict=True)
        return [key if key == name else f"{key} as {name}" for key, name in pairs]

    def as_json(self) -> dict[str, Any]:
        """The report as plain data for ``json.dumps``, under the names that it has here."""
        return {
            "loaded": list(self.loaded),
            "tied": list(self.tied),
            "initialised": list(self.initialised),
            "kept": list(self.kept),
            "missing_keys": list(self.missing_keys),
            "unexpected_keys": list(self.unexpected_keys),
            "unexpected_names": list(self.unexpected_names),
            "mismatched_keys": _mismatched_json(self),
            "mismatched_ties": [{"fqn": fqn, "tied_to": other} for fqn, other in self.mismatched_ties],
            "left_out": [{"fqn": fqn, "kept": other} for fqn, other in self.left_out],
            "loaded_bytes": self.loaded_bytes,
            "read_bytes": self.read_bytes,
            "existing": self.existing,
            "refused": self.refused,
        }


def _unequal(fqn: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    return f"{fqn} {list(found)} ≠ {list(wanted)}"


def _listing(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(fold for fold, _ in folded(names))
    return [visible(f"  {title}: {shown if len(shown) < 2000 else shown[:2000] + ' …'}")]


def report(decisions: Decisions) -> LoadReport:
    """Sort the rows of a plan into the lists that a user looks for."""
    rows = decisions.rows
    loaded = [row for row in rows if row.action is Action.LOADED]

    def names(action: Action) -> tuple[str, ...]:
        return tuple([row.fqn for row in rows if row.action is action])

    return LoadReport(
        loaded=names(Action.LOADED),
        tied=names(Action.TIED),
        initialised=names(Action.INITIALISED),
        kept=names(Action.KEPT),
        missing_keys=(
            *(row.fqn for row in rows if row.lacking), *decisions.missing_extra_state, *decisions.hook_missing
        ),
        unexpected_keys=tuple(item.key for item in decisions.unexpected),
        unexpected_names=tuple(item.name for item in decisions.unexpected),
        mismatched_keys=tuple(
            (row.fqn, row.offer.entry.shape, row.shape)
            for row in rows
            if row.action is Action.MISMATCHED and row.offer
        ),
        loaded_bytes=sum([row.nbytes for row in loaded]),
        read_bytes=sum([nbytes_of(entry) for row in loaded for entry in row.entries]),
        left_out=decisions.left_out,
        existing=decisions.existing,
        refused=bool(decisions.problems),
        mismatched_ties=tuple(
            (row.fqn, row.tied_to) for row in rows if row.action is Action.MISMATCHED and row.tied_to is not None
        ),
    )


def table(decisions: Decisions) -> str:
    """The plan as text: a line for each name, repeated layers folded into one."""
    summary = report(decisions)
    lines = [visible(f"load {decisions.source} into {decisions.module}"), str(summary), ""]
    rows = []
    for names, members in _folded_rows(decisions.rows):
        count = f"×{len(members)}" if len(members) > 1 else ""
        word = "missing" if decisions.problems and members[0].lacking else members[0].action.value
        rows.append((word, names, count, *_cells(members)))
    rows += [("unexpected", name, f"×{count}" if count > 1 else "", "", "", "") for name, count in
             folded(summary.unexpected())]  # fmt: skip
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(visible("  ".join([*cells, row[5]]).rstrip()))
    if decisions.checks:
        lines += ["", "checked before anything is assigned:"]
        pairs = [f"{check.fqn} and {check.other_fqn}" for check in decisions.checks]
        lines += [f"  {visible(pair)} share a value: equal bytes?" for pair in pairs]
    if decisions.early_keys:
        early = ", ".join(name for name, _ in folded(decisions.early_keys))
        lines += ["", visible(f"read early for state-dict hooks: {early}")]
    if decisions.problems:
        number = len(decisions.problems)
        lines += ["", f"refused, {number} problem{'s' * (number != 1)}:"]
        lines += [f"  {line}" for line in told(decisions.problems)]
    return "\n".join(lines)


def _cells(members: Sequence[Row]) -> tuple[str, str, str]:
    """Shape, dtype and source of rows that share a line."""
    row = members[0]
    shape = "×".join(map(str, row.shape)) if row.shape else "scalar"
    dtype = short_dtype(row.dtype)
    source = ""
    if row.entries:
        dtypes = "/".join(dict.fromkeys(short_dtype(entry.dtype) for entry in row.entries))
        if row.cast:
            dtype = f"{dtypes}→{dtype}"
        source = _source(row) if len(members) == 1 else _sources(members)
    elif row.action is Action.MISMATCHED and row.offer is not None:
        keys = [member.offer.key for member in members if member.offer]
        source = f"found {'×'.join(map(str, row.offer.entry.shape)) or 'scalar'}"
        if keys != [member.fqn for member in members]:
            source += f" as {', '.join(name for name, _ in folded(keys))}"
        source += "" if row.tied_to is None else f" = {row.tied_to}"
    elif row.tied_to is not None:
        source = f"= {row.tied_to}"
    elif row.unstrided:
        source = row.unstrided
    if row.device != "cpu":
        source = f"{source} → {row.device}"
    return shape, dtype, source


def _source(row: Row) -> str:
    if not row.parts:
        assert row.offer is not None
        return _place(row.offer.entry) + (f" as {row.offer.key}" if row.offer.key != row.fqn else "")
    first = row.parts[0]
    place = f"{_place(first.entry)} as {first.key}"
    return place if len(row.parts) == 1 else f"{len(row.parts)} parts: {place}, …"


def _sources(members: Sequence[Row]) -> str:
    entries = [entry for row in members for entry in row.entries]
    files = list(dict.fromkeys(entry.file.name for entry in entries if entry.file is not None))
    where = "memory" if not files else files[0] if len(files) == 1 else f"{len(files)} files"
    keys = [part.key for row in members for part in row.parts] or [row.offer.key for row in members if row.offer]
    renamed = keys != [row.fqn for row in members]
    named = " as " + ", ".join(name for name, _ in folded(keys)) if renamed else ""
    kind = "parts" if members[0].parts else "ranges"
    return f"{where}{named}" if not files else f"{len(entries)} {kind} of {where}{named}"


def _place(entry: TensorEntry) -> str:
    return "memory" if entry.file is None else f"{entry.file.name}[{entry.start}:{entry.end}]"


def short_dtype(dtype: object) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _folded_rows(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = unnumbered(row.fqn)
        found = row.offer.entry.shape if row.offer and row.action is Action.MISMATCHED else None
        source = (row.offer.entry.dtype if row.offer else None, len(row.parts), found)
        key = (pattern, row.action, row.lacking, row.shape, row.dtype, row.device, source, row.tied_to, row.unstrided)
        groups.setdefault(key, []).append(row)
    return [(as_one([row.fqn for row in members]), members) for members in groups.values()]


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and progress bars count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def as_json(decisions: Decisions) -> dict[str, Any]:
    """The plan as plain data for ``json.dumps``: shapes as lists, dtypes and devices as strings, half-open ranges."""
    summary = report(decisions)
    return {
        "module": decisions.module,
        "source": decisions.source,
        "strict": decisions.strict,
        "files": [{"path": str(file.path), "bytes": file.size_bytes} for file in decisions.files],
        "tensors": [_row_json(row) for row in decisions.rows],
        "missing_keys": list(summary.missing_keys),
        "unexpected_keys": list(summary.unexpected_keys),
        "mismatched_keys": _mismatched_json(summary),
        "missing_extra_state": list(decisions.missing_extra_state),
        "early_keys": list(decisions.early_keys),
        "checks": [{"fqn": check.fqn, "other": check.other_fqn} for check in decisions.checks],
        "problems": [str(problem) for problem in decisions.problems],
        "loaded_bytes": summary.loaded_bytes,
        "read_bytes": summary.read_bytes,
    }


def _mismatched_json(summary: LoadReport) -> list[dict[str, Any]]:
    found = summary.mismatched_keys
    return [{"fqn": fqn, "found": list(shape), "expected": list(wanted)} for fqn, shape, wanted in found]


def _row_json(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "fqn": row.fqn,
        "action": row.action.value,
        "kind": row.kind,
        "shape": list(row.shape),
        "dtype": short_dtype(row.dtype),
        "device": row.device,
    }
    if row.tied_to is not None:
        found["tied_to"] = row.tied_to
    if row.parts:
        found["parts"] = [_part_json(part) for part in row.parts]
    elif row.offer is not None:
        entry = row.offer.entry
        found["key"] = row.offer.key
        found["source_dtype"] = short_dtype(entry.dtype)
        found["file"] = None if entry.file is None else str(entry.file)
        found["range"] = [entry.start, entry.end]
        if row.action is Action.MISMATCHED:
            found["found_shape"] = list(entry.shape)
    return found


def _part_json(part: Part) -> dict[str, Any]:
    entry = part.entry
    return {
        "key": part.key,
        "source_dtype": short_dtype(entry.dtype),
        "file": None if entry.file is None else str(entry.file),
        "range": [entry.start, entry.end],
        "source_stride": None if entry.stride is None else list(entry.stride),
        "shape": list(part.shape),
        "stride": list(part.stride),
        "offset": part.offset,
    }
