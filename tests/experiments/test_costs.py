"""The table of a ledger: short, and nothing left out."""

import pytest

from diffusion import ledger
from diffusion.ledger import Cost
from experiments import costs


def network(blocks, uneven=0):
    """Costs of a network with so many blocks, the later ones dearer."""
    found = {("Net", "embed"): Cost(10, 20, 0)}
    for i in range(blocks):
        for part in ("gates", "attend", "feed"):
            found["Net", f"block_{i}", f"block_{i}._{part}", "out"] = Cost(1, 100 + (i >= 10) + uneven * i, 8)
    return found | {("Net", "head"): Cost(5, 6, 7), ("Net",): Cost(0, 0, 1)}


def test_blocks_that_cost_the_same_share_a_line():
    lines = costs.lines(network(40), 24)
    assert [(line.name, line.count) for line in lines if not line.depth] == [
        ("embed", 1),
        ("block_0-9", 10),
        ("block_10-39", 30),
        ("head", 1),
        ("itself", 1),
    ]
    assert [line.name for line in lines[2:5]] == ["gates", "attend", "feed"] and lines[2].cost == Cost(10, 1000, 80)


@pytest.mark.parametrize("most", [4, 6, 24])
@pytest.mark.parametrize("uneven", [0, 1])
def test_a_table_is_short_and_leaves_nothing_out(most, uneven):
    found = network(40, uneven) | {("Net", f"extra{chr(97 + i)}"): Cost(1, 1, 1) for i in range(3)}
    lines = costs.lines(found, most)
    assert len(lines) <= most
    assert ledger.total(dict(enumerate(line.cost for line in lines if not line.depth))) == ledger.total(found)
