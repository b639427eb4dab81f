"""What scripts/page_audit.py makes of LMDeploy's prefix cache and of pages; the audit itself needs a GPU."""
from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import problem

from lmdeploy_kvq import FORMATS

pytest.importorskip('aiohttp')
import page_audit
from soak_load import Prompt

pytest.importorskip('lmdeploy.pytorch.paging.block_trie.node')
from lmdeploy.pytorch.paging.block_trie.node import Node


def block(number: int, parent: Node, first: int) -> Node:
    """A block of 64 tokens from ``first`` on, behind ``parent``."""
    tokens = numpy.arange(first, first + 64)
    node = Node(hash(tuple(tokens)), number, tokens)
    node.attach_to(parent)
    return node


def test_every_block_once_and_its_text():
    """The same tokens behind other ones are another text; the last block of each text is marked."""
    root = Node(-1, -1, None)
    a = block(5, root, 0)
    b, c = block(7, a, 100), block(8, a, 200)
    d, e = block(9, b, 300), block(3, c, 300)
    found = {entry.block: (entry, last) for entry, last in page_audit.cached(SimpleNamespace(_roots={None: root}))}
    assert set(found) == {node.block_id for node in (a, b, c, d, e)}
    assert [number for number, (_, last) in sorted(found.items()) if last] == [3, 9]
    assert found[9][0].path == (*range(64), *range(100, 164), *range(300, 364)) and found[9][0].start == 128
    assert found[3][0].key != found[9][0].key and len({entry.key for entry, _ in found.values()}) == 5
    again = Node(-1, -1, None)
    block(1, block(0, block(2, again, 0), 200), 300)
    other = {entry.block: entry.key for entry, _ in page_audit.cached(SimpleNamespace(_roots={None: again}))}
    assert other[1] == found[3][0].key  # whatever page it is in


def test_errors_are_relative_to_what_is_read_now():
    new = torch.randn(3, 2, 8)
    old = new.clone()
    old[1] *= 1.5
    old[2, 0, 0] = float('nan')
    assert page_audit._error(old, new).tolist() == [0.0, pytest.approx(0.5, abs=1e-6), float('inf')]


@pytest.mark.parametrize('change, words', [({}, None), ({'first_layer': 0.1}, 'another token'), ({'left': 1}, 'in use'),
                                           ({'p999': 0.6}, 'the limit is 0.5')])
def test_verdicts(change, words):
    row = {'round': 2, 'first_layer': 0.0, 'left': 0, 'p999': 0.3, **change}
    failed = page_audit.failures(row, 0.5)
    assert failed == [] if words is None else len(failed) == 1 and words in failed[0] and 'round 2' in failed[0]


def test_whose_prompt_a_text_is():
    prompts = [Prompt((1, 2, 3), 1), Prompt((1, 2, 9, 9), 1), Prompt((5, ), 1)]
    assert page_audit.of_prompt(prompts, (1, 2, 3, 4)) == (0, 3) and page_audit.of_prompt(prompts, (1, 2, 9)) == (1, 3)
    assert page_audit.of_prompt(prompts, (7, )) == (0, 0)


@pytest.mark.parametrize('fmt', [fmt for fmt in FORMATS if fmt.per_token_head], ids=lambda fmt: fmt.name)
def test_pages_are_read_as_the_format_says(fmt):
    """Blocks by their logical numbers, from LMDeploy's tuple of one layer's tensors."""
    p = problem(fmt, [192], device='cuda' if torch.cuda.is_available() else 'cpu', block_size=64)
    cache = p.cache
    layer = cache.k_codes, cache.v_codes, cache.k_scales, cache.v_scales
    allocator = SimpleNamespace(get_physical_blocks=lambda blocks: p.block_table[0, :3].cpu().numpy()[blocks])
    pages = object.__new__(page_audit.Pages)
    pages.caches, pages.format, pages.dims = [layer], fmt, (cache.head_dim, cache.v_head_dim)
    pages.scheduler = SimpleNamespace(block_manager=SimpleNamespace(allocator=allocator))
    (key, value), = pages.read([2, 0])
    wanted = torch.cat([torch.arange(128, 192), torch.arange(64)])
    for found, given in ((key, p.key), (value, p.value)):
        error = page_audit._error(found, given[wanted].to(found.device))
        assert found.shape[0] == 128 and error.mean() <= 1.2 * fmt.max_error
