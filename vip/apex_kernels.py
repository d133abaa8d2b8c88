"""NVIDIA apex, which is optional: whether its kernels can be used, or one line that says why not and what would do.

Its Python package proves nothing: a build without compiling leaves a package that imports, and the package index has an
unrelated one of that name. So the compiled modules themselves are imported.
"""

import importlib

OPTIMIZERS = ("apex.optimizers", "amp_C")
LAYER_NORM = ("apex.normalization", "fused_layer_norm_cuda")


def require(key: str, modules: tuple[str, str], instead: str) -> None:
    """Raises ValueError, which names `key` and says what to take `instead`, unless the package and its kernels import."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            there = module != modules[0]
            problem = "is here without this CUDA kernel" if there else "with its CUDA kernels is not installed"
            raise ValueError(
                f"{key}: NVIDIA apex {problem} ({error}); build it from github.com/NVIDIA/apex with APEX_CPP_EXT=1 "
                f"APEX_CUDA_EXT=1 (the package index has an unrelated 'apex'), or take {instead}"
            ) from error
