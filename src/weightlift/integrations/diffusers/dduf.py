"""Pipelines from DDUF archives, which Diffusers no longer reads: the weights come straight out of the archive.

Configurations and tokenizers are written to a temporary folder for the time of the load, because their libraries want
files; in the place of the weights lie empty files there, for which members of the archive stand.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from weightlift.checkpoint.dduf import DdufArchive, read_dduf, standing_for
from weightlift.integrations.diffusers.pipeline import Loader, load_native, load_pipeline
from weightlift.integrations.exclusive import NotNative
from weightlift.locks import LOADING, HelperThread

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def load_archive(
    loader: Loader, cls: Any, /, pretrained_model_name_or_path: Any, *, dduf_file: str, **kwargs: Any
) -> Any:
    """``cls.from_pretrained(name, dduf_file=…, …)``: the pipeline that the archive in a folder or repository holds.

    Raises `CheckpointError` for an archive that breaks its format, and what `load_pipeline` raises.
    """
    name, options = pretrained_model_name_or_path, dict(kwargs)
    hub = {key: options.pop(key) for key in _HUB if key in options}
    archive = read_dduf(_path(name, dduf_file, hub))
    with tempfile.TemporaryDirectory(prefix="weightlift-dduf-") as made:
        folder = Path(made)
        members = archive.weights()
        _write(archive, folder, [member for member in archive.members if member not in members])
        for member in members:
            (folder / member).parent.mkdir(exist_ok=True)
            (folder / member).touch()
        try:
            # A helper can't run alone: what would have to reads files itself, and is to have them.
            standing = standing_for({folder / member: found for member, found in members.items()})
            with standing, LOADING.shared(), LOADING.helping():
                pipe = load_native(loader, cls, made, options)
        except (NotNative, HelperThread):
            _write(archive, folder, list(members))
            pipe = load_pipeline(loader, cls, made, **options)
    ours = [part for component, part in pipe.components.items() if component not in options]
    _rename(pipe, ours, made, os.path.join(str(name), dduf_file), name)
    return pipe


def _path(name: Any, file: str, hub: dict[str, Any]) -> Path:
    if os.path.isdir(name):
        return Path(os.path.abspath(name), file)
    return Path(hf_hub_download(name, file, **hub))


def _write(archive: DdufArchive, folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(archive.read(name))


def _rename(pipe: Any, parts: list[Any], made: str, archive: str, name: Any) -> None:
    """Let nothing refer to the temporary folder: each of ``parts``, which came out of the archive, is called by its
    place there. Components that were passed in are a caller's, and keep their names."""

    def renamed(value: Any) -> Any:
        return archive + value[len(made) :] if isinstance(value, str) and value.startswith(made) else value

    pipe.register_to_config(_name_or_path=name)
    for part in parts:
        config = getattr(part, "config", None)
        if hasattr(part, "register_to_config"):
            if "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=renamed(part.config["_name_or_path"]))
        elif isinstance(part, torch.nn.Module) and config is not None:
            part.name_or_path = config._name_or_path = renamed(config._name_or_path)
        elif isinstance(getattr(part, "init_kwargs", None), dict):
            part.name_or_path = renamed(part.name_or_path)
            part.init_kwargs.update({key: renamed(value) for key, value in part.init_kwargs.items()})
