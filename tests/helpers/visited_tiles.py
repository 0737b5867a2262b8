"""The tiles of the score matrix that attention's kernels visit, by the kernels' own arithmetic."""

from kernels.rotary_attention.tiles import key_runs, query_runs


def visited_tiles(seq_len: int, window: int, block_m: int, block_n: int, by_query: bool = True) -> list[tuple]:
    """The tiles that one head of one sequence visits: (first query, first key, masked), in the kernels' own order.

    `by_query`: as the forward and dQ kernels walk (a row of keys for each block of queries); else as dK/dV does.
    """
    window = min(window, seq_len)
    runs, outer, inner = (key_runs, block_m, block_n) if by_query else (query_runs, block_n, block_m)
    run = getattr(runs, "fn", runs)  # the Python that a jitted function is written in
    tiles = []
    for fixed in range(0, seq_len, outer):
        start, full, edge, stop = run(fixed, seq_len, window, block_m, block_n)
        moving = [(i, True) for i in range(start, full, inner)]
        moving += [(i, False) for i in range(full, edge, inner)]
        moving += [(i, True) for i in range(edge, stop, inner)]
        tiles += [(fixed, i, masked) if by_query else (i, fixed, masked) for i, masked in moving]
    return tiles
