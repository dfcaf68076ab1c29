"""Call one kernel: the bidirectional selective scan, on two sequences packed into one row.

python examples/call_one_op.py
"""

from __future__ import annotations

import torch

from ultra_kernels import available, bidirectional_scan

channels, states = 8, 4
lengths = [5, 7]
total = sum(lengths)
generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


u = randn(1, channels, total).requires_grad_()  # [B,D,L]; index 0 of delta, A, B, C reads forwards, 1 backwards
delta, A = randn(2, 1, channels, total), -randn(2, channels, states).exp()
B, C, D = randn(2, 1, states, total), randn(2, 1, states, total), randn(channels)
borders = torch.tensor([0, 5, 12], dtype=torch.int32)

y = bidirectional_scan(u, delta, A, B, C, D, delta_softplus=True, cu_seqlens=borders)
y.square().mean().backward()
assert u.grad is not None
print(f"y {tuple(y.shape)}, gradient of u {tuple(u.grad.shape)}")

# Nothing leaks over a border: the first sequence alone gives the same.
part = slice(0, lengths[0])
alone = bidirectional_scan(u[..., part], delta[..., part], A, B[..., part], C[..., part], D, delta_softplus=True)
print(f"largest difference to the first sequence alone: {(y[..., part] - alone).abs().max():.1e}")

print("backends of this op here:")
for name, reason in available()["bidirectional_scan"].items():
    print(f"  {name:10} {reason or 'runs'}")
