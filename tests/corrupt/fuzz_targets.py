"""What is fuzzed, and what must hold of every input. Shared by fuzz.py (long runs) and test_fuzz.py (a short one).

A target writes its input to a file, opens it, and compares with the official parser: weightlift never accepts what that
refuses, and raises nothing but `CheckpointError` with problems.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import read_dduf_file

from weightlift.checkpoint import Checkpoint, open_checkpoint, verify
from weightlift.checkpoint.dduf import read_dduf, read_member
from weightlift.errors import CheckpointError

# What weightlift refuses and the official parsers do not: docs/checkpoints.md.
STRICTER = (
    "does not begin with '{'", "is in the header twice", "twice in it", "is not described", "unsupported dtype",
    "torch cannot hold this shape", "shape is not a shape", "unknown dtype",
)  # fmt: skip
_FORBIDDEN_EVENTS = (
    "os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.", "shutil.", "os.re",
    "os.mk",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
_FILES = {
    "safetensors": "x.safetensors", "index": INDEX, "zip": "x.pt", "legacy": "y.pt", "dduf": "x.dduf",
    "dcp": ".metadata", "distcp": "__0_0.distcp",
}  # fmt: skip
DCP = Path(__file__).with_name("corpus") / "dcp-seed"
"""What torch.distributed.checkpoint wrote; torch's versions would each write something else."""


class Violation(Exception):
    """An input broke a promise."""


