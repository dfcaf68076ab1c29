from .op import sigmoid_attention

__all__ = ["sigmoid_attention"]
