"""The value head starts at nothing, computes in float32, and comes back from its file."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.models.heads import FILE, ValueHead


def test_it_starts_at_zero_and_learns():
    head = ValueHead(8)
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    values = head(states)
    assert values.tolist() == [0.0] * 5
    (values - 1).square().sum().backward()
    torch.testing.assert_close(head.linear.weight.grad[0], -2 * states.sum(0))
    assert head.linear.bias.grad.tolist() == [-10.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_float32_on_any_trunk(dtype):
    head = ValueHead(4)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        head.linear.bias.fill_(2.0**-12)  # more digits than bfloat16 has
    values = head(torch.ones(1, 4, dtype=dtype))
    assert values.dtype == torch.float32
    assert values.tolist() == [10 + 2.0**-12]


def test_saved_and_loaded(tmp_path):
    head = ValueHead(8)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    head.save(tmp_path)
    assert FILE == "value_head.safetensors"
    assert set(load_file(tmp_path / FILE)) == {"linear.weight", "linear.bias"}
    again = ValueHead.load(tmp_path)
    states = torch.randn(5, 8)
    assert torch.equal(again(states), head(states))
    assert all(parameter.requires_grad for parameter in again.parameters())
