"""CacheTune: reuse KV cache that is not a prefix, tuned per machine on a calibrated simulator.

The repository root is this package. Floors and their imports: ARCHITECTURE.md. Nothing is imported
here: pytest loads this file by itself, under the name of whatever folder it lies in.
"""

__version__ = "0.1.0"
