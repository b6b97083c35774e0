"""`save`: a module or a state dict to safetensors files, in such a way that a crash leaves the old or the new ones.

Nothing is ever written into a file that exists: new files are written beside the old ones under hidden names, flushed,
and then renamed. A model that is mapped from the very files which it replaces keeps its pages, because a mapping
belongs to the file that was opened and not to its name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from weightlift import dtypes
from weightlift.ambient import Undisturbed, outside_modes
from weightlift.checkpoint.files import is_folder
from weightlift.checkpoint.integrity import MANIFEST, manifest_text, read_manifest
from weightlift.checkpoint.locate import choose
from weightlift.checkpoint.memory import read_mapping
from weightlift.checkpoint.safetensors import MAX_HEADER_BYTES
from weightlift.checkpoint.write import FileLayout, laid_out, permit, write_safetensors
from weightlift.errors import CheckpointError, Problem, TransferError
from weightlift.lazy_views import shown

DEFAULT_SHARD_BYTES = 5_000_000_000
_SUMMARY = "cannot be saved as safetensors"
_Tensor = torch.Tensor


def save(
    module: nn.Module | Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int | str = DEFAULT_SHARD_BYTES,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    manifest: bool = False,
) -> tuple[Path, ...]:
    """Write a module's state dict (or a mapping of tensors) to a folder as safetensors files; returns their paths.

    One file ``{name}.safetensors``; or, where that would exceed ``max_shard_bytes`` (a number, or ``"5GB"``), files
    ``{name}-00001-of-0000N.safetensors`` and ``{name}.safetensors.index.json``, split as huggingface_hub does it. Names
    that share one tensor are written once, under the first; the file's metadata maps the others to it.

    A checkpoint of the same name in the folder is replaced, also one that the module is mapped from at this moment:
    new files are written beside it and renamed. A single file over a single file is replaced in one step. In every
    other case a crash during the renames leaves an incomplete checkpoint, which loaders refuse, with the old files
    under hidden names; never a mixture. Ctrl-C leaves the old checkpoint, or the new one. Other files of the folder
    stay. The new files have the permissions that all the old ones have.

    Args:
        metadata: text for the header of every file; ``format: pt`` is added.
        manifest: write the files' hashes to ``SHA256SUMS``, for ``verify=True``.

    Raises:
        CheckpointError: a tensor or value that the format cannot hold, every one named; the folder is a file, or named
            as one; or another checkpoint in it would be read instead of this one. Nothing was written.
        TransferError: writing failed; the old checkpoint is as it was.
        TypeError, ValueError: an argument that can't be meant.

    Memory: one tensor of another device, or one that is not contiguous, is copied at a time. Thread-safe; saves into
    one folder wait for one another. The module must not be written to meanwhile.
    """
    limit = _shard_bytes(max_shard_bytes)
    if not isinstance(module, nn.Module | Mapping):
        swapped = "the arguments are swapped: " if isinstance(folder, nn.Module | Mapping) else ""
        raise TypeError(f"{swapped}expected a torch.nn.Module or a mapping of tensors, found {type(module).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(f"name must be the beginning of a file name, found {name!r}")
    if name.endswith(".safetensors"):
        raise ValueError(f"name comes without .safetensors, which is put behind it, found {name!r}")
    given = _texts(metadata)
    where = _folder(folder)
    state = module.state_dict() if isinstance(module, nn.Module) else module
    with Undisturbed(), outside_modes():
        tensors, ties = _untied(_savable(state))
        texts = {**ties, "format": "pt", **given}
        split, index = _split(tensors, name, limit)
        layouts = _layouts(split, tensors, texts)
        _make(where)
        try:
            with _alone_in(where):
                _Saving(where, name, [*split], index).run(layouts, tensors, manifest=manifest)
        except OSError as error:
            if isinstance(error, CheckpointError):  # some are both
                raise
            raise TransferError("saving failed", [Problem(f"writing failed: {error}", file=where)]) from error
    return tuple(where / file for file in split)


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """What the user gives for the header. Raises TypeError for what is no mapping, ValueError for what is no text."""
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata must be a mapping of names to text, found {type(metadata).__name__}")
    texts = {str(key): str(value) for key, value in (metadata or {}).items()}
    for key, value in texts.items():
        if not _is_text(key) or not _is_text(value):
            raise ValueError(f"metadata[{key!r}]: UTF-8 has no such characters, found {value!r}")
    return texts


def _is_text(text: str) -> bool:
    """Whether it can be written: halves of surrogate pairs can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shard_bytes(value: int | str) -> int:
    """A positive number of bytes, or text such as ``"5GB"`` or ``"512 MiB"``. Raises TypeError or ValueError."""
    expected = "max_shard_bytes must be a whole number of bytes, or text as '5GB' or '512MiB'"
    size = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", value.upper())
        if match is None or (match[3] and not match[2]):
            raise ValueError(f"{expected}, found {value!r}")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{expected}, found {value!r}")
    if size < 1:
        raise ValueError(f"max_shard_bytes must be positive, found {value!r}")
    return size


