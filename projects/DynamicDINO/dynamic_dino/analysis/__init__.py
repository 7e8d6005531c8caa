from .collect import Collection, collect

__all__ = ["Collection", "collect"]
