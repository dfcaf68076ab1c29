"""Two selective scans, one per direction, in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._dispatch import opaque
from ..selective_scan.reference import finish, scan


@opaque(
    "bidirectional_scan_reference(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, bool shift, Tensor? cu_seqlens) -> Tensor",
    lambda u, *options: u.new_empty(u.shape),
)
def bidirectional_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    forward, backward = (
        scan(
            u, delta[i], A[i], B[i], C[i], None if delta_bias is None else delta_bias[i],
            delta_softplus, direction, cu_seqlens,
        )[0]
        for i, direction in enumerate(("forward", "backward"))
    )  # fmt: skip
    if shift:
        forward, backward = F.pad(forward, (1, 0))[..., :-1], F.pad(backward, (0, 1))[..., 1:]
        if cu_seqlens is not None:
            length, cu = u.shape[-1], cu_seqlens.long()
            starts, ends = cu[:-1], cu[1:] - 1
            edge = torch.zeros(2, length, dtype=torch.bool, device=u.device)
            edge[0, starts[starts < length]] = True
            edge[1, ends[ends >= 0]] = True
            forward, backward = forward.masked_fill(edge[0], 0), backward.masked_fill(edge[1], 0)
    return finish(forward + backward, u, D, z)
