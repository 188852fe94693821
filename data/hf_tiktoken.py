"""Convert tiktoken's ranks to a tokenizer.json with the same ids, and prove it before it is written.

tiktoken joins any two neighbours whose joined bytes have a rank, the lowest rank first; `tokenizers` needs each such
pair spelled out as a merge, in that order. Both take a piece that is a token as a whole without merging. Their regular
expressions are of different engines: ids are compared for every character before the file is given out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .byte_level import spell_bytes
from .errors import DataConfigError
from .tiktoken_ranks import parse_ranks
from .tokenizer import Tokenizer
from .tokenizer_files import TokenizerFile

PROBE_CHARACTERS = 0x20000
CHARACTERS_PER_PROBE = 64
SURROGATES = range(0xD800, 0xE000)


def convert_ranks(file: TokenizerFile, tokenizer: Tokenizer) -> bytes:
    """Return the tokenizer.json of a file of ranks; bos comes first where specials are asked for.

    Raises DataConfigError where its ids are not those of ``tokenizer``.
    """
    fast = _build(file)
    for probe in _probes(file.settings["specials"]):
        wanted = tokenizer.encode(probe).tolist()
        found = fast.encode(probe, add_special_tokens=False).ids
        if found != wanted:
            place = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
            near = tokenizer.decode(wanted[max(0, place - 2) : place + 3])
            raise DataConfigError(
                f"tokenizer {file.path} has no exact Hugging Face form: the ids differ near {near!r}; the pattern is "
                "read differently there (write it without possessive quantifiers such as ++)"
            )
    return fast.to_str(pretty=True).encode()


def _build(file: TokenizerFile) -> Any:
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError as error:
        raise DataConfigError("export needs the package tokenizers; pip install 'basestone[hf]'") from error
    ranks = parse_ranks(file.content, file.path)
    specials: dict[str, int] = file.settings["specials"]
    vocabulary = {spell_bytes(token): rank for token, rank in ranks.items()} | specials
    fast = Tokenizer(models.BPE(vocabulary, _merges(ranks), ignore_merges=True))
    try:
        pattern = Regex(file.settings["pattern"])
    except Exception as error:  # the library raises bare Exceptions
        raise DataConfigError(
            f"tokenizer {file.path}: its pattern cannot be read by `tokenizers`: {error}"
        ) from error
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in specials])
    bos = file.settings["bos"]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, specials[bos])]
    )
    fast.encode_special_tokens = True  # as in training: a special in a text is text
    return fast


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell_bytes(left), spell_bytes(right)) for left, right in pairs]
    return merges


def _probes(specials: dict[str, int]) -> Iterator[str]:
    """Give every character of the first two planes among letters, digits, blanks and marks; runs; specials."""
    characters = [chr(code) for code in range(PROBE_CHARACTERS) if code not in SURROGATES]
    for start in range(0, len(characters), CHARACTERS_PER_PROBE):
        part = characters[start : start + CHARACTERS_PER_PROBE]
        yield "".join(f"a{c}A {c}1\n" for c in part)
    for size in (2, 3, 5, 8, 13, 50):
        for run in (" ", "\n", "\t", "\r\n", "1", "a", "ab", "=", "-", ".", "/", "\n ", " \n", "é", "字"):
            yield f"{run * size}x{run * size}"
    yield "I'm you'll it's we've DON'T I'M THEY'RE he'd 's'S 'Twas"
    for special in specials:
        yield f"a{special}b {special} "
        yield special
