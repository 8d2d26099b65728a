"""Boolean masks: applying, packing and hashing them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import SparsityError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries at a time on the CPU, so that the widened mask stays in the cache.
_CHUNK = 1 << 18


@torch.no_grad()
def zero_pruned_(tensors: Iterable[Tensor], mask: Tensor) -> None:
    """Set pruned entries to zero in place, whatever they hold: NaN and infinity too.

    The result is positive zero, bit for bit; all other entries keep their bits.

    Args:
        tensors: Floating-point tensors of one shape.
        mask: True for entries to keep; of the same shape, or broadcastable to it.
    """
    pending: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        # As integers a product with 0 is 0, whatever the other factor is.
        bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
        if (
            mask.shape == bits.shape
            and mask.stride() == bits.stride()
            and bits.is_cpu
            and mask.is_cpu
            and bits.numel() > 0
            and _is_dense(bits)
        ):
            pending.setdefault(tensor.element_size(), []).append(bits)
        else:
            bits.mul_(mask.to(bits.device))
    for same_size in pending.values():
        _mul_chunks(same_size, mask)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one piece of memory, in either of the usual orders."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _mul_chunks(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """Multiply integers by a mask of the same layout, widening each part of the mask once."""
    size = mask.numel()
    flat_mask = mask.as_strided((size,), (1,)).view(torch.uint8)
    flat = [tensor.as_strided((size,), (1,)) for tensor in tensors]
    factor = torch.empty(min(size, _CHUNK), dtype=tensors[0].dtype)
    for start in range(0, size, _CHUNK):
        end = min(size, start + _CHUNK)
        part = factor[: end - start].copy_(flat_mask[start:end])
        for tensor in flat:
            tensor[start:end].mul_(part)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask into uint8 on the CPU: eight entries a byte, row by row, the first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of a shape that :func:`pack_mask` packed, boolean on the CPU.

    Raises:
        SparsityError: There are too few or too many bytes for the shape.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != -(-size // 8):
        raise SparsityError(
            f'{packed.numel()} packed bytes of {packed.dtype} cannot hold a mask of the shape '
            f'{tuple(shape)}, which takes {-(-size // 8)}'
        )
    bits = np.unpackbits(packed.cpu().numpy().reshape(-1), count=size)
    return torch.from_numpy(bits.astype(bool)).view(tuple(shape))


def masks_from_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks in what ``state_dict()`` of a :class:`~slak_mm.sparsity.SparseTraining` returned.

    Returns:
        Boolean masks on the CPU by parameter name; those per filter have the shape (filters, 1, 1, 1).

    Raises:
        SparsityError: A mask does not have the bytes that its shape takes, or the state is another thing.
    """
    try:
        return {name: unpack_mask(entry['bits'], entry['shape']) for name, entry in state['masks'].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise SparsityError('the sparsity state has no masks in the form that this code reads') from error


def masks_hash(masks: Mapping[str, Tensor]) -> str:
    """A SHA-256 in 64 hexadecimal digits of masks by name, in any order, to compare those of processes or runs."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f'{name} {tuple(masks[name].shape)}'.encode())
        digest.update(pack_mask(masks[name]).numpy().tobytes())
    return digest.hexdigest()
