"""`basestone finetune` in a worker: check everything, train, write."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import re
import sys
from typing import Any

from ...data.storage import new_directory
from ..errors import ConfigError
from ..hub.config_file import name_of, read_config
from .directory import directory_problems, next_token_problems, num_positions, stored_dtype
from .examples import (
    Conversation,
    label_problems,
    named_lines,
    parse_labelled,
    parse_sft,
    read_examples,
    split_tenth,
)
from .report import summary, tuned_card
from .settings import FinetuneSettings
from .tokens import Prepared, encode_labelled, encode_sft, longest

PACKAGES = ("transformers", "peft", "accelerate")


def finetune(settings: FinetuneSettings, *, as_json: bool) -> None:
    """Fine-tune, as one of the processes that were started for it; rank 0 speaks and writes.

    Raises:
        ConfigError: everything that is wrong with options, directory and data, before any long work.
        NumericsError: a loss or a weight is not finite.
        DataStorageError: the output cannot be written.
    """
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"finetune: needs {', '.join(lacking)}; `pip install 'basestone[downstream]'`")
    import torch

    from .. import runtime as processes

    on_cpu, num_processes = not torch.cuda.is_available(), processes.world_size()
    prepared, figures = prepare(settings, num_processes, on_cpu=on_cpu)
    if settings.zero and on_cpu:
        from ..engine import switch_off_shm_op

        switch_off_shm_op()
    # Elsewhere the Trainer would spread one process over all GPUs that it sees.
    alone = num_processes == 1 and not settings.zero and on_cpu
    if alone:
        processes.leave_launcher()
    else:
        processes.meet()
    speaks = alone or torch.distributed.get_rank() == 0
    _tune(settings, prepared, figures, num_processes=num_processes, on_cpu=on_cpu, speaks=speaks)
    if speaks:
        content = json.dumps(figures, indent=1, ensure_ascii=False)
        print(content if as_json else "\n".join(summary(settings, figures)), flush=True)
    if not alone:
        # The model's reducer goes before the group that it holds. Where it held it last, it would join the group's
        # threads under Python's lock, which one of them may wait for.
        gc.collect()
        torch.distributed.destroy_process_group()


def _tune(
    settings: FinetuneSettings,
    prepared: Prepared,
    figures: dict[str, Any],
    *,
    num_processes: int,
    on_cpu: bool,
    speaks: bool,
) -> None:
    """Train, and let the process that speaks write the directory and add to `figures`."""
    from .output import finish, write_model
    from .training import Tuning

    def say(text: str) -> None:
        if speaks:
            print(text, file=sys.stderr, flush=True)

    say(_beginning(settings, prepared, figures, num_processes))
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(new_directory(settings.out)) if speaks else settings.out.parent
        tuning = Tuning(settings, prepared, partial, num_processes=num_processes, on_cpu=on_cpu, say=say)
        outcome = tuning.run()
        weights = tuning.weights()
        if speaks:
            write_model(partial, tuning, weights, settings, prepared)
            figures |= {
                "heldout_before": outcome.before,
                "heldout": outcome.after,
                "losses": outcome.losses,
            }
            content = json.dumps(figures, indent=1, ensure_ascii=False)
            files = {"metrics.json": content.encode(), "README.md": tuned_card(settings, figures).encode()}
            finish(partial, settings.out, files)


def _beginning(
    settings: FinetuneSettings, prepared: Prepared, figures: dict[str, Any], num_processes: int
) -> str:
    way = "all weights" if settings.lora is None else f"LoRA of rank {settings.lora}"
    return (
        f"{settings.task} of {settings.source}, {way}: {len(prepared.train)} examples"
        f"{f' and {len(prepared.heldout)} held out' if prepared.heldout else ''}, at most "
        f"{figures['max_length']} tokens each; {settings.batch} a step = {num_processes} processes x "
        f"{settings.micro_batch_of(num_processes)} x {settings.accumulation_of(num_processes)}"
    )


def prepare(settings: FinetuneSettings, num_processes: int, *, on_cpu: bool) -> tuple[Prepared, dict[str, Any]]:
    """Check everything and encode the examples; give them, and the figures that are known by now.

    Raises:
        ConfigError: with all that is wrong, a line for each.
    """
    problems = settings.problems(num_processes, on_cpu=on_cpu) + _source_problems(settings)
    parse = parse_sft if settings.task == "sft" else parse_labelled
    train, wrong = read_examples(settings.data, parse)
    problems += wrong
    heldout: list[Any] = []
    if settings.heldout is not None:
        heldout, wrong = read_examples(settings.heldout, parse)
        problems += wrong
    labels: list[str] | None = None
    if settings.task == "classify":
        problems += label_problems(settings.heldout or settings.data, train, heldout)
        labels = sorted({example.label for example in train}, key=_label_order)
        if settings.heldout is None and not problems:
            train, heldout = split_tenth(train, settings.seed)
            if not heldout:
                problems.append(
                    f"{settings.data}: no class has ten examples, of which one could be held out; give --eval DATA"
                )
    _refuse(problems)
    tokenizer, max_length = _open_tokenizer(settings, [*train, *heldout])
    encoded, held = (
        encode_sft(examples, tokenizer, max_length)
        if labels is None
        else encode_labelled(examples, tokenizer, max_length, labels)
        for examples in (train, heldout)
    )
    wrong = named_lines(settings.data, encoded.wrong)
    _refuse(wrong + (named_lines(settings.heldout, held.wrong) if settings.heldout else []))
    figures = {
        "task": settings.task,
        "source": name_of(settings.source),
        "data": settings.data.name,
        "data_sha256": hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        "examples": len(encoded.rows),
        "cut": encoded.num_cut + held.num_cut,
        "max_length": max_length,
        "settings": settings.model_dump(mode="json", exclude={"source", "data", "out", "heldout"}),
        "num_processes": num_processes,
    }
    return Prepared(encoded.rows, held.rows, tokenizer, tokenizer.pad_token_id, labels), figures


def _source_problems(settings: FinetuneSettings) -> list[str]:
    """Say what is wrong with the directory; an adapter is written in fp32, whatever the weights are stored in."""
    if problems := directory_problems(settings.source):
        return problems
    if settings.task == "sft":
        problems += next_token_problems(settings.source)
    if not settings.keep_adapter:
        try:
            stored_dtype(settings.source)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _open_tokenizer(settings: FinetuneSettings, examples: list[Any]) -> tuple[Any, int]:
    """Load the directory's tokenizer, and the longest sequence; where it has no padding token the end serves."""
    from transformers import AutoTokenizer

    source = settings.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a dozen classes, by tokenizer
        raise ConfigError(f"finetune: the tokenizer of {source} cannot be loaded: {error}") from error
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append(
            f"{source}: its tokenizer has no end-of-sequence token; name one in tokenizer_config.json"
        )
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if talk := next((one for one in examples if isinstance(one, Conversation)), None):
        if tokenizer.chat_template is None:
            problems.append(
                f"{settings.data}: line {talk.line} has messages, and {source} has no chat template; "
                'give {"prompt", "answer"}'
            )
        elif tokenizer.split_special_tokens and _writes_specials(tokenizer):
            problems.append(
                f"{source}: its chat template writes special tokens, and its tokenizer would read them as text; "
                'set "split_special_tokens" to false in tokenizer_config.json'
            )
    positions = num_positions(read_config(source))
    max_length = longest(tokenizer, positions, settings.max_length)
    if positions is not None and max_length > positions:
        problems.append(f"--max-length {max_length}, but the model of {source} has {positions} positions")
    _refuse(problems)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, max_length


def _writes_specials(tokenizer: Any) -> bool:
    names = ("bos_token", "eos_token", *tokenizer.all_special_tokens)
    return any(name in str(tokenizer.chat_template) for name in names)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join([f"finetune: {problems[0]}", *problems[1:]]))


def _label_order(label: str) -> tuple[bool, int, str]:
    """Order whole numbers by value, before other labels."""
    number = re.fullmatch("-?[0-9]{1,18}", label) is not None
    return (not number, int(label) if number else 0, label)
