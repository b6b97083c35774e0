"""Every rule of the formats, and the index against the shard files; on request the content as well."""

from __future__ import annotations

import os
from collections.abc import Sequence

from weightlift.checkpoint.gather import gather
from weightlift.checkpoint.integrity import check_files
from weightlift.checkpoint.open import resolve
from weightlift.checkpoint.part import Part
from weightlift.errors import CheckpointError, Problem


def verify(
    path: str | os.PathLike[str], *, content: bool = False, within: str | Sequence[str] | None = None
) -> tuple[Problem, ...]:
    """All that is wrong with a checkpoint; empty if nothing is. Raises nothing for what it finds. ``within`` as
    `open_checkpoint` takes it.

    Stricter than opening in one thing: keys in the shard files that the index does not list are problems. With
    ``content`` every byte is read and hashed, and a file for which no hash is written down is a problem; otherwise
    tensor bytes are not looked at, as no format here has a checksum of them that all its writers fill in.
    """
    try:
        paths, is_index, _ = resolve(path, revision=None, token=None, local_files_only=True)
    except CheckpointError as error:
        return error.problems
    gathered = gather(paths, is_index=is_index, part=Part.of(within))
    unlisted = (
        Problem(
            "the index does not list the key",
            key=entry.key,
            file=entry.file,
            expected=f"a line in {paths[0]}",
            hint="loaders leave it out; add it to the index, or remove it from the file",
        )
        for entry in gathered.unlisted
    )
    files = [*paths[: int(is_index)], *(item.file.path for item in gathered.contents)]
    hashed = check_files(files) if content else ()
    return (*gathered.problems, *unlisted, *hashed)
