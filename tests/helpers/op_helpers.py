"""What the tests of the operator share."""

import torch


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed':
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == 'strided':
        return torch.stack([x, torch.full_like(x, float('nan'))], dim=-1)[..., 0]
    return x
