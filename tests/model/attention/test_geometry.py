import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinat.model.attention.geometry import axis_tiles, check_geometry, neighbors
from dinat.model.errors import AttentionError
from tests.parity.natten_rules import pb_start, window_start

axes = st.tuples(st.sampled_from([3, 5, 7, 9, 11, 13]), st.integers(1, 6)).flatmap(
    lambda kd: st.tuples(st.integers(kd[0] * kd[1], kd[0] * kd[1] + 3 * kd[1] + 5), st.just(kd[0]), st.just(kd[1]))
)


def test_neighbors_of_a_short_axis() -> None:
    indices, rpb_index = neighbors(7, 3, 1)
    assert ["".join(map(str, row)) for row in indices.tolist()] == ["012", "012", "123", "234", "345", "456", "456"]
    assert rpb_index[:, 0].tolist() == [2, 1, 1, 1, 1, 1, 0]


def test_neighbors_of_a_dilated_axis_are_in_one_group() -> None:
    indices, rpb_index = neighbors(11, 3, 3)
    assert indices[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    assert (indices.diff(dim=1) == 3).all()
    assert rpb_index[:, 0].tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0]


@given(axes)
def test_neighbors_match_natten(axis: tuple[int, int, int]) -> None:
    length, kernel_size, dilation = axis
    indices, rpb_index = neighbors(length, kernel_size, dilation)
    assert indices[:, 0].tolist() == [window_start(i, length, kernel_size, dilation) for i in range(length)]
    assert rpb_index[:, 0].tolist() == [pb_start(i, length, kernel_size, dilation) for i in range(length)]


@given(axes, st.integers(1, 12))
def test_tiles_contain_every_query_once_with_its_neighbors(axis: tuple[int, int, int], tile: int) -> None:
    length, kernel_size, dilation = axis
    indices, rpb_index = neighbors(length, kernel_size, dilation)
    all_queries = []
    for group in axis_tiles(length, kernel_size, dilation, tile):
        for queries, keys in zip(group.queries.tolist(), group.keys, strict=True):
            for query, row in zip(queries, group.rpb_index, strict=True):
                assert torch.equal(keys[row >= 0], indices[query])
                assert torch.equal(row[row >= 0], rpb_index[query])
                all_queries.append(query)
    assert sorted(all_queries) == list(range(length))


def test_inner_tiles_share_one_bias() -> None:
    assert sorted(len(group.queries) for group in axis_tiles(56, 7, 1, 7)) == [1, 1, 6]
    assert [len(group.queries) for group in axis_tiles(56, 7, 8, 7)] == [8]


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation", "message"),
    [
        ((40, 56), 7, 8, "dilation 8 with kernel_size 7 requires a feature map of at least 56x56, got 40x56"),
        ((56, 56), 6, 1, "kernel_size must be odd"),
        ((56, 56), 1, 1, "at least 3, got 1"),
        ((56, 56), 7, 0, "dilation must be at least 1, got 0"),
    ],
)
def test_invalid_geometry_raises_attention_error(size: tuple[int, int], kernel_size: int, dilation: int, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        check_geometry(*size, kernel_size, dilation)
