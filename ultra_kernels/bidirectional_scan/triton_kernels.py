"""Both scan directions in Triton (selective_scan/triton_kernels.py); the contract is in op.py."""

from __future__ import annotations

import torch

from ..selective_scan.triton_kernels import configurations as configurations
from ..selective_scan.triton_kernels import scan_backward, scan_forward


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, the states that backward() starts from)."""
    B, C = B.unsqueeze(2), C.unsqueeze(2)
    return scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, False, shift, cu_seqlens, None)


def backward(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; empty where the input is None."""
    du, ddelta, dA, dB, dC, dD, dz, dbias = scan_backward(
        grad, None, u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, z, delta_bias, delta_softplus, False,
        shift, cu_seqlens, saved,
    )  # fmt: skip
    return du, ddelta, dA, dB[:, :, 0], dC[:, :, 0], dD, dz, dbias
