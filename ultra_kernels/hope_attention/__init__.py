from .op import hope_attention

__all__ = ["hope_attention"]
