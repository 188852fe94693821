"""Examples for fine-tuning: a file of JSON lines, read and checked whole before anything else. Imports no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.order import hash_integers, permute_all

MOST_NAMED = 10  # lines of a file that one message names
SFT_FORMS = '{"prompt", "answer"}, {"messages"} or {"text"}'
SFT = "--task sft"
# keys that a form of lines has, or that say more of a message than is trained on
MEANT = (
    "prompt",
    "answer",
    "messages",
    "text",
    "text_pair",
    "label",
    "other",
    "score",
    "tool_calls",
    "function_call",
)
CLASSIFY_FORM = '{"text", "label"} with or without "text_pair"'


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer; the prompt is empty where the line gave a text alone."""

    line: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content; the last one, the assistant's, is the answer."""

    line: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class LabelledText:
    """A text, or two, and the class."""

    line: int
    text: str
    text_pair: str | None
    label: str


class LineError(ValueError):
    """What is wrong with one line."""


def read_examples(path: Path, parse: Callable[[int, dict[str, Any]], Any]) -> tuple[list[Any], list[str]]:
    """Read every line with `parse`; give the examples, and what is wrong, with line numbers.

    Empty lines are skipped. A file that cannot be read, or holds nothing, is a problem, too.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        return [], [f"{path} cannot be read ({error.strerror}); give a file of JSON lines"]
    examples: list[Any] = []
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(parse(number, _object(line)))
        except LineError as error:
            wrong.append((number, str(error)))
    if not examples and not wrong:
        return [], [f"{path} holds no examples"]
    return examples, named_lines(path, wrong)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # JSON may name half a character, which no tokenizer takes
    except RecursionError:
        raise LineError("is nested too deeply") from None
    except UnicodeEncodeError:
        raise LineError("has half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except ValueError:
        raise LineError("is no JSON") from None
    if not isinstance(value, dict):
        raise LineError("is no JSON object")
    return value


def named_lines(path: Path, wrong: Sequence[tuple[int, str]]) -> list[str]:
    """Say what is wrong with each line; beyond ten, how many more there are."""
    found = [f"{path}: line {number} {text}" for number, text in wrong[:MOST_NAMED]]
    if len(wrong) > MOST_NAMED:
        found.append(f"{path}: and {len(wrong) - MOST_NAMED} more lines")
    return found


def parse_sft(line: int, value: dict[str, Any]) -> Instruction | Conversation:
    """Read one line for --task sft. Raises LineError."""
    if "messages" in value:
        conversation = _conversation(line, value["messages"])
        only_keys(value, ("messages",), SFT, SFT_FORMS)
        return conversation
    if "prompt" in value or "answer" in value:
        prompt, answer = text_of(value, "prompt", SFT_FORMS), text_of(value, "answer", SFT_FORMS)
        if not answer.strip():
            raise LineError("has an empty answer")
        only_keys(value, ("prompt", "answer"), SFT, SFT_FORMS)
        return Instruction(line, prompt, answer)
    text = text_of(value, "text", SFT_FORMS)
    if not text.strip():
        raise LineError("has an empty text")
    only_keys(value, ("text",), SFT, SFT_FORMS)
    return Instruction(line, "", text)


def _conversation(line: int, messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise LineError('has no list of messages, each {"role", "content"}')
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise LineError('has a message that is not {"role": text, "content": text}')
        only_keys(message, ("role", "content"), SFT, '{"role", "content"}')
    if messages[-1]["role"] != "assistant":
        raise LineError(
            f'ends with a message of "{messages[-1]["role"]}"; the last one must be the assistant\'s'
        )
    if not messages[-1]["content"].strip():
        raise LineError("has an empty answer")
    if len(messages) < 2:
        raise LineError("has an answer alone; the messages before it are the prompt")
    return Conversation(line, tuple({key: m[key] for key in ("role", "content")} for m in messages))


def parse_labelled(line: int, value: dict[str, Any]) -> LabelledText:
    """Read one line for --task classify; a label is a text or a whole number. Raises LineError."""
    text = text_of(value, "text", CLASSIFY_FORM)
    pair = text_of(value, "text_pair", CLASSIFY_FORM) if "text_pair" in value else None
    if not text.strip():
        raise LineError("has an empty text")
    if "label" not in value:
        raise LineError(f'has no "label"; give {CLASSIFY_FORM}')
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise LineError(f"has the label {json.dumps(label)}; give a text or a whole number")
    only_keys(value, ("text", "text_pair", "label"), "--task classify", CLASSIFY_FORM)
    return LabelledText(line, text, pair, str(label))


def text_of(value: dict[str, Any], key: str, form: str) -> str:
    """Give the text under a key; `form` is what a line may be, for the message. Raises LineError."""
    if key not in value:
        raise LineError(f'has no "{key}"; give {form}')
    if not isinstance(value[key], str):
        raise LineError(f'has no text in "{key}" but {json.dumps(value[key])[:40]}')
    return value[key]


def only_keys(value: dict[str, Any], keys: Sequence[str], reader: str, form: str) -> None:
    """Refuse what another form means something by, which would be dropped without a word. Raises LineError.

    Other keys, such as `id`, may be there. `reader` and `form` are for the message.
    """
    if unread := [key for key in value if key in MEANT and key not in keys]:
        raise LineError(
            f"has the key {json.dumps(unread[0])}, which {reader} does not read; leave it out: give {form}"
        )


def label_problems(path: Path, train: Sequence[LabelledText], heldout: Sequence[LabelledText]) -> list[str]:
    """Say what the labels do not allow: one class alone, or held-out ones that training lacks."""
    known = {example.label for example in train}
    if len(known) < 2:
        return [f"every label is {json.dumps(min(known))}; classification needs two or more"] if known else []
    missing = sorted({example.label for example in heldout} - known)
    return [f"{path}: labels that the training data lacks: {', '.join(missing)}"] if missing else []


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Permute 0 .. count-1 by (seed, epoch) alone."""
    return permute_all(count, hash_integers(seed, epoch)).tolist()


def split_tenth(examples: Sequence[LabelledText], seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Hold out a tenth of every class, rounded down; give (training, held out), each in the file's order."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index in shuffled(len(examples), seed, 0):
        by_label[examples[index].label].append(index)
    out = {index for indices in by_label.values() for index in indices[: len(indices) // 10]}
    return (
        [example for index, example in enumerate(examples) if index not in out],
        [example for index, example in enumerate(examples) if index in out],
    )