class Watch:
    """An audit hook: while it is on, opening a file for writing, running anything or importing something new counts."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: Any) -> None:
        if not self.on:
            return
        if event == "open":
            writing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) else False
            if writing or (isinstance(args[1], str) and args[1].strip("rb")):
                self.seen.append(f"open for writing: {args[0]!r}")
        elif event == "import" and args[0] not in sys.modules and not args[0].startswith("encodings"):
            self.seen.append(f"import {args[0]}")
        elif event.startswith(_FORBIDDEN_EVENTS):
            self.seen.append(event)


class Target:
    """One kind of input. `check` returns "accepted" or the problems' texts; raises `Violation`."""

    def __init__(self, name: str, folder: Path, watch: Watch | None = None) -> None:
        self.name = name
        self.folder = folder
        self.watch = watch
        self.path = folder / _FILES[name]
        self._official: Callable[[bytes, Checkpoint | None], str | None] = getattr(self, f"_{name}")
        if name in ("dcp", "distcp"):
            for file in DCP.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        if name == "index":
            from safetensors.torch import save_file

            save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "one.safetensors")
            save_file({"c": torch.ones(1)}, folder / "two.safetensors")
            outside = folder.parent / "outside.safetensors"
            save_file({"a": torch.ones(2)}, outside)
            (folder / "link.safetensors").symlink_to(outside)

    def check(self, data: bytes) -> str:
        self.path.write_bytes(data)
        opened, error = self._open()
        refusal = self._official(data, opened)
        if opened is not None:
            if refusal is not None:
                raise Violation(f"accepted, although the official parser says: {refusal}")
            for file in opened.files:
                if not str(file.path).startswith(str(self.folder) + os.sep) or file.path.is_symlink():
                    raise Violation(f"opened {file.path}")
            return "accepted"
        assert error is not None
        if not error.problems:
            raise Violation("an error without problems")
        text = "; ".join(problem.what for problem in error.problems[:20])
        if refusal is None and self.name == "safetensors":
            unexplained = [p for p in error.problems if not any(known in p.what for known in STRICTER)]
            if unexplained:
                raise Violation(f"refused, although the official parser accepts: {unexplained[0]}")
        return text

    def _open(self) -> tuple[Checkpoint | None, CheckpointError | None]:
        watch = self.watch
        if watch is not None:
            watch.on = True
        try:
            if self.name in ("zip", "legacy"):
                with contextlib.suppress(CheckpointError):
                    open_checkpoint(self.path, within="state_dict")
            opened = open_any(self.name, self.path)
            for key in opened:
                if opened[key].nbytes <= 1 << 20 and opened[key].end - opened[key].start <= len(self.path.read_bytes()):
                    opened.read(key)
            return opened, None
        except CheckpointError as error:
            return None, error
        finally:
            if watch is not None:
                watch.on = False
                if watch.seen:
                    raise Violation(f"side effects: {watch.seen[:3]}")

    def _dcp(self, data: bytes, opened: Checkpoint | None) -> str | None:
        """Torch unpickles metadata by running them, so it is not asked."""
        return None if opened is not None else "not asked"

    _distcp = _dcp

    # -- the official parsers: None where they accept ------------------------------------------------------------------

    def _safetensors(self, data: bytes, opened: Checkpoint | None) -> str | None:
        try:
            content = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            return str(error)
        if opened is not None:
            if set(content) != set(opened):
                raise Violation(f"keys differ: {sorted(content)} and {sorted(opened)}")
            for key, info in content.items():
                entry = opened[key]
                if bytes(info["data"]) != data[entry.start : entry.end]:
                    raise Violation(f"{key}: other bytes")
        return None

    def _dduf(self, data: bytes, opened: Checkpoint | None) -> str | None:
        """Archives in which all weights could be opened; the weights themselves are the safetensors target's."""
        try:
            entries = read_dduf_file(self.path)
        except Exception as error:  # whatever it may be, it is a refusal
            return f"{type(error).__name__}: {error}"
        if opened is not None:
            members = read_dduf(self.path).members
            if set(members) != set(entries):
                raise Violation(f"members differ: {sorted(members)} and {sorted(entries)}")
            for name, entry in entries.items():
                if (members[name].start, members[name].end) != (entry.offset, entry.offset + entry.length):
                    raise Violation(f"{name}: another range")
                if Path(self.folder, name).resolve().parts[: len(self.folder.parts)] != self.folder.parts:
                    raise Violation(f"{name} leads out of the folder")
        return None

    def _index(self, data: bytes, opened: Checkpoint | None) -> str | None:
        try:
            weight_map = json.loads(data.decode("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"{type(error).__name__}: {error}"
        if opened is not None and not set(opened) <= set(weight_map):
            raise Violation("keys that the index does not list")
        return None

    def _torch(self, data: bytes, opened: Checkpoint | None) -> str | None:
        """torch.load is asked about accepted files only: what it does with hostile ones is not for this process."""
        if opened is None:
            return "not asked"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                zipped = data.startswith(b"PK")
                source: Any = str(self.path) if zipped else io.BytesIO(data)
                content = torch.load(source, "cpu", weights_only=True, mmap=True if zipped else None)
        except pickle.UnpicklingError:  # opcodes of protocols 3 to 5, which torch's weights-only unpickler lacks
            return None
        except Exception as error:  # whatever it may be, it is a refusal
            return f"{type(error).__name__}: {str(error)[:200]}"
        tensors = {key: value for key, value in dict(content).items() if isinstance(value, torch.Tensor)}
        if set(map(str, tensors)) != set(opened):
            raise Violation(f"keys differ: {sorted(map(str, tensors))[:5]} and {sorted(opened)[:5]}")
        for key, value in tensors.items():
            if value.numel() > 1 << 16:
                continue
            mine = opened.read(str(key))
            if (mine.shape, mine.dtype) != (value.shape, value.dtype):
                raise Violation(f"{key}: {mine.shape} {mine.dtype}, not {value.shape} {value.dtype}")
            whole = value.clone(memory_format=torch.contiguous_format)
            if bytes(mine.untyped_storage()) != bytes(whole.untyped_storage()):
                raise Violation(f"{key}: other values")
        return None

    _zip = _legacy = _torch


def open_any(name: str, path: Path) -> Checkpoint:
    """What a target's file is opened with."""
    if name == "dduf":
        return open_dduf(path)
    return open_checkpoint(path.parent / ".metadata" if name == "distcp" else path)


def open_dduf(path: Path) -> Checkpoint:
    """Everything in an archive: the small files read, the weights' headers as one checkpoint."""
    archive = read_dduf(path)
    entries = {}
    for name, member in archive.members.items():
        if name.endswith(".safetensors"):
            entries.update({f"{name}:{entry.key}": entry for entry in read_member(member).entries})
        else:
            archive.read(name)
    return Checkpoint(str(path), entries, files=(archive.file,))


def archive_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pipeline_members() -> dict[str, bytes]:
    """A pipeline of one model."""
    from safetensors.torch import save

    return {
        "model_index.json": b'{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}',
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": save({"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int8)}),
        "notes.txt": b"text",
    }


