from .op import PackedTernary, pack_ternary, quantize_ternary, ternary_linear, ternary_matmul, unpack_ternary

__all__ = [
    "PackedTernary",
    "pack_ternary",
    "quantize_ternary",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
]
