"""Finding, compiling, loading and checking the C++ library (:mod:`.cpu`) and the CUDA library (:mod:`.cuda`).

``setup.py`` builds with the same lists of sources and flags, so importing this needs neither torch nor a compiler.
"""

from . import cpu as cpu
from . import cuda as cuda
