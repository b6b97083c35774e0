"""`open_checkpoint`: whatever a checkpoint is given as, to a `Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from weightlift.checkpoint import hub
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.dcp_metadata import NAME as DCP_METADATA
from weightlift.checkpoint.gather import gather
from weightlift.checkpoint.integrity import require_content
from weightlift.checkpoint.locate import choose_in
from weightlift.checkpoint.memory import SOURCE, read_mapping
from weightlift.checkpoint.part import WHOLE, Part
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem


def open_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Checkpoint,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    within: str | Sequence[str] | None = None,
) -> Checkpoint:
    """Read the headers of a checkpoint; no tensor byte (unless ``verify``), and nothing stays open.

    ``source`` is a file (safetensors, or what torch.save wrote), an ``*.index.json``, a folder (one that
    torch.distributed.checkpoint wrote, too), a mapping of tensors, a `Checkpoint` (returned as it is), or a hub id
    ``organisation/name`` when no such path exists; only for that do ``revision``, ``token`` and ``local_files_only``
    matter. ``verify`` reads every byte, here and now, and
    compares with the hashes that are written down (docs/checkpoints.md); tensors in memory have none, and need none.

    ``within`` names the state dict in what a trainer saved: ``"state_dict"`` for ``{"state_dict": …, "epoch": …}``, a
    tuple of names for one that lies deeper. What lies beside it may be anything, code included, which is passed over:
    no byte of an optimiser's tensors is read, and nothing is run.

    Raises `CheckpointNotFound` when there is nothing at that place, `CheckpointCorrupt` when the content is not what
    its hash says, `CheckpointError` with every problem otherwise, also when no hash is known.
    Thread-safe.
    """
    part = Part.of(within)
    if isinstance(source, Checkpoint):
        if part.names:
            raise TypeError("within: expected no Checkpoint, which has been opened; give it to the call that opens")
        if verify:
            require_content(source.files, source.index)
        return source
    if isinstance(source, Mapping):
        entries, tensors, values, versions = read_mapping(source, part)
        return Checkpoint(SOURCE, entries, tensors=tensors, extras=values, state_dict_metadata=versions)
    if not isinstance(source, (str, os.PathLike)):
        expected = f"a path, a hub id, a mapping of tensors or a Checkpoint{_instead_of(source)}"
        raise TypeError(f"cannot open a checkpoint from {type(source).__name__}; expected {expected}")
    paths, is_index, name = resolve(source, revision=revision, token=token, local_files_only=local_files_only)
    opened = open_files(paths, name=name, is_index=is_index, part=part)
    if verify:
        require_content(opened.files, opened.index)
    return opened


def _instead_of(source: object) -> str:
    """What to give in place of ``source``, for a message."""
    if isinstance(source, torch.nn.Module):
        return "; give its state_dict(), and copy=True where the two are not to share memory"
    if hasattr(source, "read"):
        return "; give the path of an open file, or the mapping that torch.load makes of it"
    return ""


def open_files(
    paths: tuple[Path, ...], *, name: str, is_index: bool = False, part: Part = WHOLE
) -> Checkpoint:
    """Read the headers of these absolute paths, or of the files that the one index names; of pickles ``part``.

    Raises `CheckpointNotFound` when one is missing, `CheckpointError` with every problem otherwise.
    """
    gathered = gather(paths, is_index=is_index, part=part)
    if gathered.problems:
        kind = CheckpointNotFound if gathered.missing else CheckpointError
        raise kind(f"cannot open the checkpoint {name}", gathered.problems)
    return Checkpoint(
        name,
        gathered.entries,
        files=tuple(contents.file for contents in gathered.contents),
        extras=gathered.extras,
        state_dict_metadata=gathered.state_dict_metadata,
        index=paths[0] if is_index else None,
    )


def resolve(
    source: str | os.PathLike[str], *, revision: str | None, token: str | bool | None, local_files_only: bool
) -> tuple[tuple[Path, ...], bool, str]:
    """The files of a path or hub id, whether they are one index, and the name for messages.

    Paths are made absolute, so that a later ``chdir`` of the process changes nothing, but links are kept: that of a
    hub cache's snapshot has the suffix, its blob has not.
    """
    text = os.fspath(source)
    if text and os.path.lexists(text):
        path = Path(os.path.abspath(text))
        if path.is_dir():
            choice = choose_in(path)
            return tuple(path / name for name in choice.names), choice.is_index, str(path)
        return (path,), path.suffix == ".json" or path.name == DCP_METADATA, str(path)
    if isinstance(source, str) and hub.is_hub_id(source):
        folder, choice = hub.fetch(source, revision=revision, token=token, local_files_only=local_files_only)
        return tuple(folder / name for name in choice.names), choice.is_index, source
    hint = "a hub id has the form organisation/name"
    if text.startswith("~"):
        hint = "~ is the shell's word for a home: os.path.expanduser makes a path of it"
    elif "://" in text:
        hint = "addresses are not read: fetch the file, and pass its path; of what is on the hub, organisation/name"
    problem = Problem("no such file or folder", file=text or repr(text), hint=hint)
    raise CheckpointNotFound("no checkpoint", [problem])
