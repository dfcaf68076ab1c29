from .op import rotary

__all__ = ["rotary"]
