"""ModernBERT in plain PyTorch: packed batches, attention behind one seam, encoder, heads, weights, `Embedder`.

Imports nothing of the other packages. `from model import Embedder` is the front door; it is resolved on first use, so
that `model.config`, `model.errors` and `model.folder` stay importable without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.embedder import Embedder as Embedder


def __getattr__(name: str) -> Any:
    if name == "Embedder":
        from model.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'model' has no attribute {name!r}")
