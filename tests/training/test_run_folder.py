"""Folders that are no run, or only what is left of one."""

import pytest

from cmpe_se.errors import UserError
from cmpe_se.run_folder import RunFolder
from cmpe_se.training import train


@pytest.fixture
def orphaned(tmp_path):
    """A run's checkpoints without its settings."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.save({"step": 3})
    return run


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [("output", "name another --output"), ("resume", "train anew with another --output")],
)
def test_checkpoints_without_settings(arguments, advice, orphaned):
    before = orphaned.checkpoints.newest.read_bytes()
    with pytest.raises(UserError) as caught:
        train(epochs=1, device="cpu", **{arguments: orphaned.path})
    message = str(caught.value)
    assert message.startswith(f"{orphaned.path} holds checkpoints in state/, but no config.yaml")
    assert message.endswith(advice)
    assert "\n" not in message
    assert orphaned.checkpoints.newest.read_bytes() == before
    assert not orphaned.config.exists()


def test_a_new_folder_may_exist(tmp_path):
    (tmp_path / "state").mkdir()
    assert RunFolder.new(tmp_path).path == tmp_path
