"""Write a tokenizer of any kind as a Hugging Face tokenizer with exactly the same ids.

A tokenizer.json is copied as it is; tiktoken's ranks are converted in hf_tiktoken.py. A SentencePiece model file's
protobuf wire format is read here, so no protobuf package is needed. Exactness holds for BPE with the identity
normaliser; anything else is refused, because `tokenizers` breaks ties and normalises differently there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import DataConfigError
from .hf_tiktoken import convert_ranks
from .storage import storage_errors, write_atomic
from .tasks.special_pieces import CLS_PIECES, MASK_PIECES, SEP_PIECES, find_frame, find_piece
from .tokenizer import Tokenizer
from .tokenizer_engines import META_SPACE
from .tokenizer_files import HUGGINGFACE, SENTENCEPIECE, TEMPLATE, read_tokenizer_file

# piece types of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BPE_MODEL = 2
Framing = Literal["document", "sentences", "texts", "spans"]


@dataclass(frozen=True)
class Piece:
    """Hold one entry of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Hold what a model file says: its pieces in the order of their ids, and the settings that matter."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    add_dummy_prefix: bool
    ids: dict[str, int]


def write_hf_tokenizer(
    model_path: Path, out_dir: Path, *, model_max_length: int, framing: Framing = "document"
) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``out_dir``; of a SentencePiece model also its file.

    Encoding with ``add_special_tokens=False`` gives the tokenizer's own ids. With ``True`` it frames a text as training
    did: "document" puts bos first, "sentences" writes [CLS] text [SEP], and [SEP] behind a second text, "texts" the
    same without telling the two apart, "spans" ends with eos; a tokenizer.json keeps what it says itself. Reads the
    same in transformers 4 and 5.

    Raises DataConfigError for a tokenizer that has no exact equivalent.
    """
    file = read_tokenizer_file(model_path)
    tokenizer = Tokenizer(model_path)  # refuses what no run could use
    if file.kind == SENTENCEPIECE:
        model = read_sentencepiece_model(model_path)
        files = {
            "tokenizer.json": _build_tokenizer(model, _template(model, tokenizer, framing))
            .to_str(pretty=True)
            .encode(),
            "tokenizer_config.json": _json(
                _tokenizer_config(model, model_max_length) | _task_config(tokenizer, framing)
            ),
            "tokenizer.model": file.content,
        }
    else:
        content = file.content if file.kind == HUGGINGFACE else convert_ranks(file, tokenizer)
        config = _named_config(file.settings, model_max_length) | _task_config(tokenizer, framing)
        files = {"tokenizer.json": content, "tokenizer_config.json": _json(config)}
    with storage_errors(f"writing the tokenizer into {out_dir}"):
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(out_dir / name, content)


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a model file. Raises DataConfigError where it is none, or none that converts exactly."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except OSError as error:
        raise DataConfigError(f"tokenizer {path} cannot be read ({error.strerror}); check the path") from error
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise DataConfigError(f"tokenizer {path} is no SentencePiece model; give a .model file") from error
    obstacles = []
    if not pieces or trainer.get(3, 1) != BPE_MODEL:
        obstacles.append("it is not BPE")
    if not any(piece.kind == UNKNOWN for piece in pieces):
        obstacles.append("it has no unknown piece")
    if any(piece.kind == UNUSED for piece in pieces):
        obstacles.append("it has unused pieces, which are taken apart again")
    if normalizer.get(2, b""):
        obstacles.append("it normalises text (normalization_rule_name is not identity)")
    if normalizer.get(4, 1):
        obstacles.append("it removes blanks (remove_extra_whitespaces)")
    if not normalizer.get(5, 1):
        obstacles.append("it does not escape blanks")
    if obstacles:
        raise DataConfigError(
            f"tokenizer {path} has no exact Hugging Face form: {'; '.join(obstacles)}; "
            "train one with `tokenizer train`"
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        ids={piece.text: number for number, piece in enumerate(pieces)},
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield ``(field number, value)`` of a protobuf message: int for a varint, else bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = content[position]
            position += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    while position < len(content):
        tag = varint()
        wire_type = tag & 7
        if wire_type == 0:
            yield tag >> 3, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type}")
        size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        if position + size > len(content):
            raise ValueError("a field runs past the end")
        yield tag >> 3, content[position : position + size]
        position += size


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return BPE merges in the order in which SentencePiece prefers the pieces they give.

    SentencePiece merges any two neighbours whose joined text is a piece, the best score first; `tokenizers`
    needs each such pair spelled out. User-defined pieces are split off before and take no part.
    """
    usable = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(usable, key=lambda text: (-usable[text], model.ids[text])):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [(left, right) for left, right in pairs if left in usable and right in usable]
        merges += sorted(pairs, key=lambda pair: (model.ids[pair[0]], model.ids[pair[1]]))
    return merges


