"""The runs of the trainer's tests."""

from tests.train.conftest import rows_file, run_values, small_mixtral, whole_run

__all__ = ["rows_file", "run_values", "small_mixtral", "whole_run"]
