"""What a network is, as one number: of its sites and the bytes of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .neurons import NeuronIndex

_BY_ROWS, _BY_COLUMNS = (torch.sparse_csr, torch.sparse_bsr), (torch.sparse_csc, torch.sparse_bsc)


def fingerprint(index: NeuronIndex, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sites' names, operations and shapes, and the bytes of all weights."""
    digest = hashlib.sha256(json.dumps(index.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.layout != torch.strided:
            digest.update(str(tensor.layout).encode())
        for part in strided(tensor.detach()):
            digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            digest.update(bytes_of(part))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a dense tensor, row by row."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def strided(tensor: Tensor) -> list[Tensor]:
    """The tensors that a sparse one is made of; a dense one is itself."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in _BY_ROWS:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _BY_COLUMNS:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
