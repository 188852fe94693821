"""From examples to token ids and labels, with the tokenizer of the directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .examples import Conversation, Instruction, LabelledText

IGNORED = -100  # a label that counts for nothing, in torch and transformers
NO_LIMIT = 1_000_000_000  # where a tokenizer knows no longest text, transformers gives a number far above


@dataclass(frozen=True)
class Encoded:
    """Rows for a collator: what the model takes, and `labels`; how many were cut; what cannot be."""

    rows: list[dict[str, Any]]
    num_cut: int
    wrong: list[tuple[int, str]]


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs: rows of token ids, the tokenizer, and for a classification its labels."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    tokenizer: Any
    pad_id: int
    labels: list[str] | None


def longest(tokenizer: Any, num_positions: int | None, wanted: int | None) -> int:
    """Give the longest sequence: what was wanted, else what the model and its tokenizer say they take."""
    limits = [wanted] if wanted else [num_positions, tokenizer.model_max_length]
    return min(limit for limit in [*limits, NO_LIMIT] if limit)


def encode_sft(examples: Sequence[Instruction | Conversation], tokenizer: Any, max_length: int) -> Encoded:
    """Encode prompts and answers apart, as prompts come alone later; only the answer and its end are labels.

    The end-of-sequence token follows the answer. An answer that does not fit is cut, without an end; a prompt that
    leaves no room for one token is wrong.
    """
    from jinja2 import TemplateError

    rows, num_cut, wrong = [], 0, []
    for example in examples:
        try:
            prompt, answer = _halves(example, tokenizer)
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
        ) as error:  # a template is a program
            wrong.append((example.line, f"does not go with the chat template: {error}"))
            continue
        if len(prompt) >= max_length:
            wrong.append(
                (
                    example.line,
                    f"has a prompt of {len(prompt)} tokens, and {max_length} hold prompt and answer; shorten it",
                )
            )
            continue
        ids = [*prompt, *answer]
        num_cut += len(ids) > max_length
        labels = [*([IGNORED] * len(prompt)), *answer]
        if not prompt:
            labels[0] = IGNORED  # nothing predicts the first token
        ids, labels = ids[:max_length], labels[:max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Encoded(rows, num_cut, wrong)


def _halves(example: Instruction | Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token_id
    if isinstance(example, Instruction):
        prompt = list(tokenizer(example.prompt)["input_ids"])
        while prompt and prompt[-1] == end and len(prompt) > 1:  # some tokenizers end every text
            prompt.pop()
        answer = example.answer
    else:
        messages = list(example.messages)
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        answer = whole.removeprefix(before) if whole.startswith(before) else messages[-1]["content"]
        prompt = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if end in ids:
        last = len(ids) - 1 - ids[::-1].index(end)
        if not tokenizer.decode(ids[last + 1 :]).strip():  # templates put a line break after the end
            return prompt, ids[: last + 1]
    return prompt, [*ids, end]


def encode_labelled(
    examples: Sequence[LabelledText], tokenizer: Any, max_length: int, labels: Sequence[str]
) -> Encoded:
    """Encode texts or pairs as the tokenizer does for its users, cut at `max_length`."""
    ids_of = {label: index for index, label in enumerate(labels)}
    rows, num_cut = [], 0
    for example in examples:
        encoded = tokenizer(example.text, example.text_pair)
        if len(encoded["input_ids"]) > max_length:
            num_cut += 1
            encoded = tokenizer(example.text, example.text_pair, truncation=True, max_length=max_length)
        inputs = {name: list(encoded[name]) for name in tokenizer.model_input_names if name in encoded}
        rows.append({**inputs, "labels": ids_of[example.label]})
    return Encoded(rows, num_cut, [])
