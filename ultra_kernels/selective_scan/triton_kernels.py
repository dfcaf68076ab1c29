"""The scans in Triton, for this op and bidirectional_scan; the contracts are in op.py.

A program owns BLOCK_D channels with all their states, and walks whole sequences, so that a border needs no reset; grid:
groups of sequences × channel blocks. Where there are two directions one program reads a sequence both ways, one after
the other: the sums of the first wait in a float32 scratch tensor, and the bits depend on no order of arrival.

Forward saves the state before every SEGMENT steps. Backward recomputes a segment from it twice: once to leave a state
before every PIECE of steps in scratch memory, then piece by piece from the segment's end, a piece in registers. Sums
over channels (dB, dC) and over sequences (dA, dD, dbias) leave a program as parts that torch adds in a fixed order.

Conditions that are single numbers are 0 or 1 and become masks as vectors: the interpreter widens a scalar bool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .._triton import ARCHS, Configuration
from .op import SEGMENT, Scan, dense_like, saved_states


class Block(NamedTuple):
    """Channels of a program; steps whose loads are issued together, and whose states backward keeps; warps."""

    channels: int
    piece: int
    num_warps: int


# By padded number of states. No architecture spills these; a thread's addresses take as much room as its states.
FORWARD = {16: Block(32, 1, 1), 64: Block(32, 2, 4)}
BACKWARD = {16: Block(32, 2, 4), 64: Block(16, 2, 8)}
STEPS_OF_PROGRAM = 512  # at least, in backward: its scratch, SEGMENT / 2 states, is then no larger than u at N = 16
FILLED = 256  # programs that backward may have all the same, so that small batches fill a GPU: 17 MB of scratch
FUSION = True  # Triton's own default differs between versions


@triton.jit
def _rows(x, batch, d, stride_batch, stride_channel):
    """Addresses of channels d of x [B,D,L] at time 0."""
    return x + batch * stride_batch.to(tl.int64) + d.to(tl.int64) * stride_channel


@triton.jit
def _load(rows, t, stride_time, ok):
    return tl.load(rows + t.to(tl.int64) * stride_time, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store(rows, t, stride_time, value, ok):
    tl.store(rows + t.to(tl.int64) * stride_time, value.to(rows.dtype.element_ty), mask=ok)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _softplus(x):
    """max(x, 0) + ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(s), s = q / (2 + q): precise where e^x is tiny."""
    q = tl.exp2(-1.4426950408889634 * tl.abs(x))
    s = q / (2.0 + q)
    s2 = s * s
    p = 1.4005994257e-1
    p = p * s2 + 1.4000902483e-1
    p = p * s2 + 2.0010763628e-1
    p = p * s2 + 3.3333208143e-1
    return tl.where(x < 0.0, 0.0, x) + 2.0 * (s + s * s2 * p)


@triton.jit
def _states_at(rows, t, stride_time, n):
    """B or C at one time. Strides are in units of 4: loads of 16 bytes are in order."""
    return tl.load(rows + t.to(tl.int64) * stride_time * 4 + n)


@triton.jit
def _sequence(cu_seqlens, s, T, packed, SEGMENT: tl.constexpr):
    """Batch row, first step, length and first saved state of sequence s; every sequence starts a new segment."""
    if packed != 0:
        batch = 0 * s
        begin = tl.load(cu_seqlens + s)
        length = tl.load(cu_seqlens + s + 1) - begin
        slot = begin // SEGMENT + s
    else:
        batch = s
        begin = 0 * T
        length = T
        slot = 0 * T
    return batch, begin, length, slot


# What no kernel is specialised on.
_SHAPE = ["B", "D", "T", "N", "blocks", "group_size", "sequences", "per_program", "slots", "directions", "packed"]
_OPTIONS = ["reverse", "shift", "softplus", "has_D", "has_z", "has_bias", "has_last"]


def _strides(names: str) -> list[str]:
    return [f"{x}_{axis}" for x in names.split() for axis in ("batch", "channel", "time")]


_MATRICES = [f"{m}_{axis}" for m in "BC" for axis in ("direction", "batch", "group", "time")]
_FORWARD = [*_strides("u delta z out"), "delta_direction", *_MATRICES, *_SHAPE, *_OPTIONS]
_BACKWARD = [
    *_strides("u delta z out du ddelta dz"),
    "delta_direction",
    "ddelta_direction",
    "state_row",
    *_MATRICES,
    *_SHAPE,
    *_OPTIONS,
]


@triton.jit(do_not_specialize=_FORWARD)
def forward_kernel(
    u, delta, z, out, A, B_rows, C_rows, skip, bias, saved, last, sums, cu_seqlens,
    u_batch, u_channel, u_time, delta_batch, delta_channel, delta_time, z_batch, z_channel, z_time,
    out_batch, out_channel, out_time, delta_direction,
    B_direction, B_batch, B_group, B_time, C_direction, C_batch, C_group, C_time,
    B, D, T, N, blocks, group_size, sequences, per_program, slots, directions, packed,
    reverse, shift, softplus, has_D, has_z, has_bias, has_last,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A [directions,N,D], saved [directions,B,slots,N,D], last [sequences,N,D]; sums [B,T,D]: of direction 0."""
    n, lane = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    wide = D.to(tl.int64)
    block, program = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group, part = block // per_group, block % per_group
    d = group * group_size + part * BLOCK_D + lane
    live = part * BLOCK_D + lane < group_size
    both = (n < N)[:, None] & live[None, :]
    tile = n[:, None] * D + d[None, :]  # of [N,D] anywhere
    zero = 0 * lane  # a number compared with it makes a mask
    gated, soft, shifted = zero + has_z > 0, zero + softplus > 0, zero + shift > 0
    shown = tl.load(skip + d, mask=live & (zero + has_D > 0), other=0.0)
    for s in range(program * per_program, tl.minimum((program + 1) * per_program, sequences)):
        b, begin, length, slot_of = _sequence(cu_seqlens, s, T, packed, SEGMENT)
        u_rows, z_rows = _rows(u, b, d, u_batch, u_channel), _rows(z, b, d, z_batch, z_channel)
        out_rows, sum_rows = _rows(out, b, d, out_batch, out_channel), sums + b * (T * wide) + d
        for direction in range(0, directions):
            rates = 1.4426950408889634 * tl.load(A + direction * (N * wide) + tile, mask=both, other=0.0)
            shift_of_delta = tl.load(bias + direction * D + d, mask=live & (zero + has_bias > 0), other=0.0)
            delta_rows = _rows(delta + direction * delta_direction.to(tl.int64), b, d, delta_batch, delta_channel)
            B_of = (
                B_rows
                + (direction * B_direction.to(tl.int64) + b * B_batch.to(tl.int64) + group * B_group.to(tl.int64)) * 4
            )
            C_of = (
                C_rows
                + (direction * C_direction.to(tl.int64) + b * C_batch.to(tl.int64) + group * C_group.to(tl.int64)) * 4
            )
            slot = (direction * B + b) * slots + slot_of
            saved_from = saved + slot * (N * wide)
            step = 1 - 2 * (reverse + direction)
            first = begin + (reverse + direction) * (length - 1)
            final = direction + 2 - directions
            h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            before = tl.zeros((BLOCK_D,), tl.float32)
            for k in range(0, length, SEGMENT):
                tl.store(saved_from + k // SEGMENT * (N * wide) + tile, h, mask=both)
                for j in range(k, tl.minimum(k + SEGMENT, length), PIECE):
                    ys = ()
                    for i in tl.static_range(PIECE):
                        ok = live & (zero + (j + i) < length)
                        t = first + step * tl.minimum(j + i, length - 1)
                        x = _load(delta_rows, t, delta_time, ok) + shift_of_delta
                        dt = tl.where(ok, tl.where(soft, _softplus(x), x), 0.0)
                        enters = dt * _load(u_rows, t, u_time, ok)
                        h = tl.exp2(dt[None, :] * rates) * h + enters[None, :] * _states_at(B_of, t, B_time, n)[:, None]
                        y = tl.sum(h * _states_at(C_of, t, C_time, n)[:, None], axis=0)
                        ys = ys + (tl.where(shifted, before, y),)  # type: ignore[assignment]
                        before = y
                    for i in tl.static_range(PIECE):
                        ok = live & (zero + (j + i) < length)
                        t = first + step * tl.minimum(j + i, length - 1)
                        y = ys[i]
                        tl.store(sum_rows + t.to(tl.int64) * D, y, mask=ok & (zero + final == 0))
                        y += tl.load(sum_rows + t.to(tl.int64) * D, mask=ok & (zero + direction > 0), other=0.0)
                        y += shown * _load(u_rows, t, u_time, ok)
                        gate = _load(z_rows, t, z_time, ok & gated)
                        y *= tl.where(gated, gate * _sigmoid(gate), 1.0)
                        _store(out_rows, t, out_time, y, ok & (zero + final > 0))
            tl.debug_barrier()  # one warp stores a vector, each loads it: the next direction finds the sums
            last_rows = last + s * (N * wide) + tile
            tl.store(last_rows, h, mask=both & (zero + has_last > 0)[None, :])


@triton.jit(do_not_specialize=_BACKWARD)
def backward_kernel(
    u, delta, z, out, du, ddelta, dz, A, B_rows, C_rows, skip, bias, saved, last,
    dA, dB, dC, dD, dbias, states, sums, du_sums, cu_seqlens,
    u_batch, u_channel, u_time, delta_batch, delta_channel, delta_time, z_batch, z_channel, z_time,
    out_batch, out_channel, out_time, du_batch, du_channel, du_time, ddelta_batch, ddelta_channel, ddelta_time,
    dz_batch, dz_channel, dz_time, delta_direction, ddelta_direction,
    B_direction, B_batch, B_group, B_time, C_direction, C_batch, C_group, C_time,
    B, D, T, N, blocks, group_size, sequences, per_program, slots, directions, packed,
    reverse, shift, softplus, has_D, has_z, has_bias, has_last, state_row,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`out` and `last` hold gradients. Rows of the scratch tiles [BLOCK_N, BLOCK_D] are state_row apart: a number that
    the compiler does not know, or it would give lanes four channels each there, and move every state to and fro.

    dA [programs,directions,N,D], dD [programs,D], dbias [programs,directions,D],
    dB, dC [parts,directions,B,groups,T,N]; sums, du_sums [B,T,D];
    states [programs · blocks, SEGMENT / PIECE, BLOCK_N, BLOCK_D].
    """
    n, lane = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    wide = D.to(tl.int64)
    block, program = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group, part, groups = block // per_group, block % per_group, blocks // per_group
    d = group * group_size + part * BLOCK_D + lane
    live = part * BLOCK_D + lane < group_size
    both = (n < N)[:, None] & live[None, :]
    tile = n[:, None] * D + d[None, :]  # of [N,D] anywhere
    zero = 0 * lane  # a number compared with it makes a mask
    gated, soft = zero + has_z > 0, zero + softplus > 0
    shown = tl.load(skip + d, mask=live & (zero + has_D > 0), other=0.0)
    pieces: tl.constexpr = SEGMENT // PIECE
    states_from = states + tl.program_id(0).to(tl.int64) * pieces * BLOCK_N * state_row
    scratch = n[:, None] * state_row + lane[None, :]
    D_sum = tl.zeros((BLOCK_D,), tl.float32)
    for direction in range(0, directions):
        rates = 1.4426950408889634 * tl.load(A + direction * (N * wide) + tile, mask=both, other=0.0)
        shift_of_delta = tl.load(bias + direction * D + d, mask=live & (zero + has_bias > 0), other=0.0)
        A_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        bias_sum = tl.zeros((BLOCK_D,), tl.float32)
        step = 1 - 2 * (reverse + direction)
        for s in range(program * per_program, tl.minimum((program + 1) * per_program, sequences)):
            b, begin, length, slot_of = _sequence(cu_seqlens, s, T, packed, SEGMENT)
            u_rows, z_rows = _rows(u, b, d, u_batch, u_channel), _rows(z, b, d, z_batch, z_channel)
            out_rows = _rows(out, b, d, out_batch, out_channel)
            sum_rows, du_rows = sums + b * (T * wide) + d, du_sums + b * (T * wide) + d
            delta_rows = _rows(delta + direction * delta_direction.to(tl.int64), b, d, delta_batch, delta_channel)
            ddelta_rows = _rows(ddelta + direction * ddelta_direction.to(tl.int64), b, d, ddelta_batch, ddelta_channel)
            B_of = (
                B_rows
                + (direction * B_direction.to(tl.int64) + b * B_batch.to(tl.int64) + group * B_group.to(tl.int64)) * 4
            )
            C_of = (
                C_rows
                + (direction * C_direction.to(tl.int64) + b * C_batch.to(tl.int64) + group * C_group.to(tl.int64)) * 4
            )
            parts = (((part * directions + direction) * B + b) * groups + group).to(tl.int64) * T * N + n
            slot = (direction * B + b) * slots + slot_of
            saved_from = saved + slot * (N * wide)
            first = begin + (reverse + direction) * (length - 1)
            last_rows = last + s * (N * wide) + tile
            g = tl.load(last_rows, mask=both & (zero + has_last > 0)[None, :], other=0.0)
            # With shift nothing is read into a sequence's first output.
            none = tl.zeros((BLOCK_D,), tl.float32)
            opens = shift * (1 - direction) * (length > 0).to(tl.int32)
            tl.store(sum_rows + first.to(tl.int64) * D, none, mask=live & (zero + opens > 0))
            segments = (length + SEGMENT - 1) // SEGMENT
            for left in range(0, segments):
                k = (segments - 1 - left) * SEGMENT
                h = tl.load(saved_from + k // SEGMENT * (N * wide) + tile, mask=both, other=0.0)
                count = (tl.minimum(length - k, SEGMENT) + PIECE - 1) // PIECE
                for piece in range(0, count):
                    tl.store(states_from + piece * BLOCK_N * state_row + scratch, h)
                    for i in tl.static_range(PIECE):
                        at = k + piece * PIECE + i
                        ok = live & (zero + at < length)
                        t = first + step * tl.minimum(at, length - 1)
                        x = _load(delta_rows, t, delta_time, ok) + shift_of_delta
                        dt = tl.where(ok, tl.where(soft, _softplus(x), x), 0.0)
                        enters = dt * _load(u_rows, t, u_time, ok)
                        h = tl.exp2(dt[None, :] * rates) * h + enters[None, :] * _states_at(B_of, t, B_time, n)[:, None]
                tl.debug_barrier()
                for back in range(0, count):
                    piece = count - 1 - back
                    h = tl.load(states_from + piece * BLOCK_N * state_row + scratch)
                    hs = (h,)
                    decays = ()
                    for i in tl.static_range(PIECE):
                        at = k + piece * PIECE + i
                        ok = live & (zero + at < length)
                        t = first + step * tl.minimum(at, length - 1)
                        x = _load(delta_rows, t, delta_time, ok) + shift_of_delta
                        dt = tl.where(ok, tl.where(soft, _softplus(x), x), 0.0)
                        enters = dt * _load(u_rows, t, u_time, ok)
                        decay = tl.exp2(dt[None, :] * rates)
                        h = decay * h + enters[None, :] * _states_at(B_of, t, B_time, n)[:, None]
                        hs = hs + (h,)  # type: ignore[assignment]
                        decays = decays + (decay,)  # type: ignore[assignment]
                    for i in tl.static_range(PIECE - 1, -1, -1):
                        at = k + piece * PIECE + i
                        ok = live & (zero + at < length)
                        t = first + step * tl.minimum(at, length - 1)
                        # the output that shows this step: its own or, with shift, that of the next one if there is one
                        more = (at + 1 < length).to(tl.int32)
                        shows = ok & (zero + shift * (1 - more) == 0)
                        to = t + step * shift * more
                        x = _load(delta_rows, t, delta_time, ok) + shift_of_delta
                        dt = tl.where(ok, tl.where(soft, _softplus(x), x), 0.0)
                        u_t = _load(u_rows, t, u_time, ok)
                        gate = _load(z_rows, to, z_time, shows & gated)
                        dy = _load(out_rows, to, out_time, shows) * tl.where(gated, gate * _sigmoid(gate), 1.0)
                        B_t = _states_at(B_of, t, B_time, n)
                        C_t = _states_at(C_of, t, C_time, n)
                        y = tl.sum(C_t[:, None] * hs[i + 1], axis=0)
                        y += tl.load(sum_rows + to.to(tl.int64) * D, mask=shows & (zero + direction > 0), other=0.0)
                        tl.store(sum_rows + to.to(tl.int64) * D, y, mask=shows)
                        within = (n < N) & (0 * n + at < length)
                        tl.store(dC + parts + t.to(tl.int64) * N, tl.sum(dy[None, :] * hs[i + 1], axis=1), mask=within)
                        dh = g + dy[None, :] * C_t[:, None]
                        tl.store(dB + parts + t.to(tl.int64) * N, tl.sum((dt * u_t)[None, :] * dh, axis=1), mask=within)
                        from_input = tl.sum(B_t[:, None] * dh, axis=0)
                        g = dh * decays[i]
                        w = g * hs[i]
                        A_sum += dt[None, :] * w
                        slope = tl.where(soft, _sigmoid(x), 1.0)
                        change = (0.6931471805599453 * tl.sum(rates * w, axis=0) + u_t * from_input) * slope
                        bias_sum += tl.where(ok, change, 0.0)
                        _store(ddelta_rows, t, ddelta_time, change, ok)
                        du_t = dt * from_input
                        du_t += tl.load(du_rows + t.to(tl.int64) * D, mask=ok & (zero + direction > 0), other=0.0)
                        tl.store(du_rows + t.to(tl.int64) * D, du_t, mask=ok)
        tl.debug_barrier()  # one warp stores a vector, each loads it: the sums are there from here on
        tl.store(dA + (program * directions + direction) * (N * wide) + tile, A_sum, mask=both)
        tl.store(dbias + (program * directions + direction).to(tl.int64) * D + d, bias_sum, mask=live)
    # What the directions share.
    for s in range(program * per_program, tl.minimum((program + 1) * per_program, sequences)):
        b, begin, length, _ = _sequence(cu_seqlens, s, T, packed, SEGMENT)
        u_rows, z_rows = _rows(u, b, d, u_batch, u_channel), _rows(z, b, d, z_batch, z_channel)
        out_rows = _rows(out, b, d, out_batch, out_channel)
        du_out, dz_out = _rows(du, b, d, du_batch, du_channel), _rows(dz, b, d, dz_batch, dz_channel)
        sum_rows, du_rows = sums + b * (T * wide) + d, du_sums + b * (T * wide) + d
        for i in range(0, length):
            t = begin + i
            u_t, dout = _load(u_rows, t, u_time, live), _load(out_rows, t, out_time, live)
            gate = _load(z_rows, t, z_time, live & gated)
            open_ = _sigmoid(gate)
            dy = dout * tl.where(gated, gate * open_, 1.0)
            D_sum += dy * u_t
            _store(du_out, t, du_time, tl.load(du_rows + t.to(tl.int64) * D, mask=live, other=0.0) + shown * dy, live)
            y = tl.load(sum_rows + t.to(tl.int64) * D, mask=live, other=0.0) + shown * u_t
            _store(dz_out, t, dz_time, dout * y * open_ * (1.0 + gate * (1.0 - open_)), live & gated)
    tl.store(dD + program.to(tl.int64) * D + d, D_sum, mask=live)


# ---- launches -------------------------------------------------------------------------------------------------------
def forward(scan: Scan, wants_last: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(out, last states, saved states); see Scan."""
    u, out, saved = scan.u, dense_like(scan.u), saved_states(scan.u, scan.A, scan.cu_seqlens)
    last = None
    if wants_last:
        last = torch.zeros(scan.sequences, *scan.A.mT.shape[1:], dtype=torch.float32, device=u.device)
    if scan.cu_seqlens is not None:
        saved.zero_()  # some slots stay unused
    shared = _shared(scan, saved, last, out, FORWARD)
    if u.numel():
        sums = _float32(u, *((u.shape[0], u.shape[2], u.shape[1]) if len(scan.A) == 2 else (1,)))
        forward_kernel[(shared.programs * shared.arguments["blocks"],)](
            out=out, sums=sums, **shared.arguments, **shared.options
        )
    return out, None if last is None else last.mT.contiguous(), saved


def backward(
    scan: Scan, grad: torch.Tensor, grad_last: torch.Tensor | None, saved: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; see Scan."""
    u, delta, A, B, C, D, z, delta_bias, *_ = scan
    directions, batch, groups, states, length = B.shape
    channels = u.shape[1]
    last = None if grad_last is None else grad_last.mT.float().contiguous()
    shared = _shared(scan, saved, last, grad, BACKWARD)
    programs, blocks = shared.programs if u.numel() else 0, shared.arguments["blocks"]  # without steps sums are 0
    block_n, block_d, pieces = shared.options["BLOCK_N"], shared.options["BLOCK_D"], SEGMENT // shared.options["PIECE"]
    du, ddelta, dz = dense_like(u), dense_like(delta), None if z is None else dense_like(z)
    dA, dD = _float32(u, programs, directions, states, channels), _float32(u, programs, channels)
    dbias = _float32(u, programs, directions, channels)
    parts = blocks // groups
    dB, dC = (_float32(u, parts, directions, batch, groups, length, states) for _ in range(2))
    if u.numel():
        backward_kernel[(programs * blocks,)](
            out=grad, du=du, ddelta=ddelta, dz=u if dz is None else dz, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias,
            states=_float32(u, programs * blocks, pieces, block_n, block_d),
            sums=_float32(u, batch, length, channels), du_sums=_float32(u, batch, length, channels),
            ddelta_direction=ddelta.stride(0), state_row=block_d,
            **_steps("du", du), **_steps("ddelta", ddelta[0]), **_steps("dz", dz),
            **shared.arguments, **shared.options,
        )  # fmt: skip
    # Sums of the parts in a fixed order: torch's reductions on a GPU use no atomics.
    return (
        du,
        ddelta,
        dA.sum(0).transpose(-1, -2).to(A.dtype, memory_format=torch.contiguous_format),
        dB.sum(0).to(B.dtype).transpose(-1, -2),
        dC.sum(0).to(C.dtype).transpose(-1, -2),
        u.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        u.new_empty(0) if dz is None else dz,
        u.new_empty(0) if delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
    )


class Shared(NamedTuple):
    """What forward and backward have in common: groups of sequences, arguments, constants and launch options."""

    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]


def _shared(
    scan: Scan, saved: torch.Tensor, last: torch.Tensor | None, out: torch.Tensor, table: dict[int, Block]
) -> Shared:
    u, delta, A, B, C, D, z, delta_bias, *_, cu_seqlens = scan
    directions, batch, groups, states, length = B.shape
    channels, sequences = u.shape[1], scan.sequences
    block_n, block = next((n, block) for n, block in table.items() if n >= states)
    blocks = groups * -(-(channels // groups) // block.channels)
    programs = sequences if table is FORWARD else backward_programs(sequences, batch * length, blocks)
    per_program = -(-sequences // max(programs, 1))
    A = A.detach().mT.float().contiguous()  # channels last everywhere: every tile then has the layout of the states
    B_rows, C_rows = (_padded(M.detach(), block_n) for M in (B, C))
    borders = u.new_empty(0, dtype=torch.int32) if cu_seqlens is None else cu_seqlens.contiguous()
    arguments = dict(
        u=u, delta=delta, z=u if z is None else z, A=A, B_rows=B_rows, C_rows=C_rows,
        skip=A if D is None else D.detach().float().contiguous(),
        bias=A if delta_bias is None else delta_bias.detach().float().contiguous(),
        saved=saved, last=A if last is None else last, cu_seqlens=borders,
        **_steps("u", u), **_steps("delta", delta[0]), **_steps("z", z), **_steps("out", out),
        delta_direction=delta.stride(0), **_row_steps("B", B_rows), **_row_steps("C", C_rows),
        B=batch, D=channels, T=length, N=states, blocks=blocks,
        group_size=channels // groups, sequences=sequences, per_program=per_program, slots=saved.shape[2],
        directions=directions, packed=int(cu_seqlens is not None), has_D=int(D is not None), has_z=int(z is not None),
        has_bias=int(delta_bias is not None), has_last=int(last is not None), **scan.flags,
    )  # fmt: skip
    launch = dict(
        BLOCK_N=block_n, BLOCK_D=block.channels, SEGMENT=SEGMENT, PIECE=block.piece, num_warps=block.num_warps,
        enable_fp_fusion=FUSION,
    )  # fmt: skip
    return Shared(-(-sequences // max(per_program, 1)), arguments, launch)


def backward_programs(sequences: int, steps: int, blocks: int) -> int:
    """Groups of sequences. Each has scratch states and a part of dA: they stay of the order of the inputs."""
    return min(sequences, max(1, steps // STEPS_OF_PROGRAM, FILLED // max(blocks, 1)))


def _float32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _steps(name: str, x: torch.Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if x is None else x.stride()
    return {f"{name}_{axis}": s for axis, s in zip(("batch", "channel", "time"), strides, strict=True)}


def _padded(M: torch.Tensor, block_n: int) -> torch.Tensor:
    """B or C as float32 [directions,B,G,L,block_n], contiguous, zeros past the last state."""
    rows = M.float().transpose(-1, -2)
    return F.pad(rows, (0, block_n - rows.shape[-1])) if rows.shape[-1] < block_n else rows.contiguous()


def _row_steps(name: str, rows: torch.Tensor) -> dict[str, int]:
    axes = ("direction", "batch", "group", "time")
    return {f"{name}_{axis}": rows.stride(i) // 4 for i, axis in enumerate(axes)}


def configurations() -> list[Configuration]:
    """Every specialisation that the scans launch; float16 differs from bfloat16 in conversions alone."""
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    kernels = (
        ("forward", forward_kernel, _FORWARD, FORWARD),
        ("backward", backward_kernel, _BACKWARD, BACKWARD),
    )
    for dtype, archs in (("fp32", ARCHS), ("bf16", ARCHS), ("fp16", (90,))):
        for name, kernel, numbers, table in kernels:
            for block_n, block in table.items():
                sizes = {"BLOCK_N": block_n, "BLOCK_D": block.channels, "SEGMENT": SEGMENT, "PIECE": block.piece}
                wide = {"u", "delta", "z", "out", "du", "ddelta", "dz"}
                signature = {
                    a: "i32" if a in numbers else "*i32" if a == "cu_seqlens" else f"*{dtype if a in wide else 'fp32'}"
                    for a in kernel.arg_names
                    if a not in sizes
                }
                aligned = tuple(a for a, t in signature.items() if t.startswith("*"))
                yield Configuration(
                    f"{name}-{dtype}-{block_n}", kernel, signature, sizes, aligned, block.num_warps,
                    enable_fp_fusion=FUSION, archs=archs,
                )  # fmt: skip
