"""The network: token states in, numbers out."""

from sklearn_relish.head.head import RelishHead

__all__ = ["RelishHead"]
