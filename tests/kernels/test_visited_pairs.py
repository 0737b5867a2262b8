"""Which pairs of query and key a causal window has, and which tiles hold them: attention's arithmetic, no kernel."""

import pytest
import torch

from kernels.rotary_attention import cost
from kernels.rotary_attention.tiles import Tiles
from tests.helpers.visited_tiles import visited_tiles


@pytest.mark.parametrize("by_query", [True, False])
def test_visited_tiles_are_those_that_the_window_touches(by_query):
    for seq_len in (1, 7, 16, 33, 100):
        for window in (0, 1, 15, 16, 17, seq_len // 2, seq_len - 1, seq_len, 10**9):
            for block_m, block_n in ((16, 16), (32, 16), (16, 32), (64, 16)):
                t = torch.arange(seq_len)
                distance = t[:, None] - t
                visible = (distance >= 0) & (distance <= window)
                expected = {}
                for m in range(0, seq_len, block_m):
                    for n in range(0, seq_len, block_n):
                        tile = visible[m : m + block_m, n : n + block_n]
                        if tile.any():
                            expected[m, n] = bool(tile.all())
                visited = visited_tiles(seq_len, window, block_m, block_n, by_query)
                assert len(visited) == len(expected)
                assert {(m, n) for m, n, _ in visited} == set(expected)
                assert all(expected[m, n] for m, n, masked in visited if not masked)
    full = [masked for *_, masked in visited_tiles(2048, 1024, 128, 64, by_query)]
    assert full.count(False) > full.count(True)


def test_which_windows_have_tiles_that_both_edges_cut():
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        distances = torch.arange(block_m)[:, None] - torch.arange(block_n)
        # By how much a tile's queries may begin behind its keys: with some distances below 0 and some past the window.
        tiles_distances = [distances + behind for behind in range(-block_m, block_m + block_n)]
        for window in range(2 * (block_m + block_n)):
            cut_by_both = any((tile < 0).any() and (tile > window).any() for tile in tiles_distances)
            assert Tiles(block_m, block_n, 4, 1).both_edges(window) or not cut_by_both
    assert not Tiles(128, 64, 8, 2).both_edges(1024)


def test_cost_counts_pairs_by_brute_force():
    for T, window in ((9, 3), (9, 0), (9, 8), (9, 100)):
        pairs = sum(1 for t in range(T) for j in range(t + 1) if t - j <= window)
        assert cost(2, T, 4, 2, 16, window)[1] == 2 * 4 * pairs * 2 * 2 * 16
        assert cost(2, T, 4, 2, 16, window, backward=True)[1] == 2 * 4 * pairs * 5 * 2 * 16
    assert cost(1, 1, 4, 4, 128, 0)[0] == 2 * (3 * 512 + 512)
    with_ve = 2 * (3 * 512 + 512 + 4 + 512)  # qkv, ve, gate, out
    assert cost(1, 1, 4, 4, 128, 0, has_ve=True)[0] == with_ve
    assert cost(1, 1, 4, 4, 128, 0, has_ve=True, backward=True)[0] == 2 * with_ve
