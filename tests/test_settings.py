"""Environment variables are read at each call, and an override wins over them."""

from __future__ import annotations

import re

import pytest
import torch

from sbert_kernels import contrastive_loss, settings
from sbert_kernels.backends.cpu.contrastive import choose_precision


def test_environment_is_read_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.get("disable") is False
    monkeypatch.setenv("SBERT_KERNELS_DISABLE", "1")
    assert settings.get("disable") is True
    with settings.override(disable=False):
        assert settings.get("disable") is False
    assert settings.get("disable") is True


@pytest.mark.parametrize(
    ("variable", "text", "name", "wanted"),
    [
        ("SBERT_KERNELS_DISABLE", "maybe", "disable", "1 or 0"),
        ("SBERT_KERNELS_CUDA", "maybe", "cuda", "1 or 0"),
        ("SBERT_KERNELS_CUDA_ARCHS", "sm_90a", "cuda_archs", "names like 90a, with commas between them"),
        ("SBERT_KERNELS_CUDA_ARCHS", "", "cuda_archs", "names like 90a, with commas between them"),
        ("SBERT_KERNELS_BLOCK_BYTES", "64MiB", "block_bytes", "a positive integer, a number of bytes"),
        ("SBERT_KERNELS_BLOCK_BYTES", "0", "block_bytes", "a positive integer, a number of bytes"),
        ("SBERT_KERNELS_WEIGHTS", "sweeps", "weights", "one of ['sweep', 'weigh']"),
        (
            "SBERT_KERNELS_MATMUL",
            "tf16",
            "matmul",
            f"one of {list(settings.MATMUL_PRECISIONS)}",
        ),
    ],
)
def test_unreadable_values_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, wanted: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=re.escape(f"{variable}='{text}' cannot be read: expected {wanted}")):
        settings.get(name)


def test_a_misspelt_variable_is_named_once_with_what_it_may_have_meant(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("SBERT_KERNELS_BUILD", "SBERT_KERNELS_CACHE", "SBERT_MODEL"):
        monkeypatch.setenv(name, "1")
    settings.get("disable")
    assert caplog.messages == []
    misspelt = {
        "SBERT_KERNELS_DISABEL": "SBERT_KERNELS_DISABLE",
        "SBERT_KERNEL_BACKEND": "SBERT_KERNELS_BACKEND",
        "SBERT_KERNELS_BLOCKBYTES": "SBERT_KERNELS_BLOCK_BYTES",
        "SBERTKERNELS_COMPILE": "SBERT_KERNELS_COMPILE",
    }
    for name in misspelt:  # one after the other, as a notebook would
        monkeypatch.setenv(name, "1")
        settings.get("disable")
        settings.get("backend")
    assert caplog.messages == [
        f"The environment variable {name} has no meaning to sbert-kernels: is it {meant}?"
        for name, meant in misspelt.items()
    ]


def test_the_former_name_of_a_variable_is_still_read_and_says_once_what_to_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SBERT_KERNELS_MATMUL", raising=False)
    monkeypatch.setenv("SBERT_KERNELS_PRODUCTS", "tf32")
    assert [settings.get("matmul") for _ in range(2)] == ["tf32"] * 2
    assert caplog.messages == [
        "SBERT_KERNELS_PRODUCTS is the former name of SBERT_KERNELS_MATMUL, and this is the last version to read it: "
        "set SBERT_KERNELS_MATMUL=tf32."
    ]
    monkeypatch.setenv("SBERT_KERNELS_PRODUCTS", "fp8")
    with pytest.raises(ValueError, match="SBERT_KERNELS_PRODUCTS='fp8' cannot be read: expected one of"):
        settings.get("matmul")
    caplog.clear()
    monkeypatch.setenv("SBERT_KERNELS_MATMUL", "float32")
    assert [settings.get("matmul") for _ in range(2)] == ["float32"] * 2
    assert caplog.messages == [
        "SBERT_KERNELS_PRODUCTS is the former name of SBERT_KERNELS_MATMUL: both are set, and SBERT_KERNELS_MATMUL is "
        "used. Unset SBERT_KERNELS_PRODUCTS."
    ]


def test_cuda_is_asked_for_forbidden_or_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBERT_KERNELS_CUDA", raising=False)
    read = [settings.get("cuda")]
    for text in ("", "0", "1"):
        monkeypatch.setenv("SBERT_KERNELS_CUDA", text)
        read.append(settings.get("cuda"))
    assert read == [None, None, False, True]


def test_architectures_are_read_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("90a,100f", " 100F, 90a,90a "):
        monkeypatch.setenv("SBERT_KERNELS_CUDA_ARCHS", text)
        assert settings.get("cuda_archs") == "90a,100f"


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown setting"), settings.override(dissable=True):
        pass


@pytest.mark.parametrize(
    ("variable", "name", "values"),
    [
        ("SBERT_KERNELS_WEIGHTS", "weights", settings.WEIGHTS),
        ("SBERT_KERNELS_MATMUL", "matmul", settings.MATMUL_PRECISIONS),
    ],
)
def test_choices_are_read_in_any_case_and_unset_or_empty_leave_them_open(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str, values: tuple[str, ...]
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert settings.get(name) is None
    monkeypatch.setenv(variable, "")
    assert settings.get(name) is None
    for value in values:
        monkeypatch.setenv(variable, f" {value.upper()} ")
        assert settings.get(name) == value


def test_the_usual_number_of_bytes_is_the_callers_until_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBERT_KERNELS_BLOCK_BYTES", raising=False)
    assert settings.block_bytes() == 64 * settings.MIB
    assert settings.block_bytes(512 * settings.MIB) == 512 * settings.MIB
    monkeypatch.setenv("SBERT_KERNELS_BLOCK_BYTES", "1000")
    assert settings.block_bytes() == settings.block_bytes(512 * settings.MIB) == 1000
    with settings.override(block_bytes=None):
        assert settings.block_bytes(7) == 7


@pytest.mark.parametrize("products", ["tf32", "tf32x3"])
def test_the_cpu_kernels_refuse_products_of_gpus(products: str) -> None:
    refused = pytest.raises(ValueError, match=f"SBERT_KERNELS_MATMUL='{products}' is for GPUs; the cpu backend cannot")
    with settings.override(matmul=products), refused:
        choose_precision({torch.float32})


@pytest.mark.usefixtures("compiled")
def test_a_loss_on_the_cpu_says_which_setting_stopped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBERT_KERNELS_MATMUL", "tf32")
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="SBERT_KERNELS_MATMUL='tf32' is for GPUs"):
        contrastive_loss(x, x, backend="cpu")
    assert contrastive_loss(x, x, backend="blockwise").isfinite()
