"""Tokenizers as others publish them, trained on real text, and strings to try them on."""

import base64
import json
from pathlib import Path
from pydoc_data.topics import topics

from torture import torture_strings

from basestone.data.byte_level import read_spelling

STRINGS = torture_strings(1000, seed=31)

TEXTS = [*topics.values()][:30]


def train_ranks(pattern: str, num_ranks: int) -> dict[bytes, int]:
    """Train byte-level BPE on real text; its ids are ranks."""
    import tokenizers

    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ranks,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([*TEXTS, *torture_strings(300, seed=32)], trainer)
    return {read_spelling(piece): rank for piece, rank in fast.get_vocab().items()}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


def write_hf_directory(folder: Path) -> Path:
    """Write byte-level BPE as it is published: tokenizer.json beside a configuration."""
    import tokenizers

    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(TEXTS, vocab_size=900, special_tokens=["<bos>", "<eos>", "<pad>", "<|im_start|>"])
    fast.enable_truncation(16)
    fast.enable_padding(length=16)
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text("raise SystemExit('code of a tokenizer was run')")
    return folder
