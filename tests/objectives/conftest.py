"""The runs of the trainer's tests."""

from tests.train.conftest import rows_file, run_values, small_mixtral

__all__ = ["rows_file", "run_values", "small_mixtral"]
