"""Attention that keeps to documents: a packed row equals its documents alone, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import VOCAB, curve_of, make_engine, relative_difference, run_config

from basestone.model.decoder import document_mask
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout

pytestmark = pytest.mark.dist
LENGTHS = [(5, 1, 20, 6), (32,), (31, 1)]
CELLS = [
    ("llama", "tp2-sp-z1"),
    ("gpt2", "tp2-sp-pp2-z2"),
    ("gpt2", "tp2-z3"),
    ("llama", "pp2-vp2-z1"),
    ("llama", "dp2-z3"),
]


def packed_rows():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (len(LENGTHS), 32), generator=generator)
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        starts[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return tokens, starts


def _logits(run, apart):
    """Logits of packed rows, and of each document in a forward of its own."""
    module = make_engine(run).module.eval()
    tokens, starts = packed_rows()
    with torch.no_grad():
        together = module({"tokens": tokens, "starts": starts} if apart else {"tokens": tokens})["next_token"]
        alone = [
            torch.cat(
                [module({"tokens": part})["next_token"] for part in row.unsqueeze(0).split(lengths, dim=1)],
                dim=1,
            )
            for row, lengths in zip(tokens, LENGTHS, strict=True)
        ]
    return together.numpy(), torch.cat(alone).numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_row_equals_its_documents(family):
    """Positions begin anew at each document, too: gpt2's are learned."""
    run = run_config(family, parallel__zero=0)
    together, alone = run_ranks(_logits, 1, run, True)[0]
    assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()
    crossing, _ = run_ranks(_logits, 1, run, False)[0]
    assert np.abs(crossing - alone).max() > 0.01 * np.abs(alone).max(), "documents would be seen otherwise"


def test_the_mask_by_its_definition():
    _, starts = packed_rows()
    mask = document_mask(starts)
    for row, lengths in enumerate(LENGTHS):
        document = [number for number, length in enumerate(lengths) for _ in range(length)]
        for query in range(32):
            for key in range(32):
                hidden = key > query or document[key] != document[query]
                assert mask[row, 0, query, key] == hidden


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_every_layout_keeps_to_the_same_documents(family, name):
    layout = parse_layout(name)
    run = layout.of(run_config(family, data__attention="document"))
    serial = run_config(family, data__attention="document", parallel__zero=0)
    reference = run_ranks(curve_of, 1, serial, 5)[0]
    assert relative_difference(run_ranks(curve_of, layout.processes, run, 5)[0], reference) < 1e-5
    plain = run_ranks(curve_of, 1, run_config(family, parallel__zero=0), 5)[0]
    assert relative_difference(plain, reference) > 1e-4


def test_recompute_sees_the_same_documents():
    run = run_config("gpt2", data__attention="document", parallel__zero=1)
    again = run_config("gpt2", data__attention="document", parallel__zero=1, train__recompute=True)
    assert run_ranks(curve_of, 1, again, 3)[0] == run_ranks(curve_of, 1, run, 3)[0]
