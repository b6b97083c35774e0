"""What a rank is about to load, as a few hashes that ranks can compare, and who differs in what."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch

from weightlift.ambient import outside_modes
from weightlift.checkpoint.entry import ShardFile
from weightlift.errors import Problem
from weightlift.options import LoadOptions
from weightlift.plan.records import Decisions
from weightlift.transfer.memory import bytes_of_values

_SAMPLE_BYTES = 4096
_SAMPLES = 4
_TENSORS = 64
_TENSOR_SAMPLE_BYTES = 128
_HINTS = {
    "module": "every rank of a process_group must build the same module; each stage of a pipeline has one of its own",
    "options": "every rank must pass the same options",
    "checkpoint": "every rank must be given the same checkpoint",
    "contents": "the headers are equal, so these are other weights of the same kind of model",
}
_OPTIONS = ("dtype", "strict", "ignore_mismatched", "seed", "defer", "source_rank")


def note_of(decisions: Decisions, options: LoadOptions) -> str:
    """Hashes of the module, the checkpoint's tensors, the options, and which files on which disk they are."""
    module = [(row.fqn, row.kind, row.shape, str(row.own_dtype), row.target) for row in decisions.rows]
    unexpected = [item.key for item in decisions.unexpected]
    tensors = [
        (row.fqn, row.action.value, str(row.dtype), [_entry(entry) for entry in row.entries]) for row in decisions.rows
    ]
    offered = {row.offer.key for row in decisions.rows if row.offer is not None}
    keys = sorted(offered.union(unexpected, (entry.key for row in decisions.rows for entry in row.entries)))
    seen = decisions.files if options.source_rank is None else ()  # else one rank sees them
    files = [(file.path.name, file.size_bytes) for file in seen]
    places = [(file.size_bytes, file.mtime_ns, file.inode) for file in seen]
    chosen = {name: str(getattr(options, name)) for name in _OPTIONS}
    parts = {
        "module": _hash(module),
        "options": _hash(chosen),
        "checkpoint": _hash([tensors, files, unexpected]),
        "listed": _hash([files, keys]),
        "places": _hash(places),
        "memory": options.source_rank is None and any(True for _ in _in_memory(decisions)),
    }
    return json.dumps(parts)


def _entry(entry: object) -> tuple[object, ...]:
    found = (getattr(entry, name) for name in ("key", "shape", "dtype", "file", "start", "end"))
    return tuple(getattr(item, "name", None) if hasattr(item, "parent") else str(item) for item in found)


def samples_of(decisions: Decisions, tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of a few thousand bytes of each file and of the tensors in memory, to tell copies of one checkpoint from
    other weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    for sample in _of_files(decisions.files):
        digest.update(sample)
    keys = sorted({key for key in _in_memory(decisions) if key in tensors})
    with outside_modes():
        for key in keys[:: max(1, -(-len(keys) // _TENSORS))]:
            for end in _ends_of(tensors[key].detach()):
                digest.update(end)
    return json.dumps({"contents": digest.hexdigest()})


def _of_files(files: Iterable[ShardFile]) -> Iterator[bytes]:
    for file in files:
        with open(file.path, "rb") as handle:
            for number in range(1, _SAMPLES + 1):
                handle.seek(max(0, file.size_bytes * number // _SAMPLES - _SAMPLE_BYTES), os.SEEK_SET)
                yield handle.read(_SAMPLE_BYTES)


def _in_memory(decisions: Decisions) -> Iterator[str]:
    """Keys of what is loaded from tensors in memory."""
    return (entry.key for row in decisions.rows for entry in row.entries if entry.file is None)


def _ends_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The first and the last bytes of its values, wherever they lie."""
    if not tensor.numel():
        return
    tensor = tensor if tensor.dim() else tensor.reshape(1)
    count = max(1, _TENSOR_SAMPLE_BYTES // tensor.dtype.itemsize)
    others = tensor.dim() - 1
    for piece in (tensor[(0,) * others][:count], tensor[(-1,) * others][-count:]):
        yield bytes_of_values(piece)


def same_places(notes: Sequence[str]) -> bool:
    """Whether all ranks see the very same files, and nothing else, so that contents need not be compared."""
    read = [json.loads(note) for note in notes]
    return len({note["places"] for note in read}) == 1 and not any(note["memory"] for note in read)


def differences(notes: Sequence[str], names: Sequence[int]) -> list[Problem]:
    """Who differs from most ranks in what. ``names`` are the ranks that wrote the notes, in order."""
    read = [json.loads(note) for note in notes]
    problems = []
    told: set[int] = set()
    for part, hint in _HINTS.items():
        values = [note.get(part) for note in read]
        if len(set(values)) < 2:
            continue
        usual, _ = Counter(values).most_common(1)[0]
        groups: dict[str, list[int]] = {}
        listed = read[values.index(usual)].get("listed")
        for name, note, value in zip(names, read, values, strict=True):
            # What the module and the options make of one checkpoint differs with them.
            same = part == "checkpoint" and name in told and note["listed"] == listed
            if value != usual and not same:
                groups.setdefault(str(value), []).append(name)
                told.add(name)
        most = [name for name, value in zip(names, values, strict=True) if value == usual]
        for group in groups.values():
            text = f"{named(group)} {'has' if len(group) == 1 else 'have'} another {_WORDS[part]} than {named(most)}"
            problems.append(Problem(text, hint=hint))
    return problems


_WORDS = {"module": "module", "checkpoint": "checkpoint", "options": "set of options", "contents": "checkpoint"}


def as_text(problems: Sequence[Problem]) -> str:
    """Problems for the way between ranks."""
    return json.dumps([{name: value for name, value in asdict(item).items() if value is not None} for item in problems])


def from_text(text: str) -> list[Problem]:
    """The other direction of `as_text`."""
    return [Problem(**item) for item in json.loads(text)]


def named(ranks: Sequence[int]) -> str:
    """Ranks by their numbers, the first few of many."""
    shown = ", ".join(map(str, ranks[:8])) + f" and {len(ranks) - 8} more" * (len(ranks) > 8)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _hash(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
