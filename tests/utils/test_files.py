"""The system's refusals as one sentence."""

import pytest

from cmpe_se.errors import UserError
from cmpe_se.utils.files import os_errors_as


@pytest.mark.parametrize(
    ("error", "advice", "message"),
    [
        (OSError(28, "No space left on device", "a/file"), "", "cannot write to a: No space left on device"),
        (OSError(28, "No space left on device"), "make room", "cannot write to a: No space left on device; make room"),
        (OSError("cannot identify image file"), "", "cannot write to a: cannot identify image file"),
    ],
)
def test_one_sentence(error, advice, message):
    with pytest.raises(UserError) as raised, os_errors_as("cannot write to a", advice=advice):
        raise error
    assert str(raised.value) == message
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("error", [UserError("another"), KeyError("name")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, os_errors_as("cannot write to a"):
        raise error
    assert raised.value is error
