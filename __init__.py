"""CacheTune: reuse KV cache that is not a prefix, tuned per machine on a calibrated simulator.

The repository root is this package. Floors and their imports: ARCHITECTURE.md.
"""

from .core.errors import CacheTuneError

__version__ = "0.1.0"
__all__ = ["CacheTuneError", "__version__"]
