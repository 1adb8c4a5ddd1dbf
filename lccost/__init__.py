"""lccost: what long-context inference methods really cost."""

__version__ = "0.1.0"
