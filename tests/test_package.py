"""What importing the package costs and gives."""

from __future__ import annotations

import subprocess
import sys

import sbert_kernels


def test_import_loads_neither_torch_nor_triton_nor_sentence_transformers() -> None:
    code = (
        "import sys, sbert_kernels\n"
        "print([m for m in ('torch', 'triton', 'sentence_transformers', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_operation_needs_no_sentence_transformers() -> None:
    code = "import sys, sbert_kernels; sbert_kernels.contrastive_loss; print('sentence_transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_public_names_resolve() -> None:
    for name in sbert_kernels.__all__:
        assert getattr(sbert_kernels, name) is not None
    assert set(sbert_kernels.__all__) <= set(dir(sbert_kernels))


def test_the_name_of_patch_is_the_function_whatever_was_imported_first() -> None:
    code = "import sbert_kernels.patching, sbert_kernels; print(callable(sbert_kernels.patch))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "True"
