from .op import retention, retention_step

__all__ = ["retention", "retention_step"]
