from .op import moe_ffn
from .reference import MoEStats

__all__ = ["MoEStats", "moe_ffn"]
