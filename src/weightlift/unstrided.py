"""Tensors that are no strided view of a storage: sparse, nested and mkldnn ones, and those of classes that tell a shape
which is not their memory's (they hold another tensor). Telling them, and their sizes.

Nothing is copied into them from a checkpoint (torch's ``copy_`` refuses it, too): a load leaves them as they are.
"""

from __future__ import annotations

import torch

SPARSE, NESTED, MKLDNN, COMPOSED = "sparse", "nested", "mkldnn", "composed"
_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)


def unstrided(tensor: torch.Tensor) -> str:
    """What a tensor is that is no strided one; "" for all others."""
    if tensor.is_nested:
        return NESTED
    if tensor.layout is torch.strided:
        return "" if len(tensor.shape) == len(tensor.stride()) else COMPOSED
    return MKLDNN if tensor.is_mkldnn else SPARSE


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape; of a nested tensor, whose rows have different lengths, the number of its elements."""
    return (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)


def bytes_of(tensor: torch.Tensor) -> int:
    """The bytes that it takes: of a sparse one those of its indices and values."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if unstrided(tensor) != SPARSE:
        return tensor.numel() * tensor.element_size()
    by_rows = tensor.layout in _COMPRESSED_ROWS
    compressed = tensor.crow_indices() if by_rows else tensor.ccol_indices()
    plain = tensor.col_indices() if by_rows else tensor.row_indices()
    return compressed.nbytes + plain.nbytes + tensor.values().nbytes
