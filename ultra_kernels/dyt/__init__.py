from .op import dyt

__all__ = ["dyt"]
