"""Saving with torch.distributed.checkpoint what several ranks would, by one: tensors in boxes of any size."""

from __future__ import annotations

import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


class Boxed(torch.Tensor):
    """A tensor that torch writes as these boxes, by the protocol that DTensor has as well."""

    boxes: list[Box]

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, boxes: list[Box]) -> Boxed:
        made = tensor.as_subclass(cls)
        made.boxes = boxes
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        found = self.as_subclass(torch.Tensor)
        sizes = dict(self.boxes)[tuple(index.offset)]
        for dim, (offset, size) in enumerate(zip(index.offset, sizes)):
            found = found.narrow(dim, offset, size)
        return found


def split(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
    """Boxes that fill a shape: a grid, or what comes of halving boxes anywhere."""
    if not shape or 0 in shape:
        return [((0,) * len(shape), shape)]
    if rng.random() < 0.5:
        cuts = [sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 2)))}) for size in shape]
        corners = itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts))
        return [(tuple(low for low, _ in each), tuple(high - low for low, high in each)) for each in corners]
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, 6)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randint(0, sizes[dim])
        first = (*sizes[:dim], at, *sizes[dim + 1 :])
        second = (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :])
        behind = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        boxes += [box for box in ((offsets, first), (behind, second)) if 0 not in box[1]]
    rng.shuffle(boxes)
    return boxes


def save(state: dict[str, Any], folder: Path, *, files: int = 1, **options: Any) -> Path:
    """``dcp.save`` in this process, to several files if there is so much to write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(folder, thread_count=files, single_file_per_rank=files == 1, **options)
        dcp.save(state, storage_writer=writer, no_dist=True)
    return folder