def _folder(path: str | os.PathLike[str]) -> Path:
    """Raises `CheckpointError` for the name of a file: a folder of that name is not what anybody means."""
    where = Path(os.path.abspath(path))
    if where.is_dir():
        return where
    if where.exists():
        what = "is a file; save writes files into a folder"
    elif where.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        what = "is the name of a file; save writes files into a folder"
    else:
        return where
    stem = re.sub(r"[^\w.-]", "_", where.stem).lstrip(".-") or "model"
    hint = f"save(module, {str(where.parent)!r}, name={stem!r}) writes {where.parent / stem}.safetensors"
    raise CheckpointError("not saved", [Problem(what, file=where, hint=hint)])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(f"the folder can't be made: {error}", file=folder)
        raise TransferError("saving failed", [problem]) from error


def _savable(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict. Raises `CheckpointError` with everything that a safetensors file can't hold."""
    try:
        _, tensors, extras, _ = read_mapping(state)
    except CheckpointError as error:  # which speaks of a mapping to load
        raise CheckpointError(_SUMMARY, [replace(problem, file=None) for problem in error.problems]) from None
    problems = [_not_a_tensor(key, value) for key, value in extras.items()]
    for key, tensor in tensors.items():
        if not _is_plain(tensor):
            hint = "gather a distributed tensor, or unwrap a quantised one, first"
            problems.append(Problem(f"is a {type(tensor).__name__}, not a plain tensor", key=key, hint=hint))
        elif dtypes.safetensors_name(tensor.dtype) is None:
            problems.append(Problem(f"has the dtype {tensor.dtype}, unknown to the format", key=key, hint="cast it"))
        elif not tensor.dim() and dtypes.safetensors_name(tensor.dtype) == "F4":
            problems.append(
                Problem("holds two values and has no dimension, for which the format has no shape", key=key)
            )
        elif key == "__metadata__":
            problems.append(Problem("has the name that the format keeps for itself", key=key))
        elif not _is_text(key):
            hint = "rename it"
            problems.append(Problem("has a name with half of a surrogate pair, which is no UTF-8", key=key, hint=hint))
    if problems:
        raise CheckpointError(_SUMMARY, problems)
    return dict(tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    plain = (_Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl)
    return type(tensor).__torch_dispatch__ in plain


def _not_a_tensor(key: str, value: object) -> Problem:
    if isinstance(value, torch.Tensor):  # a lazy module's, which `read_mapping` puts with the others
        hint = "run the lazy module once, or load into it, before it is saved"
        return Problem(f"is an {type(value).__name__}, which has no values yet", key=key, hint=hint)
    hint = "safetensors files hold tensors only; save this value by other means"
    return Problem(f"is of type {type(value).__name__}, not a tensor", key=key, hint=hint)


def _untied(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, and which other names it has."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for key, tensor in tensors.items():
        if tensor.numel():
            mark = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), shown(tensor))
            owner = first.setdefault(mark, key)
            if owner != key:
                ties[key] = owner
    return {key: tensor for key, tensor in tensors.items() if key not in ties}, ties


def _split(
    tensors: dict[str, torch.Tensor], name: str, max_shard_bytes: int
) -> tuple[dict[str, list[str]], bytes | None]:
    """File name → its keys, and the index's text if there are several files."""
    from huggingface_hub import split_state_dict_into_shards_factory

    if not tensors:
        return {f"{name}.safetensors": []}, None
    done = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=name + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    files = {file: list(keys) for file, keys in done.filename_to_tensors.items() if keys}
    if not done.is_sharded:
        return files, None
    content = {"metadata": done.metadata, "weight_map": done.tensor_to_filename}
    return files, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _layouts(
    split: Mapping[str, list[str]], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, FileLayout]:
    """File name → how it is to be. Raises `CheckpointError` for headers that no reader of the format takes."""
    layouts = {file: laid_out({key: tensors[key] for key in keys}, metadata) for file, keys in split.items()}
    problems = [
        Problem(
            "the header would be too long",
            file=file,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{layout.header_bytes} bytes for {len(layout.spans)} tensors and the metadata",
            hint="give less metadata, or a smaller max_shard_bytes, so that a file holds fewer tensors",
        )
        for file, layout in layouts.items()
        if layout.header_bytes > MAX_HEADER_BYTES
    ]
    if problems:
        raise CheckpointError(_SUMMARY, problems)
    return layouts


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One save at a time, of any process, where the system can lock a folder; the lock ends with its holder."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems may refuse
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # closing alone would leave it with a child that was forked meanwhile
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


class _Saving:
    """The files of one save: written beside the old ones, then put in their place."""

    def __init__(self, folder: Path, name: str, files: list[str], index: bytes | None) -> None:
        self._folder = folder
        self._index = index
        self._mark = secrets.token_hex(4)  # not `random`: that would draw from the process's generator
        self._index_name = f"{name}.safetensors.index.json"
        own = re.compile(rf"{re.escape(name)}(-\d+-of-\d+)?\.safetensors")
        with os.scandir(folder) as entries:
            present = [entry.name for entry in entries if not is_folder(entry)]
        self._old = [file for file in present if own.fullmatch(file) or file == self._index_name]
        self._new = [*files, *([self._index_name] if index is not None else [])]
        self._require_chosen([file for file in present if file not in self._old])

    def _require_chosen(self, others: list[str]) -> None:
        """What the folder will be read as must be what is saved now."""
        try:
            choice = choose([*others, *self._new], self._folder)
            chosen = set(choice.names) == ({self._index_name} if self._index is not None else set(self._new))
            found = ", ".join(choice.names)
        except CheckpointError as error:
            chosen, found = False, "; ".join(map(str, error.problems))
        if not chosen:
            problem = Problem(
                "another checkpoint in this folder would be read instead of the saved one",
                file=self._folder,
                found=found,
                hint="remove it, or save into another folder",
            )
            raise CheckpointError("not saved", [problem])

    def run(self, layouts: Mapping[str, FileLayout], tensors: Mapping[str, torch.Tensor], *, manifest: bool) -> None:
        """Write, then rename. On an error the folder is as it was."""
        sums = self._sums()
        mode = self._mode()
        try:
            for file, layout in layouts.items():
                digest = write_safetensors(self._hidden(file), tensors, layout, hashed=manifest, mode=mode)
                if digest is not None:
                    sums[file] = digest
            if self._index is not None:
                digest = self._write_text(self._index_name, self._index, mode)
                if manifest:
                    sums[self._index_name] = digest
            if sums:
                self._write_text(MANIFEST, manifest_text(sums), mode)
            self._swap([*self._new, *([MANIFEST] if sums else [])])
        finally:
            self._clean()

    def _sums(self) -> dict[str, str]:
        """The lines of an existing manifest that speak of other files, be they there or not."""
        if not (self._folder / MANIFEST).exists():
            return {}
        sums = read_manifest(self._folder)
        self._old.append(MANIFEST)
        return {file: digest for file, digest in sums.items() if file not in (*self._old, *self._new)}

    def _mode(self) -> int | None:
        """The permissions that every file which is replaced has: what was private stays so."""
        modes = [os.stat(path).st_mode for file in self._old if (path := self._folder / file).exists()]
        return functools.reduce(operator.and_, modes) & 0o777 if modes else None

    def _hidden(self, file: str, suffix: str = "new") -> Path:
        return self._folder / f".{file}.{self._mark}.{suffix}"

    def _write_text(self, file: str, content: bytes, mode: int | None) -> str:
        with open(self._hidden(file), "xb") as stream:
            permit(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return hashlib.sha256(content, usedforsecurity=False).hexdigest()

    def _swap(self, new: list[str]) -> None:
        """Put the new files in their places, the index last; put the old ones back if that fails."""
        moved: list[str] = []  # each noted before it is done: an interrupt may come in between
        placed: list[str] = []
        try:
            if not (len(new) == 1 and set(self._old) <= set(new)):  # else one rename does it all
                for file in sorted(self._old, key=lambda file: file != self._index_name):
                    moved.append(file)
                    os.rename(self._folder / file, self._hidden(file, "old"))
            for file in sorted(new, key=lambda file: (file == self._index_name, file == MANIFEST)):
                placed.append(file)
                os.replace(self._hidden(file), self._folder / file)
        except BaseException:  # Ctrl-C too
            self._put_back(moved, placed)
            raise
        for file in moved:
            self._hidden(file, "old").unlink(missing_ok=True)
        _flush(self._folder)

    def _put_back(self, moved: list[str], placed: list[str]) -> None:
        """Take new files away and give old ones their names again, as far as it had come."""
        for file in placed:
            there = not self._hidden(file).exists()
            if there and (moved or file not in self._old):
                (self._folder / file).unlink(missing_ok=True)
        for file in moved:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._hidden(file, "old"), self._folder / file)

    def _clean(self) -> None:
        for file in (*self._new, MANIFEST):
            with contextlib.suppress(OSError):  # it must not hide what failed, such as a name that is too long
                self._hidden(file).unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Have the system note the renames on the disk; some systems and file systems can't be asked to."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
