"""Environment variables are read at each call, and an override wins over them."""

from __future__ import annotations

import pytest

from sbert_kernels import settings


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
        ("SBERT_KERNELS_BLOCK_BYTES", "64MiB", "block_bytes", "a positive integer, a number of bytes"),
        ("SBERT_KERNELS_BLOCK_BYTES", "0", "block_bytes", "a positive integer, a number of bytes"),
    ],
)
def test_unreadable_values_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, wanted: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable}='{text}' cannot be read: expected {wanted}"):
        settings.get(name)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown setting"), settings.override(dissable=True):
        pass
