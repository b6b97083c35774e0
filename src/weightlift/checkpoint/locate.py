"""From a folder, or the names in one, to the files of the checkpoint in it. Contents are not looked at.

The order of preference is that of Transformers and Diffusers, safetensors first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlift.checkpoint.dcp_metadata import NAME as DCP_METADATA
from weightlift.checkpoint.dcp_metadata import SUFFIX as DCP_SUFFIX
from weightlift.checkpoint.files import is_folder, os_errors
from weightlift.checkpoint.sniff import NO_GGUF
from weightlift.errors import CheckpointError, CheckpointNotFound, Problem

_LOOKED_FOR = (
    "model.safetensors, *.safetensors.index.json, *.safetensors, "
    ".metadata with *.distcp, pytorch_model.bin, *.bin.index.json, *.bin, *.pt, *.pth"
)
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# What trainers leave beside the weights.
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|random_states|rng_state|sampler|dl_state|trainer_state)(?![a-z]).*"
)
# Behind the numbers of a variant's files its name may stand (Diffusers wrote them so): model-00001-of-00002.fp16.bin.
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>(\.[\w-]+)?\.[A-Za-z]+)")
# Whose folder it is where it holds nothing to be read, and what to do.
_WHOSE = tuple(
    (re.compile(pattern), hint)
    for pattern, hint in (
        (
            r"model_index\.json",
            "a pipeline of Diffusers: wl.from_pretrained(DiffusionPipeline, …) loads it; or pass a sub-folder",
        ),
        (
            r"__\d+\.metadata",
            "torch.distributed.checkpoint wrote it with use_collectives=False, metadata of each rank's own: "
            "load it with torch on as many ranks, and save it without that",
        ),
        (
            r".*\.distcp",
            "torch.distributed.checkpoint wrote it, and its .metadata is missing, which is written last: the save did "
            "not end, or hidden files were not copied",
        ),
        (r"zero_to_fp32\.py", "DeepSpeed wrote it in parts: the zero_to_fp32.py in it puts the weights together"),
        (r".*\.gguf", NO_GGUF),
        (
            r".*\.(h5|keras|msgpack|onnx|ckpt\.index)",
            "weights of another framework are not readable here; convert them to safetensors",
        ),
        (r".*\.ckpt", "pass the path of the file itself"),
    )
)
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Located:
    """The chosen names within a folder: an index, or files (in the order of their names) without one."""

    names: tuple[str, ...]
    is_index: bool


def choose(names: Iterable[str], where: Path | str, folders: Sequence[str] = ()) -> Located:
    """Choose among the file names of a folder. ``where``, and its sub-``folders``, are for messages.

    Raises `CheckpointNotFound` when no name is that of a checkpoint, `CheckpointError` when several indexes compete.
    """
    names = set(names)
    visible = sorted(name for name in names if not name.startswith("."))
    is_dcp = DCP_METADATA in names and any(name.endswith(DCP_SUFFIX) for name in visible)
    torch_names = [name for name in visible if name.endswith(_TORCH_SUFFIXES) and not _NOT_WEIGHTS.match(name)]
    safe_names = [name for name in visible if name.endswith(".safetensors")]
    choice = _pick(visible, safe_names, ".safetensors", ("model", "diffusion_pytorch_model"), where)
    if choice is None and is_dcp:  # before torch's: trainers leave a file of other things beside it
        choice = Located((DCP_METADATA,), is_index=True)
    if choice is None:
        choice = _pick(visible, torch_names, ".bin", ("pytorch_model", "diffusion_pytorch_model"), where)
    if choice is None:
        found = _first_of(visible)
        if not visible:
            found = "no file" if folders else "an empty folder"
        problem = Problem(
            "no checkpoint in this folder",
            file=where,
            expected=f"one of {_LOOKED_FOR}",
            found=found,
            hint=_hint_for(visible, [folder for folder in folders if not folder.startswith(".")]),
        )
        raise CheckpointNotFound("no checkpoint", [problem])
    return choice


def _pick(
    visible: list[str], weights: list[str], suffix: str, stems: tuple[str, ...], where: Path | str
) -> Located | None:
    single = next((stem + suffix for stem in stems if stem + suffix in weights), None)
    if single is not None:
        return Located((single,), is_index=False)
    indexes = [name for name in visible if name.endswith(f"{suffix}.index.json")]
    if len(indexes) > 1:
        problem = Problem(
            "the folder has several indexes",
            file=where,
            expected="one",
            found=", ".join(indexes),
            hint="pass the path of the one you mean",
        )
        raise CheckpointError("ambiguous checkpoint", [problem])
    if indexes:
        return Located(tuple(indexes), is_index=True)
    if not weights:
        return None
    _require_complete(weights, where)
    return Located(tuple(weights), is_index=False)


def _require_complete(names: list[str], where: Path | str) -> None:
    """Files that are numbered ``…-00001-of-00003…`` must all be there: without an index nothing else would tell."""
    groups: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            groups.setdefault((match["stem"], match["total"], match["suffix"]), set()).add(int(match["number"]))
    problems = []
    for (stem, total, suffix), numbers in groups.items():
        count = int(total)
        missing = count - len(numbers)
        if missing > 0:
            # Numbered from 1, now and then from 0; the count is the file's claim, so no loop runs over it.
            first = next(n for n in range(0 if 0 in numbers else 1, len(numbers) + 2) if n not in numbers)
            example = f"{stem}-{first:0{len(total)}d}-of-{total}{suffix}"
            problems.append(
                Problem(
                    f"{missing} of {count} shard files are missing",
                    file=where,
                    expected=example,
                    found=f"{len(numbers)} files {stem}-*-of-{total}{suffix}",
                    hint="download them all",
                )
            )
    if problems:
        raise CheckpointError("incomplete checkpoint", problems)


def choose_in(folder: Path) -> Located:
    """`choose` among the files (not the folders) in a folder of the disk."""
    names: list[str] = []
    folders: list[str] = []
    with os_errors(folder), os.scandir(folder) as entries:
        for entry in entries:
            (folders if is_folder(entry) else names).append(entry.name)
    return choose(names, folder, folders)


def _hint_for(names: Sequence[str], folders: Sequence[str]) -> str | None:
    """What to do next, of a folder with these files and sub-folders; None if nothing is recognised."""
    for pattern, hint in _WHOSE:
        if any(pattern.fullmatch(name) for name in names):
            return hint
    if folders:
        return f"sub-folders are not looked at: pass the one you mean of {_first_of(sorted(folders))}"
    return None


def _first_of(names: Sequence[str]) -> str:
    """The first few names, as messages show them."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
