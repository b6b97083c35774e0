"""From chosen files to one set of keys: the rules that concern several files at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightlift.checkpoint.dcp import read_dcp
from weightlift.checkpoint.dcp_metadata import NAME as DCP_METADATA
from weightlift.checkpoint.dcp_metadata import SUFFIX as DCP_SUFFIX
from weightlift.checkpoint.dcp_safetensors import joined
from weightlift.checkpoint.dduf import member_at, read_member
from weightlift.checkpoint.entry import ShardContents, TensorEntry
from weightlift.checkpoint.files import sniff_file
from weightlift.checkpoint.index import Index, read_index
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.checkpoint.safetensors import read_safetensors
from weightlift.checkpoint.torch_legacy import read_torch_legacy
from weightlift.checkpoint.torch_zip import read_torch_zip
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem


@dataclass(slots=True)
class Gathered:
    """All that is known of a checkpoint's files, problems included.

    ``unlisted`` are keys of the shard files that the index does not name: left out of a checkpoint, as the index
    rules, and reported by `verify`.
    """

    contents: list[ShardContents] = field(default_factory=list)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    extras: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unlisted: list[TensorEntry] = field(default_factory=list)
    missing: bool = False

    @property
    def state_dict_metadata(self) -> Mapping[str, Mapping[str, object]] | None:
        """The ``_metadata`` of the files' state dicts, merged."""
        found = [item.state_dict_metadata for item in self.contents if item.state_dict_metadata is not None]
        return {name: value for item in reversed(found) for name, value in item.items()} if found else None


def gather(paths: tuple[Path, ...], *, is_index: bool, part: Part = WHOLE) -> Gathered:
    """Read the headers of the files, or of those that the one index names; of pickles ``part``. Raises nothing that it
    can note."""
    gathered = Gathered()
    index: Index | None = None
    try:
        if is_index and paths[0].name == DCP_METADATA:
            gathered.contents += read_dcp(paths[0], part)
            paths = ()
        elif is_index:
            index = read_index(paths[0])
            paths = index.files
    except CheckpointError as error:
        _note(gathered, error)
        return gathered
    for path in paths:
        try:
            gathered.contents.append(read_file(path, part))
        except CheckpointError as error:
            _note(gathered, error)
    _merge(gathered, index)
    return gathered


def _note(gathered: Gathered, error: CheckpointError) -> None:
    gathered.problems += error.problems
    gathered.missing = gathered.missing or isinstance(error, CheckpointNotFound)


def read_file(path: Path, part: Part = WHOLE) -> ShardContents:
    """The header of one file, by its suffix if that is ``.safetensors``, else by its content."""
    member = member_at(path)
    if member is not None:
        _require_whole(path, part)
        return read_member(member)
    if path.suffix == ".dduf":
        hint = "wl.from_pretrained(DiffusionPipeline, folder, dduf_file=name) loads it"
        problem = Problem("is an archive of a whole pipeline", file=path, expected="one model", hint=hint)
        raise CheckpointError("not the checkpoint of one model", [problem])
    if path.suffix == DCP_SUFFIX:
        hint = "pass the folder, in which .metadata says what lies where"
        problem = Problem("is a part of a distributed checkpoint", file=path, expected="the whole of it", hint=hint)
        raise CheckpointError("not a whole checkpoint", [problem])
    sniffed, size = (None, 0) if path.suffix == ".safetensors" else sniff_file(path)
    kind = sniffed.kind if sniffed is not None else None
    if path.suffix == ".safetensors" or kind == "safetensors":  # a blob of the hub's cache has no suffix
        _require_whole(path, part)
        return read_safetensors(path)
    if kind == "zip":
        return read_torch_zip(path, part)
    if kind == "pickle":
        return read_torch_legacy(path, part)
    found = sniffed.found if sniffed is not None else f"{size} bytes of something else" if size else "an empty file"
    hint = sniffed.hint if sniffed is not None else "is the download complete?"
    problem = Problem("is not a file of torch.save", file=path, expected="a zip or a pickle", found=found, hint=hint)
    raise CheckpointError("not a valid torch checkpoint", [problem])


def _require_whole(path: Path, part: Part) -> None:
    """Raise `CheckpointError` where something within a file of tensors alone is asked for."""
    if part.is_amid_others:
        expected = f"a file of torch.save, by {part.call}"
        problem = Problem("holds tensors and no mappings", file=path, expected=expected)
        raise CheckpointError("no such part", [problem])


def _merge(gathered: Gathered, index: Index | None) -> None:
    entries, owner = gathered.entries, index.weight_map if index is not None else None
    whole = joined(gathered.contents if owner is None else ())
    gathered.problems += whole.problems
    for contents in gathered.contents:
        path = contents.file.path
        for entry in contents.entries:
            first = entries.setdefault(entry.key, whole.entries.get(entry.key, entry))
            if first is not entry and id(entry) not in whole.boxes:
                gathered.problems.append(_twice(entry.key, first.file, path, index))
        for key, value in contents.extras.items():
            gathered.extras.setdefault(key, value)
        for key in contents.extras:
            if key in entries and entries[key].file != path:
                gathered.problems.append(_twice(key, entries[key].file, path, index))
    if owner is None:
        return
    read = {contents.file.path: contents for contents in gathered.contents}
    for key, path in owner.items():
        held = entries.get(key)
        # Of a file that could not be read its own problem has been noted; and of two holders, that there are two.
        if path in read and (held is None and key not in read[path].extras):
            gathered.problems.append(_absent(key, path, index, None))
        elif path in read and held is not None and held.file != path:
            gathered.problems.append(_absent(key, path, index, held.file))
    gathered.unlisted = [entry for key, entry in entries.items() if key not in owner]
    for entry in gathered.unlisted:
        del entries[entry.key]
    # Values that are no tensors are left out likewise, but extra state: writers of indexes list tensors.
    for key in [key for key in gathered.extras if key not in owner and not key.endswith("_extra_state")]:
        del gathered.extras[key]


def _twice(key: str, first: Path | None, second: Path, index: Index | None) -> Problem:
    hint = "pass the path of the file that you mean, or put those that belong together into a folder of their own"
    return Problem(
        "two shard files hold the key",
        key=key,
        file=second,
        expected="one file for each key",
        found=f"it is in {first} as well",
        hint=hint if index is None else None,
    )


def _absent(key: str, path: Path, index: Index | None, actual: Path | None) -> Problem:
    where = str(index.path) if index is not None else ""
    found = "no such key" if actual is None else f"it is in {actual}"
    return Problem(
        "the file lacks a key that the index promises", key=key, file=path, expected=f"the key, by {where}", found=found
    )
