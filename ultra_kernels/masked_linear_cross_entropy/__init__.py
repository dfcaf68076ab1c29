from .op import masked_linear_cross_entropy

__all__ = ["masked_linear_cross_entropy"]