def _build_tokenizer(model: SentencePieceModel, template: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    fast = Tokenizer(
        models.BPE(
            model.ids, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    )
    prefix = [normalizers.Prepend(META_SPACE)] if model.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", META_SPACE)])
    decoder_steps: list[Any] = [decoders.Replace(META_SPACE, " ")]
    if model.byte_fallback:
        decoder_steps.append(decoders.ByteFallback())
    decoder_steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        decoder_steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(decoder_steps)
    fast.add_special_tokens(
        [
            AddedToken(piece.text, normalized=False, special=True)
            for piece in model.pieces
            if piece.kind in (CONTROL, UNKNOWN)
        ]
    )
    fast.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=False)
            for piece in model.pieces
            if piece.kind == USER_DEFINED
        ]
    )
    fast.post_processor = template
    return fast


def _template(model: SentencePieceModel, tokenizer: Tokenizer, framing: Framing) -> Any:
    """Make what frames texts."""
    from tokenizers import processors

    bos, eos = _control(model, "<s>"), _control(model, "</s>")
    if framing == "document":
        single, pair, specials = f"{bos} $A", f"{bos} $A {bos} $B", [bos]
    elif framing == "spans":
        single, pair, specials = f"$A {eos}", f"$A {eos} $B {eos}", [eos]
    else:
        frame = find_frame(tokenizer)
        cls, sep = (model.pieces[number].text for number in (frame.cls, frame.sep))
        second = "$B:1 {sep}:1" if framing == "sentences" else "$B {sep}"
        single, pair, specials = f"{cls} $A {sep}", f"{cls} $A {sep} {second.format(sep=sep)}", [cls, sep]
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(special, model.ids[special]) for special in specials]
    )


def _task_config(tokenizer: Tokenizer, framing: Framing) -> dict[str, Any]:
    """Return what a configuration says of specials beside bos, eos, unk and pad: the first spelling that there is."""
    if framing == "document":
        return {}
    # where a text has to say what is hidden, the mask and the sentinels are read in it
    config: dict[str, Any] = {"split_special_tokens": False, "add_bos_token": False}
    if framing == "spans":
        return config
    spellings = {"mask": MASK_PIECES, "cls": (*CLS_PIECES, "<s>"), "sep": (*SEP_PIECES, "</s>")}
    for name, pieces in spellings.items():
        found = next((piece for piece in pieces if find_piece(tokenizer, (piece,)) is not None), None)
        if found is not None:
            config[f"{name}_token"] = found
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return {**config, "model_input_names": names} if framing == "sentences" else config


def _control(model: SentencePieceModel, text: str) -> str:
    if text not in model.ids or model.pieces[model.ids[text]].kind != CONTROL:
        raise DataConfigError(f"the tokenizer has no control piece {text}; train one with `tokenizer train`")
    return text


def _tokenizer_config(model: SentencePieceModel, model_max_length: int) -> dict[str, Any]:
    specials = [
        number for number, piece in enumerate(model.pieces) if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    added = {
        str(number): {
            "content": model.pieces[number].text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": model.pieces[number].kind != USER_DEFINED,
        }
        for number in specials
    }
    eos = _control(model, "</s>")
    return {
        **_base_config(model_max_length),
        "bos_token": _control(model, "<s>"),
        "eos_token": eos,
        "unk_token": next(piece.text for piece in model.pieces if piece.kind == UNKNOWN),
        "pad_token": "<pad>" if "<pad>" in model.ids else eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
    }


def _named_config(settings: dict[str, Any], model_max_length: int) -> dict[str, Any]:
    """Return the configuration of a tokenizer whose specials are known by name."""
    names = {f"{name}_token": settings[name] for name in ("bos", "eos", "unk", "pad") if name in settings}
    config = {**_base_config(model_max_length), "pad_token": settings["eos"], **names}
    if TEMPLATE in settings:  # it writes special tokens as text
        config |= {TEMPLATE: settings[TEMPLATE], "split_special_tokens": False}
    return config


def _base_config(model_max_length: int) -> dict[str, Any]:
    return {
        # transformers takes tokenizer.json as it is under this name; under a model's own class it would rebuild it
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        # a literal "<s>" in a text is text, as it was in training
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
