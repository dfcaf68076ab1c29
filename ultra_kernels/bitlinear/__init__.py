from .op import bitlinear

__all__ = ["bitlinear"]
