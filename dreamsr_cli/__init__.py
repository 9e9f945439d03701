"""dreamsr: open implementation of DreamSR (CVPR 2026), ultra-high-resolution photo restoration on the command line."""

__version__ = "0.1.0"
