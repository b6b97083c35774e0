"""Recognise what a file is by its first bytes, for errors that say what to do instead of what a parser tripped on."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 512
NO_GGUF = "weightlift does not read GGUF; use the safetensors weights of this model"
FROM_NUMPY = "read it with numpy.load, and pass a mapping of tensors, which torch.from_numpy makes"

_LFS = b"version https://git-lfs.github.com/spec/"
_DOWNLOAD = "a server answered with this instead of the file: check the address and the credentials, download it again"


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What a file turned out to be: ``kind`` for code, ``found`` and ``hint`` for people."""

    kind: str
    found: str
    hint: str


_MAGIC: tuple[tuple[bytes, Sniffed], ...] = (
    (
        b"PK\x03\x04",
        Sniffed("zip", "a zip archive, as torch.save writes", "if torch.save wrote it, name it .pt or .bin"),
    ),
    (b"\x1f\x8b", Sniffed("gzip", "a gzip archive", "unpack it first")),
    (b"(\xb5/\xfd", Sniffed("zstd", "a zstandard archive", "unpack it first")),
    (b"BZh", Sniffed("bzip2", "a bzip2 archive", "unpack it first")),
    (b"\xfd7zXZ", Sniffed("xz", "an xz archive", "unpack it first")),
    (b"GGUF", Sniffed("gguf", "a GGUF file", NO_GGUF)),
    (b"\x93NUMPY", Sniffed("numpy", "a NumPy array", FROM_NUMPY)),
    (b"\x89HDF", Sniffed("hdf5", "an HDF5 file", "Keras weights are not readable here; convert them to safetensors")),
)


def sniff(head: bytes) -> Sniffed | None:
    """What the ``head`` (the first `HEAD_BYTES` bytes) of a file shows it to be; None if nothing is recognised."""
    if head.startswith(_LFS):
        return _lfs(head)
    for magic, sniffed in _MAGIC:
        if head.startswith(magic):
            return sniffed
    if head[257:262] == b"ustar":
        return Sniffed("tar", "a tar archive", "unpack it first; torch's tar format of before 2017 holds code to run")
    # A pickle of protocol 2 to 5: what torch.save wrote before its zip format.
    if re.match(rb"\x80[\x02-\x05]", head):
        return Sniffed(
            "pickle", "a pickle, as torch.save wrote before 1.6", "if torch.save wrote it, name it .pt or .bin"
        )
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return Sniffed("safetensors", "a safetensors file", "name it .safetensors")
    return _text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _lfs(head: bytes) -> Sniffed:
    size = re.search(rb"\nsize (\d{1,19})", head)
    of = f" to {int(size[1])} bytes" if size else ""
    hint = "the weights themselves were never downloaded: run `git lfs pull`, or download the file again"
    return Sniffed("lfs", f"a Git LFS pointer{of}", hint)


def _text(head: bytes) -> Sniffed | None:
    lowered = head[:64].lower()
    if lowered.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        return Sniffed("html", "an HTML page", _DOWNLOAD)
    if lowered.startswith((b"<?xml", b"<error")):
        return Sniffed("xml", "an XML document", _DOWNLOAD)
    if re.match(rb'(\{\s*["}]|\[\s*[\[{"\]])', head):
        return Sniffed("json", "a JSON document", _DOWNLOAD)
    return None
