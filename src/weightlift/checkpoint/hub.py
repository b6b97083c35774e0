"""Checkpoints of the Hugging Face hub, through huggingface_hub: its cache, offline mode, revisions and tokens.

Only the files of the checkpoint are fetched. When the hub cannot be reached, or may not be, the cache answers.
huggingface_hub is imported when first needed.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from weightlift.checkpoint.dcp import file_names
from weightlift.checkpoint.dcp_metadata import NAME as DCP_METADATA
from weightlift.checkpoint.index import read_index
from weightlift.checkpoint.locate import Located, choose, choose_in
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``organisation/name``."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith(_FILE_SUFFIXES)


def fetch(repo: str, *, revision: str | None, token: str | bool | None, local_files_only: bool) -> tuple[Path, Located]:
    """Bring a repository's checkpoint into the cache; its folder there, and what was chosen in it.

    Raises `CheckpointNotFound` when neither the hub nor the cache has it.
    """
    reason: Exception | None = None
    if not local_files_only:
        try:
            return _download(repo, revision, token)
        except CheckpointError:
            raise
        except Exception as error:  # of huggingface_hub, httpx or the operating system: the cache may still have it
            reason = error
    try:
        folder = _cached(repo, revision, token, reason)
    finally:
        reason = None  # it knows this frame: a cycle, which would keep it until a collection
    return folder, choose_in(folder)


def _download(repo: str, revision: str | None, token: str | bool | None) -> tuple[Path, Located]:
    from huggingface_hub import HfApi, snapshot_download

    siblings = HfApi(token=token).model_info(repo, revision=revision).siblings or []
    names = [sibling.rfilename for sibling in siblings if "/" not in sibling.rfilename]
    choice = choose(names, f"{repo} on the hub")
    # The revision as the caller named it, so that the cache notes what it meant and finds it again offline.
    folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=_exactly(choice.names)))
    if choice.is_index:
        names = _shard_names(folder / choice.names[0])
        # The folder is named after the commit: index and shard files are of one, whatever is pushed meanwhile.
        snapshot_download(repo, revision=folder.name, token=token, allow_patterns=_exactly(names))
    return folder, choice


def _shard_names(index: Path) -> list[str]:
    """The file names in an index whose files are not here yet."""
    import json

    if index.name == DCP_METADATA:
        return file_names(index)
    try:
        weight_map = json.loads(index.read_bytes()).get("weight_map")
        return sorted({name for name in weight_map.values() if isinstance(name, str)})
    except (ValueError, AttributeError, RecursionError):
        read_index(index)  # says what is wrong with it
        raise


def _exactly(names: list[str] | tuple[str, ...]) -> list[str]:
    return [glob.escape(name) for name in names]


def _cached(repo: str, revision: str | None, token: str | bool | None, reason: Exception | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # No pattern: only the folder is asked for. What it lacks shows when the files are opened.
        return Path(snapshot_download(repo, revision=revision, token=token, local_files_only=True, allow_patterns=[]))
    except Exception as error:
        hint = "check the name, the revision and the token" + ("; no network was asked" if reason is None else "")
        problem = Problem(
            f"no checkpoint {repo!r} here, on the hub or in its cache",
            file=repo,
            expected="a path, or a hub id that can be reached or is cached",
            found=_told(reason or error),
            hint=hint,
        )
        raise CheckpointNotFound("no checkpoint", [problem]) from (reason or error)


def _told(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
