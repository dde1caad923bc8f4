"""The shared config leaves nothing to a default."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
from base import EVERY_FIELD, full_config

from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError


def test_full_config_passes_every_field() -> None:
    assert set(EVERY_FIELD) == {field.name for field in fields(CanaryConfig)}
    assert asdict(full_config()) == EVERY_FIELD


def test_full_config_takes_overrides_and_no_unknown_names() -> None:
    assert full_config(mode="raise").mode == "raise"
    with pytest.raises(ConfigError, match="unknown_field"):
        full_config(unknown_field=1)
    with pytest.raises(ConfigError):
        full_config(mode="shout")
