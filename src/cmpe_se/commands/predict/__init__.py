"""The ``predict`` command: the predictions of a trained network for images."""

from cmpe_se.commands.predict.predict import as_command, complaint, predict

__all__ = ["as_command", "complaint", "predict"]
