"""Rotary position encoding in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch


def rotary(
    x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0, inv_freq: torch.Tensor | None = None
) -> torch.Tensor:
    K = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # float64 angles cost no more than float32 ones here, and at position 8192 a float32 angle is off by 5e-4
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    if inv_freq is None:
        inv_freq = theta ** (torch.arange(0, K, 2, device=x.device, dtype=exact) / -K)
    angles = positions.to(x.device, exact)[..., None, None] * inv_freq.detach().to(exact)  # [(B,)T,1,K/2]
    turn = torch.complex(angles.cos().to(wide), angles.sin().to(wide))
    pairs = x.to(wide).unflatten(-1, (K // 2, 2)).contiguous()
    if not torch.compiler.is_compiling() and pairs.storage_offset() % 2:  # view_as_complex refuses it
        pairs = pairs.clone()
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
