"""Find out what kind of tokenizer a path holds, and read all of it that decides ids.

| kind | given as | beside it |
|---|---|---|
| sentencepiece | a .model file | |
| huggingface | tokenizer.json, or the directory that holds it | tokenizer_config.json, special_tokens_map.json |
| tiktoken | a file of ranks (.tiktoken) | |

For the last two FILE.toml beside the file may name ``bos``, ``eos``, ``pad``, ``unk``; for tiktoken also ``preset``, or
``pattern`` and ``specials``. All of it together can be written as one file, which is read like any other.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DataConfigError
from .tiktoken_ranks import check_specials, complete_ranks, is_rank_file, parse_ranks

SENTENCEPIECE, HUGGINGFACE, TIKTOKEN = "sentencepiece", "huggingface", "tiktoken"
WHOLE_KEY, WHOLE_VERSION = "basestone_tokenizer", 1
TEMPLATE = "chat_template"  # decides no ids, and is handed on
NAMES = ("bos", "eos", "pad", "unk")
NAME_KEYS: dict[str, type] = dict.fromkeys(NAMES, str)
SIDECAR_KEYS: dict[str, dict[str, type]] = {
    HUGGINGFACE: {**NAME_KEYS, TEMPLATE: str},
    TIKTOKEN: {**NAME_KEYS, "preset": str, "pattern": str, "specials": dict},
}


@dataclass(frozen=True)
class TokenizerFile:
    """Hold a tokenizer as it was read: its main file's bytes, and what stands beside it, resolved."""

    path: Path
    kind: str
    content: bytes
    settings: dict[str, Any] = field(default_factory=dict)

    def deciding(self) -> bytes:
        """Return what decides ids, for a fingerprint."""
        settings = {key: value for key, value in self.settings.items() if key != TEMPLATE}
        return replace(self, settings=settings).whole()

    def whole(self) -> bytes:
        """Return everything as one file; a SentencePiece model is its own."""
        if self.kind == SENTENCEPIECE:
            return self.content
        parts = {
            WHOLE_KEY: WHOLE_VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "content": self.content.decode(),
        }
        return (json.dumps(parts, ensure_ascii=False, sort_keys=True, indent=0) + "\n").encode()


def read_tokenizer_file(path: Path) -> TokenizerFile:
    """Read a tokenizer. Raises DataConfigError where it is not there or does not say what it must."""
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataConfigError(
                f"tokenizer {path} is a directory without tokenizer.json; give one that holds it, or a tokenizer's file"
            )
        path = path / "tokenizer.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataConfigError(
            f"tokenizer {path} cannot be read ({error.strerror}); train one with `tokenizer train`"
        ) from error
    if content.startswith(b"{"):
        return _read_json(path, content)
    if is_rank_file(path, content):
        settings = complete_ranks(parse_ranks(content, path), path, _read_sidecar(path, TIKTOKEN))
        return TokenizerFile(path, TIKTOKEN, content, settings)
    return TokenizerFile(path, SENTENCEPIECE, content)


def _read_json(path: Path, content: bytes) -> TokenizerFile:
    try:
        definition = json.loads(content)
        if WHOLE_KEY in definition:
            if definition[WHOLE_KEY] != WHOLE_VERSION:
                raise DataConfigError(
                    f"tokenizer {path} has format {definition[WHOLE_KEY]!r}, this version reads {WHOLE_VERSION}; "
                    "use the version that wrote it"
                )
            return _read_whole(path, definition)
        if not isinstance(definition["model"], dict):
            raise TypeError("model")
    except DataConfigError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataConfigError(
            f"tokenizer {path} is JSON, and no tokenizer.json; give the one that `tokenizers` wrote"
        ) from error
    beside: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside |= _named_specials(path.parent / name)
    beside |= _chat_template(path.parent)
    return TokenizerFile(path, HUGGINGFACE, content, beside | _read_sidecar(path, HUGGINGFACE))


def _read_whole(path: Path, parts: dict[str, Any]) -> TokenizerFile:
    """Take up what ``TokenizerFile.whole`` wrote; raises KeyError, TypeError or ValueError where it is damaged."""
    kind, settings = parts["kind"], parts["settings"]
    known = SIDECAR_KEYS[kind]
    if not all(isinstance(value, known[key]) for key, value in settings.items()):
        raise TypeError("settings")
    content = parts["content"].encode()
    if kind == TIKTOKEN:
        if "pattern" not in settings:
            raise KeyError("pattern")
        check_specials(settings["specials"], parse_ranks(content, path), path)
    return TokenizerFile(path, kind, content, settings)


def _named_specials(path: Path) -> dict[str, str]:
    """Return the pieces that a Hugging Face configuration names as bos, eos, pad and unk."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
        found = {name: config.get(f"{name}_token") for name in NAMES}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise DataConfigError(
            f"{path} cannot be read as a configuration; correct it or take it away"
        ) from error
    pieces = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: piece for name, piece in pieces.items() if isinstance(piece, str)}


def _chat_template(directory: Path) -> dict[str, str]:
    """Return the template of conversations, which versions of transformers write into one of two places."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    template = None
    if file.is_file():
        template = file.read_text(encoding="utf-8", errors="replace")
    elif config.is_file():
        template = json.loads(config.read_bytes()).get(TEMPLATE)  # it was read for its names before
    return {TEMPLATE: template} if isinstance(template, str) else {}


def _read_sidecar(path: Path, kind: str) -> dict[str, Any]:
    sidecar = path.with_name(f"{path.name}.toml")
    if not sidecar.exists():
        return {}
    try:
        given = tomllib.loads(sidecar.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataConfigError(f"{sidecar} cannot be read: {error}; correct it") from error
    known = SIDECAR_KEYS[kind]
    for key, value in given.items():
        if key not in known or not isinstance(value, known[key]):
            wanted = ", ".join(f"{name} ({form.__name__})" for name, form in known.items())
            raise DataConfigError(f"{sidecar}: got {key} = {value!r}; the keys are {wanted}")
    return given
