"""What tests/mutation/run.py breaks: one constant or sign at a time, and the tests that must notice.

An entry is (file, old text, new text, tests); the old text occurs exactly once in the file. A kernel needs an entry for
each part that can be wrong by itself: forward, every gradient, borders, edges.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest, after variables of the environment


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(file, old, new, tests) for old, new in changes]


def backend(name: str, op: str) -> str:
    return f"tests/ops/test_all_ops.py -k 'test_against_float64 and {op}-{name} and not gpu'"


INTERPRETED = (
    "TRITON_INTERPRET=1 tests/ops/test_all_ops.py tests/ops/test_pointwise_norm_triton.py -k 'triton and (dyt or derf)'"
)
INTERPRETED_RETENTION = (
    "TRITON_INTERPRET=1 tests/ops/test_retention_triton.py tests/ops/test_all_ops.py -k 'triton and retention'"
)
EMULATED = "tests/ops/test_cuda.py -k 'against_float64 or many_blocks or relative_accuracy'"

REFERENCES = [
    *of(
        "ultra_kernels/dyt/reference.py",
        "tests/ops/test_dyt.py",
        ("torch.tanh(alpha", "torch.sin(alpha"),
        ("+ bias.to", "- bias.to"),
    ),
    *of(
        "ultra_kernels/derf/reference.py",
        "tests/ops/test_derf.py",
        ("+ shift.to", "- shift.to"),
        ("torch.erf(u)", "torch.tanh(u)"),
    ),
    *of(
        "ultra_kernels/layer_norm/reference.py",
        "tests/ops/test_layer_norm.py",
        ("bias.to(wide), eps)", "bias.to(wide), 2 * eps)"),
        ("weight.to(wide), bias", "1 + weight.to(wide), bias"),
    ),
    *of(
        "ultra_kernels/rotary/reference.py",
        "tests/ops/test_rotary.py",
        ("/ -K)", "/ -(K + 1))"),
        ("angles.sin()", "-angles.sin()"),
    ),
    *of(
        "ultra_kernels/retention/reference.py",
        "tests/ops/test_retention.py",
        ("distance >= 0", "distance > 0"),
        ("(C - 1 - j, j + 1,", "(C - 1 - j, j,"),
        ("lengths[:, None] - 1 - torch", "lengths[:, None] - torch"),
    ),
    *of(
        "ultra_kernels/sigmoid_attention/reference.py",
        "tests/ops/test_sigmoid_attention.py",
        ("-math.log(max(L, 1))", "-math.log(max(L, 2))"),
        (".triu_(1)", ".triu_(0)"),
        ("rows + 1e-6", "rows + 1e-2"),
    ),
    *of(
        "ultra_kernels/hope_attention/reference.py",
        "tests/ops/test_hope_attention.py",
        ("/ -K)\n", "/ -(K + 2))\n"),
        ("top + theta])", "top + 2 * theta])"),
        ("ddamping = -(", "ddamping = ("),
    ),
    *of(
        "ultra_kernels/selective_scan/reference.py",
        "tests/ops/test_selective_scan.py",
        ("torch.exp(dt * A)", "torch.exp(0.9 * dt * A)"),
        ("y = y * F.silu(", "y = y * F.gelu("),
        ("range(end - 1, begin - 1, -1)", "range(end - 1, begin, -1)"),
    ),
    *of(
        "ultra_kernels/bidirectional_scan/reference.py",
        "tests/ops/test_bidirectional_scan.py",
        ("F.pad(backward, (0, 1))[..., 1:]", "backward"),
        ("forward + backward, u", "forward - backward, u"),
    ),
    *of(
        "ultra_kernels/causal_conv1d/reference.py",
        "tests/ops/test_causal_conv1d.py",
        ("return j - (width - 1)", "return j - width"),
        ("j - (width - 1) // 2", "j - width // 2"),
        ("F.silu(y) if activation", "F.gelu(y) if activation"),
    ),
    *of(
        "ultra_kernels/bitlinear/reference.py",
        "ULTRA_BACKEND=reference tests/ops/test_bitlinear.py",
        ("absmax / 127\n", "absmax / 128\n"),
        ("clamp_(-1, 1)", "clamp_(0, 1)"),
        ("magnitude.mean()", "magnitude.max()"),
        ("RMS_EPS = 1e-6", "RMS_EPS = 1e-2"),
    ),
    *of(
        "ultra_kernels/ternary/reference.py",
        "ULTRA_BACKEND=reference tests/ops/test_ternary.py",
        ("(0, 2, 4, 6)", "(0, 2, 6, 4)"),
        ("codes + 1\n", "codes + 2\n"),
        ("128 * shape[1] <= 2**24", "128 * shape[1] <= 2**34"),
    ),
    *of(
        "ultra_kernels/moe_ffn/reference.py",
        "tests/ops/test_moe_ffn.py",
        ("probs.sum(0) / tokens", "probs.sum(0) / (tokens + 1)"),
        (".softmax(-1) if normalize_gates", ".sigmoid() if normalize_gates"),
        ("logits.logsumexp(-1).square()", "logits.logsumexp(-1)"),
        ("gathered.unflatten(0, (-1, ctx.copies)).sum(1", "gathered.unflatten(0, (-1, ctx.copies)).mean(1"),
    ),
    *of(
        "ultra_kernels/masked_linear_cross_entropy/reference.py",
        "tests/ops/test_masked_linear_cross_entropy.py",
        ("(1 + 2 * z_loss * logsumexp)", "(1 + z_loss * logsumexp)"),
        ("probs.new_full(ts.shape, -1)", "probs.new_full(ts.shape, -2)"),
        ("beta=0 if start == 0 else 1", "beta=0"),
        ("labels != ignore_index", "labels >= 1"),
    ),
]

LAYERS = of(
    "ultra_kernels/nn.py",
    "tests/ops/test_nn.py -k 'equation or recurrence or loop or initial or drop or packed'",
    ("silu(g) * self.head_norm", "torch.relu(g) * self.head_norm"),
    ("(1 - gamma) / (1 + gamma)", "(1 - gamma) / (2 + gamma)"),
    ("10000.0 ** (K / max(K - 2, 1))", "10000.0"),
    ("-wide(self.A_log).exp()", "-wide(self.A_log)"),
    ("right=True) - 1]", "right=False) - 1]"),
    ("(2 * layers) ** 0.5", "layers ** 0.5"),
    ("len(share) * (share", "(share"),
    ("rows[routes.order // self.top_k]", "rows[routes.order % len(rows)]"),
    ("owners)[routes.inverse]", "owners)[routes.order]"),
    ("bias[e].detach()", "bias[0].detach()"),
    ("math.log(1e-3), math.log(1e-1)", "math.log(1e-3), math.log(1)"),
)

CPP = [
    *of(
        "csrc/dyt/dyt_cpu.cpp",
        backend("native", "dyt"),
        ("1.0f - t * t", "1.0f - 0.999f * t * t"),
        ("return tanh(u)", "return erf(u)"),
    ),
    *of(
        "csrc/derf/derf_cpu.cpp",
        backend("native", "derf"),
        ("1.1283791671f", "1.1283f"),
        ("exp(-(u * u))", "exp(-u * 0.999f * u)"),
    ),
    *of(
        "csrc/causal_conv1d/causal_conv1d_cpu.cpp",
        backend("native", "causal_conv1d"),
        ("(1.0f + v * (1.0f - s))", "(1.0f + v * s)"),
        ("mirrored[i] = weight[(halo - i / kConvBlock)", "mirrored[i] = weight[(i / kConvBlock)"),
        ("const int64_t from = max_of(t, begin)", "const int64_t from = max_of(t, 0)"),
    ),
    *of(
        "csrc/selective_scan/selective_scan_cpu.cpp",
        backend("native", "selective_scan"),
        ("da[k] += step * w", "da[k] += w"),
        ("0.693147180559945f", "0.6931f"),
        ("from_input += dh * B[k]", "from_input += dh * C[k]"),
        ("vf dh = g[k] + dy * C[k]", "vf dh = g[k] + dy * B[k]"),
    ),
    *of(
        "csrc/selective_scan/selective_scan_cpu.cpp",
        backend("native", "bidirectional_scan"),
        ("if (p.directions == 2) du += load", "if (p.directions == 3) du += load"),
        ("store(carry + v * kLanes, load(y + seg.rows * kLanes));", "store(carry + v * kLanes, load(y));"),
    ),
    *of(
        "csrc/retention/retention_cpu.cpp",
        "tests/ops/test_retention_native.py",
        ("{ return rising + 1; }", "{ return rising; }"),
        ("{ return falling + (chunk - rows); }", "{ return falling; }"),
        ("p.left || d == 0 ? power", "true ? power"),
        ("x < -126.0f, splat(0.0f), exp2(x)", "x < -8.0f, splat(0.0f), exp2(x)"),
        ("add_state(rows, m.dout, keys_left, decay.after(), m.dq, m.scratch);", ""),
        ("add_queries(rows, queries_left, decay.after(), m);", ""),
        ("add_state_turned(rows, m.v, queries", "add_state_turned(rows, m.dout, queries"),
        ("multiply(rows, p.V, inner, m.scores.left_turned()", "multiply(rows, p.V, inner, m.dscores.left_turned()"),
        ("{m.dk, K, false, scaled.constant}", "{m.dk, K}"),
    ),
    *of(
        "csrc/common/heads.h",
        "tests/ops/test_retention_native.py tests/ops/test_attention_native.py",
        ("of.begin(middle) / size + middle <= block", "of.begin(middle) / size + middle < block"),
        ("if (rest) memset(copy + whole, 0, 64), memcpy", "if (rest) memcpy"),
    ),
    *of(
        "csrc/common/product.h",
        "tests/ops/test_retention_native.py",
        ("(n + kNumbers<Word> - 1) / kNumbers<Word>", "n / kNumbers<Word>"),
        ("load(from + from_row + j) * second", "load(from + from_row + j)"),
        ("if (to.by_row) x *= to.by_row[i + r];", ""),
    ),
    *of(
        "csrc/ternary/ternary_cpu.cpp",
        "tests/ops/test_ternary_native.py -k 'not gradients and not threads and not written'",
        ("whole[r][v] = vi{} - x.sums[m + r];", "whole[r][v] = vi{};"),
        (">> 2 * s;", ">> s;"),
        ("for (; v < end; ++v) multiply_rows<rows, 1>", "for (; v < begin; ++v) multiply_rows<rows, 1>"),
        ("sums[r][v] = vi{} - x.sums[m + r];", "sums[r][v] = vi{};"),
        ("x.at(m + r) + column;", "x.at(m + r);"),
        ("for (; r < rows; ++r) add_unpacked<1>", "for (; r < 0; ++r) add_unpacked<1>"),
        ("const int8_t* last = x + (M - 1) * row;", "const int8_t* last = x;"),
        (
            "out = __builtin_convertvector(sum, vf) * (step[m] * scale)",
            "out = __builtin_convertvector(sum, vf) * step[m]",
        ),
        ("store(at, bias ? out + load(bias + v * kLanes) : out)", "store(at, out)"),
        ("as_int(x) & 0x7fffffff, greater", "as_int(x), greater"),
        ("found < 1e-5f ? 1e-5f : found", "found < 1e-5f ? 2e-5f : found"),
        ("1.0f / absmax * 127.0f", "127.0f / absmax"),
        ("return absmax / 127.0f;", "return absmax / 128.0f;"),
        ("sum(squares) / (float)K + 1e-6f", "sum(squares) / (float)K + 1e-3f"),
        ("*gamma + 1e-5f;", "*gamma;"),
        ("max(min(x / divisor, splat(1.0f)), splat(-1.0f))", "min(x / divisor, splat(1.0f))"),
        ("codes[4 + i] << 2 | codes[8 + i] << 4", "codes[4 + i] << 4 | codes[8 + i] << 2"),
        ("sums[v] += abs(load(w + i + v * kLanes))", "sums[v] += load(w + i + v * kLanes)"),
        ("whole / (double)(N * K)", "whole / (double)(N * K + 1)"),
    ),
    *of(
        "csrc/common/codes.h",
        "tests/ops/test_ternary_native.py -k 'exact or extreme'",
        ("kMostScaledQuads = 1 << 14;", "kMostScaledQuads = 1 << 20;"),
        ("kMostQuads = 60;", "kMostQuads = 80;"),
        ("kMostQuads = 120;", "kMostQuads = 160;"),
    ),
    *of(
        "csrc/bitlinear/bitlinear_cpu.cpp",
        "tests/ops/test_ternary_native.py -k 'gradients or written or fingerprint or threads'",
        ("kColumns, n > 0, tiles.by_row}", "kColumns, false, tiles.by_row}"),
        ("tiles.by_row[i] = *gamma", "tiles.by_row[i] = 1.0f"),
        ("kWeightColumns, m > 0}", "kWeightColumns, false}"),
        ("rows - c) * x.step[m + i]", "rows - c)"),
        ("bytes[g * kBlockColumns + b] - 1)", "bytes[g * kBlockColumns + b])"),
        ("i + 1 < rows ? get(i + 1, c)", "i + 2 < rows ? get(i + 1, c)"),
        ("sum(dot) * r * r / (float)K", "sum(dot) * r / (float)K"),
        ("part(sums, k) + gk * xk * r;", "part(sums, k) + gk * xk;"),
        ("sum += parts[block * K + k];", "sum = parts[block * K + k];"),
        ("memset(dweight, 0, N * K * sizeof(float));", ""),
        ("at_most(n, 1024)", "at_most(n, 2)"),
    ),
    *of(
        "csrc/sigmoid_attention/sigmoid_attention_cpu.cpp",
        "tests/ops/test_attention_native.py tests/ops/test_all_ops.py -k 'native and sigmoid'",
        ("exp2(min(splat(126.0f), x))", "exp2(min(splat(8.0f), x))"),
        ("bias = -logf(", "bias = -1.01f * logf("),
        ("min_of(keys, row + 1 - key)", "min_of(keys, row - key)"),
        ("((float)sums[i] + kEpsilon)", "(float)sums[i] * 1.01f"),
        ("(load(product) - delta)", "load(product)"),
        ("const vf dscore = w * complement", "const vf dscore = w"),
        ("dbias += sum(total);", "dbias = sum(total);"),
        ("store(product, dscore * p.scale);", "store(product, dscore);"),
        ("Product<>{m.dv, V, more}", "Product<>{m.dv, V, false}"),
    ),
    *of(
        "csrc/hope_attention/hope_attention_cpu.cpp",
        "tests/ops/test_attention_native.py tests/ops/test_all_ops.py -k 'native and hope'",
        ("kind == kRight || kind == kUpper; }", "kind == kUpper; }"),
        ("query - (key + kTile - 1)", "query - key"),
        ("lane % 2 ? -0.70710678f", "lane % 2 ? 0.70710678f"),
        ("* (back ? -1.0f : 1.0f)", "* 1.0f"),
        ("return above ? i + 1 : 0;", "return above ? i : 0;"),
        ("kind == kRotary && p.causal && query == key", "false"),
        ("store(total, load(total) * shrink);", ""),
        ("m.most[i] * kLn2 + logf(total)", "m.most[i] + logf(total)"),
        ("w * (load(product) - delta[i])", "w * load(product)"),
        ("dlogit * only(x, j, lo, hi, 0.0f) * gap", "dlogit * only(x, j, lo, hi, 0.0f)"),
        ("if (kind == kPrefix) turn(", "if (false) turn("),
        ("store(x, load(x) * load(m.damping + kTile + j - i));", ""),
    ),
    *of(
        "csrc/retention/retention_cpu.cpp",
        backend("native", "retention"),
        ("rest.empty = last && last_empty;", "rest.empty = last;"),
        ("left.read(initial, false);", "left.empty = true;"),
        ("dscale += inner_product(rows, K, m.q", "dscale += inner_product(rows - 1, K, m.q"),
        ("load(m.dq + i) * scale", "load(m.dq + i)"),
    ),
    *of(
        "csrc/retention/retention_cpu.cpp",
        backend("native", "retention_step"),
        ("decay.over(1)", "decay.over(2)"),
    ),
    *of(
        "csrc/common/gates.h",
        backend("native", "selective_scan"),
        ("2.4022242085e-1f", "2.40e-1f"),
    ),
    *of(
        "csrc/common/gates.h",
        "tests/ops/test_simd.py",
        ("1.4000902483e-1f", "1.6e-1f"),
        ("4.1668390791e-2f", "4.16e-2f"),
        ("12582912.0f + 127.0f", "12582912.0f + 126.0f"),
    ),
    *of(
        "csrc/common/simd.h",
        "tests/ops/test_simd.py",
        ("2.12194440e-4f", "2.1219e-4f"),
        ("1.33314422036e-1f", "1.3331e-1f"),
        ("1.2837915e-1f", "1.28379e-1f"),
        ("(u + 0x7fff + ((u >> 16) & 1)) >> 16;", "(u + 0x8000) >> 16;"),
    ),
]

INTERPRETED_BITLINEAR = "TRITON_INTERPRET=1 tests/ops/test_bitlinear_triton.py tests/ops/test_ternary_triton.py"

TRITON = [
    *of(
        "ultra_kernels/bitlinear/triton_kernels.py",
        INTERPRETED_BITLINEAR,
        ("tl.sum(squares, axis=0) / K + 1e-6", "tl.sum(squares, axis=0) / K + 1e-3"),
        ("tl.where(absmax < 1e-5, 1e-5, absmax)", "tl.where(absmax < 1e-5, 1e-6, absmax)"),
        ("tl.div_rn(1.0, absmax) * 127.0", "tl.div_rn(127.0, absmax)"),
        ("(v * factor + 12582912.0) - 12582912.0", "tl.floor(v * factor + 0.5)"),
        ("tl.where(code == code, code, 0.0)", "tl.where(code < 127.0, code, 0.0)"),
        ("k % 16 // 4 * 32", "k % 16 // 4 * 16"),
        ("total += code.to(tl.int32)", "total = code.to(tl.int32)"),
        ("total += tl.abs(tl.load(weight", "total = tl.abs(tl.load(weight"),
        ("d = mean + 1e-5", "d = mean"),
        ("tl.where(w > d, 1,", "tl.where(w >= d, 1,"),
        ("scale[:, None] + tl.load(bias", "scale[:, None] - tl.load(bias"),
        ("scale + m * by_row", "scale + m * 0"),
        ("/ K * r * r", "/ K * r"),
        ("r * (g - v * mean)", "r * g"),
        ("total += g * v * tl.load(rstd", "total = g * v * tl.load(rstd"),
        ("end = tl.minimum(begin + rows_per_block, M)", "end = M"),
        ("dbias = dy.sum(0,", "dbias = dy[1:].sum(0,"),
    ),
    *of(
        "ultra_kernels/ternary/triton_kernels.py",
        "TRITON_INTERPRET=1 tests/ops/test_ternary_triton.py",
        ("(packed >> 2 * s) & 3", "(packed >> 2 * s) & 1"),
        ("(0, 2, 1, 3)", "(0, 1, 2, 3)"),
        ("acc -= tl.load(totals", "acc += tl.load(totals"),
        (".transpose(2, 3)", ".transpose(3, 4)"),
        ("0 if bias is None else N,", "0,"),
    ),
    *of(
        "ultra_kernels/bitlinear/op.py",
        "tests/ops/test_bitlinear_backends.py",
        ("entry.used_up |= backward", "entry.used_up |= False"),
        ("entry.state != state or ", ""),
        ("backward |= torch._C._current_graph_task_id() != -1", "backward |= False"),
        ("weight.is_inference() or not (trains or fingerprint)", "weight.is_inference()"),
        ("if capturing or weight", "if weight"),
        ("(codes, step) if wants_weight else (None, None)", "codes, step"),
    ),
    *of(
        "ultra_kernels/sigmoid_attention/triton_kernels.py",
        "TRITON_INTERPRET=1 tests/ops/test_sigmoid_attention_triton.py tests/ops/test_all_ops.py "
        "-k 'sigmoid and triton'",
        ("shift = tl.log2(length.to(tl.float32))", "shift = tl.log2(length.to(tl.float32) + 1.0)"),
        ("tl.load(head_bias + h) * -1.4426950408889634", "tl.load(head_bias + h) * -1.4427"),
        ("1.0 + tl.exp2(z)", "1.0001 + tl.exp2(z)"),
        ("seen = tl.where(causal != 0, m0, end)", "seen = end"),
        ("n_ok[None, :] & ((causal == 0)", "((causal == 0)"),
        ("acc / (total + 1e-6)[:, None]", "acc / (total + 1e-2)[:, None]"),
        ("ds = (p - p * p) * (dp - own[:, None])", "ds = (p - p * p) * dp"),
        ("acc = acc * factor[:, None]", "acc = acc * 1.0"),
        ("by_row += tl.sum(ds, axis=1)", "by_row = tl.sum(ds, axis=1)"),
        ("tl.where(t < diagonal, start + t * BLOCK_N, rest)", "rest"),
        ("ds = (share - share * p) * (dp - own[None, :])", "ds = (share - share * p) * dp"),
        ("dkeys * scale", "dkeys"),
    ),
    *of(
        "ultra_kernels/_rows_triton.py",
        INTERPRETED_RETENTION,
        ("border // SIZE + s <= slot", "border // SIZE + s < slot"),
    ),
    *of(
        "ultra_kernels/hope_attention/triton_kernels.py",
        "TRITON_INTERPRET=1 tests/ops/test_hope_attention_triton.py tests/ops/test_all_ops.py "
        "-k 'test_every_tile or (hope and triton and float32)'",
        ("w = (x1 - x2) * 0.7071067811865476", "w = (x2 - x1) * 0.7071067811865476"),
        ("d1 = du * c + dw * s", "d1 = du * c - dw * s"),
        ("damped = tl.where(kind % 2 == 1, damp, 0.0)", "damped = damp"),
        ("i - BLOCK + 1, -i)", "i - BLOCK, -i)"),
        ("tl.where(kind == 0, gap >= 0, gap < 0)", "tl.where(kind == 0, gap >= 0, gap <= 0)"),
        ("most + tl.log2(total)", "most"),
        ("ds * s * distance", "ds * s"),
        ("            if kind % 2 == 0:\n                ds = ds * tl.exp2(-distance * damp)\n", ""),
        ("before = kind == tl.where(queries != 0, 3, 1)", "before = kind == 1"),
        ("unit = scale * 0.6931471805599453", "unit = scale"),
        ("both = torch.logaddexp(lse, before)", "both = torch.maximum(lse, before)"),
    ),
    *of(
        "ultra_kernels/_pointwise_norm_triton.py",
        INTERPRETED,
        ("2.06390887954e-2", "2.1e-2"),
        ("1.6272678", "1.627"),
        ("1.1283791671", "1.1283"),
        ("dalpha += slope * v", "dalpha += slope"),
        ("tl.store(out + D, tl.sum(dbias", "tl.store(out + D, tl.sum(dweight"),
        ("(row < rows)[:, None]", "(row < rows - 1)[:, None]"),
    ),
    *of(
        "ultra_kernels/selective_scan/triton_kernels.py",
        "TRITON_INTERPRET=1 tests/ops/test_scan_triton.py",
        ("1.4000902483e-1", "1.6e-1"),
        ("slot = begin // SEGMENT + s", "slot = begin // SEGMENT"),
        ("bias_sum += tl.where(ok, change, 0.0)", "bias_sum += change * 2"),
        ("A_sum += dt[None, :] * w", "A_sum += w"),
        ("0.6931471805599453 * tl.sum", "0.6931 * tl.sum"),
        ("opens = shift * (1 - direction)", "opens = shift * 0"),
        ("D_sum += dy * u_t", "D_sum += dout * u_t"),
        ("before = y", "before = 0.0 * y"),
    ),
    *of(
        "ultra_kernels/causal_conv1d/triton_kernels.py",
        "TRITON_INTERPRET=1 tests/ops/test_all_ops.py -k causal_conv1d-triton",
        ("grad * gate * (1.0 + pre * (1.0 - gate))", "grad * gate * (1.0 + pre * gate)"),
        ("1 - width - first", "-first"),
        ("tl.store(row + W * D, tl.sum(grad, axis=0)", "tl.store(row + W * D, tl.sum(pre, axis=0)"),
        ("tl.where(flag, end, L)", "tl.where(flag, L, L)"),
    ),
    *of(
        "ultra_kernels/retention/triton_kernels.py",
        INTERPRETED_RETENTION,
        ("* 1.4426950408889634", "* 1.4426"),
        ("n - c0 + 1, c1 - 1 - n", "n - c0, c1 - 1 - n"),
        ("n - c0 + 1, c1 - 1 - n", "n - c0 + 1, c1 - n"),
        ("acc = acc / _state_unit(g, T)", "acc = acc"),
        ("(gap <= 0) & (right", "(gap < 0) & (right"),
        ("24.0 / tl.maximum", "4.0 / tl.maximum"),
        ("(BLOCK_M - 1 - a).to", "(BLOCK_M - a).to"),
        ("total = tl.sum(tl.ravel(acc", "total = tl.sum(tl.ravel(factor * acc"),
        ("(place == per_chunk - 1) | (i == 0)", "place == per_chunk - 1"),
        ("m1 - m0 - 1 - j, j + 1", "m1 - m0 - 1 - j, j"),
        ("* g) * factor\n", "* g)\n"),
        ("s = gamma * tl.load", "s = tl.load"),
    ),
    *of(
        "ultra_kernels/retention/op.py",
        INTERPRETED_RETENTION,
        ("dnew = grad_state + (", "dnew = grad_state - ("),
    ),
]

CUDA = [
    *of(
        "csrc/common/pointwise_norm.cuh",
        EMULATED,
        ("dw.v[i] += grad.v[i] * t", "dw.v[i] += grad.v[i] * u"),
        ("da += slope * in.v[i]", "da += slope"),
        ("w.v[i] * F::value(a * t.v[i] + s) + b.v[i]", "w.v[i] * F::value(a * t.v[i] + s) - b.v[i]"),
    ),
    *of(
        "csrc/dyt/dyt_cuda.cu",
        EMULATED,
        ("2.06390887954e-2f", "2.1e-2f"),
        ("return 1.0f - value * value", "return 1.0f - value"),
    ),
    *of(
        "csrc/selective_scan/selective_scan_cuda.cu",
        "tests/ops/test_cuda.py -k 'scan and against_float64'",
        ("-expm1f(-dt)", "expm1f(-dt)"),
        ("dA[i] += dt * w", "dA[i] += w"),
        ("kLn2 * sums[1]", "sums[1]"),
        ("dC[(rows + r + (s.reverse ? 1 : -1)) * p.states", "dC[(rows + r + (s.reverse ? -1 : 1)) * p.states"),
    ),
    *of(
        "csrc/causal_conv1d/causal_conv1d_cuda.cu",
        "tests/ops/test_cuda.py -k 'conv and against_float64'",
        ("from >= s.begin && from < s.end) sum", "from >= s.begin) sum"),
        ("float sum = taps.bias;", "float sum = 0.0f;"),
    ),
    *of(
        "csrc/ternary/ternary_cuda.cu",
        "tests/ops/test_cuda.py -k 'ternary or few_panels or quantised_to or between_two'",
        ("codes[i].v[r] >> 2 * s", "codes[i].v[r] >> s"),
        ("product[m][r] - total[m]", "product[m][r] + total[m]"),
        ("w < warps; ++w", "w < kWarps; ++w"),
        ("(blockIdx.y * p.M + m) * p.N", "(blockIdx.y + m) * p.N"),
        ("split < p.splits", "split < 1"),
        ("p.step[m] * *p.scale", "p.step[0] * *p.scale"),
        ("read(p.bias, p.bias_dtype, n)", "read(p.bias, p.bias_dtype, 0)"),
        ("if (bits > most) most = bits;", "if (bits < most) most = bits;"),
        ("absmax = 1e-5f;", "absmax = 1e-6f;"),
        ("1.0f / absmax * 127.0f", "127.0f / absmax"),
        ("step[blockIdx.x] = absmax / 127.0f", "step[blockIdx.x] = absmax / 128.0f"),
    ),
    *of("csrc/derf/derf_cuda.cu", EMULATED, ("1.1283791671f", "1.1283f")),
]

TRAINER = [
    *of(
        "ultra/train/schedule.py",
        "tests/train/test_schedule.py",
        ("(step + 1) / begin", "step / begin"),
        ("SECOND_PEAK = 0.25", "SECOND_PEAK = 0.5"),
        ("return peak * floor", "return floor"),
        ("math.ceil(cfg.scheduler_total_steps / 2)", "math.floor(cfg.scheduler_total_steps / 2)"),
        ("(1 + math.cos(math.pi * progress)) / 2", "(1 + math.cos(math.pi * progress)) / 3"),
        ("WSD_DECAY = 0.2", "WSD_DECAY = 0.3"),
    ),
    *of(
        "ultra/export/ternary.py",
        "tests/test_export.py",
        ("**dict(model.named_buffers())", "**{}"),
        (" or (isinstance(module, MoE) and module.bitnet)", ""),
        ('with torch.device("meta"):', 'with torch.device("cpu"):'),
        ("or any(out.iterdir())", "or False"),
        ("        finally:\n            shutil.rmtree(temporary", "        finally:\n            str(temporary"),
    ),
    *of(
        "ultra/train/galore.py",
        "tests/train/test_galore.py tests/train/test_optim.py",
        ('update * (group["lr"] * self.scale)', 'update * group["lr"]'),
        ("(turn * turn) @ state", "turn @ state"),
        ("(1 - beta2) * good", "(1 - beta1) * good"),
        ("flip(-1)", "flip(-2)"),
    ),
    *of(
        "ultra/train/optim.py",
        "tests/train/test_galore.py tests/train/test_optim.py",
        ('not getattr(param, "no_galore", False)', "True"),
        ("if not decay], 0.0)", "if not decay], group.optim.wd)"),
    ),
    *of(
        "ultra/data/masking.py",
        "tests/data/test_masking.py",
        ("probability * 2**32", "probability * 2**31"),
        ("strategy[0] + strategy[1]", "strategy[0] + 2 * strategy[1]"),
        ("fate < self._mask_below]", "fate <= 1]"),
        ("choice[lowest] < 2**32", "False"),
        ("0, 0, 0, self._purpose", "0, 0, 0, 0"),
    ),
]

# C++ last: each needs a build, and the compiled library of the copy changes with it
MUTATIONS = [*REFERENCES, *LAYERS, *TRITON, *CUDA, *TRAINER, *CPP]
