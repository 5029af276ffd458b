"""The compact mask against the worked example of the design, written out by hand."""

from __future__ import annotations

import torch

from kernels.mask_layout import CLEAN, visible
from tests.kernels.cases import MIXED, plan

# k = 3, prefix A B C in the cache, drafts D E F, all branches. Columns: the cache | D E F | branch 0 | branch 1 | branch 2.
EXAMPLE = """
    111 100 000 000 000
    111 110 000 000 000
    111 111 000 000 000
    111 100 111 000 000
    111 100 111 000 000
    111 100 111 000 000
    111 110 000 111 000
    111 110 000 111 000
    111 110 000 111 000
    111 111 000 000 111
    111 111 000 000 111
    111 111 000 000 111
"""


def test_worked_example():
    expected = torch.tensor([[c == "1" for c in line.replace(" ", "")] for line in EXAMPLE.strip().splitlines()])
    assert expected.shape == (12, 15)
    limit = torch.tensor([1, 2, 3, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    branch = torch.tensor([CLEAN, CLEAN, CLEAN, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert torch.equal(visible(limit, branch), expected[:, 3:])
    # The builder of the attention tests lays the same plan out, and lists the same keys.
    request = plan(3, 3, 0, 1, 2)
    assert request.compact() == (limit.tolist(), branch.tolist())
    assert request.visible() == [row.nonzero().flatten().tolist() for row in expected[:, 3:]]


def test_every_kind_of_request():
    for request in MIXED:
        limit, branch = (torch.tensor(x) for x in request.compact())
        seen = visible(limit, branch)
        assert [row.nonzero().flatten().tolist() for row in seen] == request.visible()
        assert seen.diagonal().all(), "every row sees itself, padding too"
        clean = branch == CLEAN
        assert not seen[clean][:, ~clean].any(), "a clean row must not see a mask row"


def test_a_batch_of_sequences_and_an_index_of_its_own():
    limit = torch.tensor([[1, 2, 1], [1, 1, 1]])
    branch = torch.tensor([[CLEAN, CLEAN, 0], [CLEAN, 0, 0]])
    seen = visible(limit, branch)
    assert torch.equal(seen[0], visible(limit[0], branch[0]))
    assert torch.equal(seen[1], visible(limit[1], branch[1]))
    # Rows in another order, numbered by ``index``, see the same rows.
    order = torch.tensor([2, 0, 1])
    assert torch.equal(visible(limit[0, order], branch[0, order], order), seen[0][order][:, order])
