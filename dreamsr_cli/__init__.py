"""dreamsr: open implementation of DreamSR (CVPR 2026), ultra-high-resolution photo restoration on the command line."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 bitsandbytes, which peft opens where it is installed, warns about a package nobody needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
