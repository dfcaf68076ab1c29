from .op import derf

__all__ = ["derf"]
