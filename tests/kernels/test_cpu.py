"""What this CPU multiplies fast, and how GEMMs are padded for it."""

import pytest
import torch

from expertune.kernels.cpu import pad_rows


@pytest.mark.parametrize("rows", [1, 8, 9, 80, 127, 129, 300, 1000, 4097])
def test_rows_of_16_bit_gemms_are_padded_by_little_with_zeros(rows: int) -> None:
    x = torch.ones(rows, 3, dtype=torch.bfloat16)
    padded = pad_rows(x)
    assert rows <= padded.shape[0] <= max(rows * 1.125, rows + 7)
    assert torch.equal(padded[:rows], x)
    assert not padded[rows:].any()


def test_numbers_of_rows_that_code_is_made_for_are_few() -> None:
    made_for = {pad_rows(torch.empty(rows, 1, dtype=torch.bfloat16)).shape[0] for rows in range(1, 513)}
    assert len(made_for) == 32
    assert {pad_rows(torch.empty(rows, 1, dtype=torch.bfloat16)).shape[0] for rows in made_for} == made_for


def test_rows_of_float32_gemms_stay() -> None:
    x = torch.ones(13, 3)
    assert pad_rows(x) is x
