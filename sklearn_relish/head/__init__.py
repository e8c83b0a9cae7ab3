"""The network: padded token states in, predictions in standardized units out. Tensors only."""

from sklearn_relish.head.head import RelishHead

__all__ = ["RelishHead"]
