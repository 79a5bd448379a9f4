"""The transposed product of few rows: the same numbers, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tq_fast.models.few_rows import FewRows

# Both products round their fp32 sums in their own order; 16-bit results may round to a neighbour.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (10, 1, 24), (2, 5, 24)])
def test_the_product_is_that_of_the_layer(dtype, bias, shape) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 18, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        with FewRows(nn.Sequential(layer)).during(x.shape[:-1].numel()):
            assert "forward" in layer.__dict__
            result = layer(x)
    assert result.shape == expected.shape and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_layers_are_as_they_were_afterwards_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(RuntimeError), FewRows(model).during(10):
        raise RuntimeError
    assert all("forward" not in layer.__dict__ for layer in model)


def test_one_row_and_many_rows_go_the_usual_way() -> None:
    layer = nn.Linear(4, 4)
    for num_rows in (1, 1000):
        with FewRows(nn.Sequential(layer)).during(num_rows):
            assert "forward" not in layer.__dict__


def test_a_subclass_of_linear_and_a_layer_patched_by_its_owner_are_left_alone() -> None:
    class Owned(nn.Linear):
        pass

    owned, patched = Owned(4, 4), nn.Linear(4, 4)
    patched.forward = lambda x: x
    with FewRows(nn.Sequential(owned, patched)).during(10):
        assert "forward" not in owned.__dict__
        assert patched(torch.ones(1)).item() == 1
    assert "forward" in patched.__dict__
