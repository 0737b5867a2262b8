"""The bound that kernels in fp32 are judged by: no order of a sum passes it, and what is only moved has none."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.kernel_checks import assert_as_good, baselines
from tests.helpers.roundings import UNIT, Roundings

GENERATOR = torch.Generator().manual_seed(0)
TERMS = torch.randn(400, 64, generator=GENERATOR)
ORDERS = {
    "one after another": lambda x: np.add.accumulate(x, axis=1)[:, -1],
    "backwards": lambda x: np.add.accumulate(x[:, ::-1], axis=1)[:, -1],
    "the largest first": lambda x: np.add.accumulate(-np.sort(-x, axis=1), axis=1)[:, -1],
    "eight at a time": lambda x: np.add.reduce([np.add.accumulate(x[:, i::8], axis=1)[:, -1] for i in range(8)]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_of_a_sum_errs_by_more(order):
    """Sum by sum, so that no luck of one is another's excuse. The largest first is the worst: its parts grow most."""
    truth = TERMS.double().sum(1)
    with Roundings(0):
        bound = (TERMS.double().sum(1) - truth).abs()
    errors = (torch.from_numpy(ORDERS[order](TERMS.numpy())).double() - truth).abs()
    assert errors.max() > 0
    assert (errors <= bound).all()


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "softmax"])
def test_products_err_by_their_terms(name):
    x, w, c = (torch.randn(shape, generator=GENERATOR).double() for shape in ((5, 7), (7, 3), (5, 3)))
    compute, size = {
        "mm": (lambda: x @ w, 7**0.5 * (x.abs() @ w.abs())),
        "addmm": (lambda: torch.addmm(c, x, w), 8**0.5 * (c.abs() + x.abs() @ w.abs())),
        "bmm": (lambda: x[None] @ w[None], 7**0.5 * (x.abs() @ w.abs())[None]),
        "softmax": (lambda: x.softmax(-1), 7**0.5 * x.softmax(-1)),
    }[name]
    truth = compute()
    with Roundings(0):
        error = (compute() - truth).abs()
    torch.testing.assert_close(error, UNIT * size, rtol=1e-6, atol=0)


def test_what_is_moved_or_hidden_has_no_error():
    x = torch.randn(6, 4, generator=GENERATOR).double()
    with Roundings(0):
        moved = torch.cat([x.T.reshape(6, 4), x[[1, 0]], x.clone()])
        scores = torch.where(torch.ones(4, 4).tril().bool(), x[:4], -torch.inf)
        seen = F.scaled_dot_product_attention(x[None, :4], x[None, :4], x[None, :4], is_causal=True)
    assert torch.equal(moved, torch.cat([x.T.reshape(6, 4), x[[1, 0]], x]))
    assert scores[0, 1:].isinf().all()
    assert seen.isfinite().all()


def test_a_lucky_reference_makes_no_one_wrong():
    """A single row whose own error in fp32 is nothing: what sums it in another order is as good all the same, and what
    leaves out a thousandth of one term is not."""
    row = TERMS[0]
    truth = row.double().sum()[None]
    baseline = baselines(lambda dtype: row.to(dtype).sum()[None])
    for order in ORDERS.values():
        assert_as_good("sum", torch.from_numpy(order(TERMS.numpy())[:1]), baseline, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good("sum", (row.sum() - 1e-3 * row[0])[None], baseline, truth)
