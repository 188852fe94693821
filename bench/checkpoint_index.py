"""Index of a 70 B checkpoint at ZeRO-3 over many ranks: our lists of flat ranges beside torch DCP's global plan.

    python bench/checkpoint_index.py [--ranks 1024] [--dcp-ranks 128 256]

No tensor is made: both sides plan from the shapes alone. DCP's cost is linear in ranks; it is run at fewer of them.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.layout import Parameter, boxes
from basestone.trainer.checkpoint.format import BLOCK_BYTES
from basestone.trainer.checkpoint.share import TENSORS
from basestone.trainer.checkpoint.tensors import FP32_BYTES, index_of

MIB = 1 << 20


def fragments(table: dict[str, Parameter], rank: int, ranks: int) -> Iterator[tuple[int, Parameter, int, int]]:
    """Give (number, parameter, start, elements) of what a data-parallel rank owns."""
    for number, row in enumerate(table.values()):
        part = -(-row.numel // ranks)
        owned = max(0, min(part, row.numel - rank * part))
        if owned:
            yield number, row, rank * part, owned


def ours(table: dict[str, Parameter], ranks: int) -> None:
    """Make the index, write it as JSON, read it back, and cut it into boxes as a load does."""
    started = time.perf_counter()
    reports = []
    for rank in range(ranks):
        position, lines = 0, []
        for number, _, start, owned in fragments(table, rank, ranks):
            lines.append([number, start, owned, position])
            position += len(TENSORS) * FP32_BYTES * owned
        hashes = ["0" * 64] * -(-position // BLOCK_BYTES)
        reports.append(
            {"file": f"rank_{rank:05d}.bin", "bytes": position, "tp_rank": 0, "tp_size": 1, "fragments": lines}
            | {"blocks": hashes}
        )
    body = json.dumps(index_of(table, TENSORS, reports), separators=(",", ":"))
    planned = time.perf_counter()
    rows = list(table.values())
    count = 0
    for rank in json.loads(body)["ranks"]:
        for number, start, owned, _ in rank["fragments"]:
            count += sum(1 for _ in boxes(rows[number], 0, 1, start, owned))
    loaded = time.perf_counter()
    size, plan_s, load_s = len(body) / MIB, planned - started, loaded - planned
    print(f"| ours | {ranks} | {size:.0f} | {plan_s:.1f} | {load_s:.1f} | {count:,} boxes |")


def dcp(table: dict[str, Parameter], ranks: int) -> None:
    """Make every rank's plan, what rank 0 is sent, the global plan and its metadata."""
    plans = []
    for rank in range(ranks):
        items = []
        for key in TENSORS:
            for _, row, start, owned in fragments(table, rank, ranks):
                for number, box in enumerate(boxes(row, 0, 1, start, owned)):
                    offset = torch.Size((box.row, box.col))
                    chunk = ChunkStorageMetadata(offset, torch.Size((box.num_rows, box.num_cols)))
                    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size(row.view2d))
                    index = MetadataIndex(f"{key}.{row.name}", offset, number)
                    items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))
    started = time.perf_counter()
    sent = sum(len(pickle.dumps(plan)) for plan in plans)
    whole, metadata = create_default_global_save_plan(plans)
    _validate_global_plan(whole, metadata)
    size = len(pickle.dumps(metadata))
    seconds = time.perf_counter() - started
    note = f"{sum(len(plan.items) for plan in plans):,} items, {sent / MIB:.0f} MiB sent to rank 0"
    print(f"| torch DCP | {ranks} | {size / MIB:.0f} | {seconds:.1f} | - | {note} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--dcp-ranks", type=int, nargs="*", default=[128, 256])
    arguments = parser.parse_args()
    table = layout_of(ModelConfig(preset="llama-70b", vocab_size=128256))
    print("| planner | ranks | index MiB | plan s | load and cut s | |\n|---|---|---|---|---|---|")
    for ranks in arguments.dcp_ranks:
        dcp(table, ranks)
    ours(table, arguments.ranks)


if __name__ == "__main__":
    main()