def seeds(name: str) -> list[bytes]:
    """Valid inputs to begin with."""
    from safetensors.torch import save

    if name == "safetensors":
        plain = save({"a": torch.ones(2), "b": torch.zeros(1, 3, dtype=torch.float16), "c": torch.ones(0, 2)})
        return [plain, save({"x": torch.tensor(1)}, {"format": "pt", "é": "\n"}), b"\2\0\0\0\0\0\0\0{}"]
    if name in ("dcp", "distcp"):
        return [(DCP / _FILES[name]).read_bytes()]
    if name == "dduf":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, content in pipeline_members().items():
                with archive.open(member, "w", force_zip64=True) as file:
                    file.write(content)
        return [archive_of(pipeline_members()), buffer.getvalue(), archive_of({"model_index.json": b"{}"})]
    if name == "index":
        good = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
        return [json.dumps({"metadata": {"total_size": 24}, "weight_map": good}).encode(), *(
            json.dumps({"weight_map": {"a": other}}).encode()
            for other in ("../outside.safetensors", "link.safetensors", "/etc/passwd", "sub/x", "./one.safetensors")
        )]
    made = []
    for state in (
        {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8), "s": torch.arange(4).view(2, 2).t()},
        {"n": {"x": 1, "y": [2.5, "t", None, (True,)]}, "w": torch.nn.Parameter(torch.ones(2)), "e": torch.ones(0)},
    ):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=name == "zip")
        made.append(buffer.getvalue())
    return made


def unpack(name: str, data: bytes) -> bytes:
    """The file that an input stands for. Half the inputs are files; the others are what is inside, so that lengths,
    offsets and sums which every mutation would break are right."""
    if not data:
        return data
    kind, body = data[0], data[1:]
    if kind % 2 == 0 or name in ("index", "legacy", "dcp", "distcp"):
        return body
    if name == "safetensors":
        size = body[0] if body else 0
        return len(body[1:]).to_bytes(8, "little") + body[1:] + bytes(size)
    if name == "dduf":
        head, _, rest = body.partition(b"\n")
        with contextlib.suppress(ValueError, IndexError, zipfile.error), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            made = {**pipeline_members(), "model_index.json": rest}
            return archive_of({**made, head.decode("latin1"): b"{}"} if head else made)
        return body
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        for key, size in (("0", 24), ("1", 2), ("2", 32)):
            archive.writestr(f"archive/data/{key}", bytes(range(size)))
    return buffer.getvalue()


def packed_seeds(name: str) -> list[bytes]:
    """Seeds in the form that `unpack` takes."""
    made = [b"\0" + seed for seed in seeds(name)]
    for seed in seeds(name):
        if name == "safetensors":
            length = int.from_bytes(seed[:8], "little")
            made.append(b"\1" + bytes([len(seed) - 8 - length]) + seed[8 : 8 + length])
        elif name == "dduf":
            made += [b'\1vae/model_index.json\n{"vae": 1}', b'\1../x.json\n{"..": 1, "vae": []}', b"\1\n{}"]
        elif name == "zip":
            with zipfile.ZipFile(io.BytesIO(seed)) as archive:
                made.append(b"\1" + archive.read("archive/data.pkl"))
    return made


def normalised(text: str) -> str:
    """An error's text without what differs from input to input."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"['\"].*", "…", text, flags=re.DOTALL)  # a quotation that the cut at a semicolon left open
    return re.sub(r"\d+", "N", text)[:200]


__all__ = ["Target", "Violation", "Watch", "normalised", "packed_seeds", "seeds", "unpack", "verify"]
