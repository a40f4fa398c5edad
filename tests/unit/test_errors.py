"""Errors keep their class and every field when they are blamed on a parameter or cross a process boundary."""

from __future__ import annotations

import pickle

import pytest

from siglane.errors import ConfigError, EngineError, ImageError, SiglaneError, UserError, WeightError

ERRORS = [
    UserError("top_p must be below 1", code="bad_value", param="top_p", status=422),
    ImageError("cannot decode the image", code="image_decode_failed", status=415),
    ConfigError("config.json: key 'hidden_size' is missing"),
    WeightError("vision.blocks.0 is missing"),
    EngineError("out of memory", code="out_of_memory", status=503),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_pickling_changes_nothing(error: SiglaneError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_blaming_a_parameter_changes_only_that(error: UserError) -> None:
    param = error.param
    blamed = error.at("messages[0].content[1]")
    assert type(blamed) is type(error)
    assert str(blamed) == str(error)
    assert vars(blamed) == vars(error) | {"param": "messages[0].content[1]"}
    assert error.param == param


def test_exit_codes_tell_the_callers_mistakes_from_failures() -> None:
    assert all(error.exit_code == 2 and isinstance(error, ValueError) for error in ERRORS[:4])
    assert EngineError("failed").exit_code == 1
