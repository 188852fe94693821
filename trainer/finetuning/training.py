"""Fine-tuning through transformers' Trainer and PEFT, plainly or under DeepSpeed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..ds_config import finetune_config
from ..errors import ConfigError, NumericsError
from ..hub.config_file import read_config
from ..runtime import announce_deepspeed
from .examples import shuffled
from .scores import classification_scores
from .settings import FinetuneSettings
from .tokens import IGNORED, Prepared

NUM_PROGRESS_LINES = 20
HEAD_NAMES = {"score", "classifier", "pre_classifier", "classification_head", "pooler"}


@dataclass
class Outcome:
    """What came of it: (step, loss) of every step, and what the held-out rows gave before and after."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


class InOrder(torch.utils.data.Dataset):
    """Rows in the order in which they are trained on: permutation after permutation, whole batches alone.

    So the examples of a step depend on (seed, step) and on no number of processes; the last batch goes on into the
    next permutation.
    """

    def __init__(self, rows: list[dict[str, Any]], *, num_examples: int, seed: int) -> None:
        """Take `num_examples` rows in all."""
        self.rows = rows
        epochs = range(-(-num_examples // len(rows)))
        order = [index for epoch in epochs for index in shuffled(len(rows), seed, epoch + 1)]
        self.order = order[:num_examples]

    def __len__(self) -> int:
        """Count the examples of all steps."""
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Give the example of a place in the order."""
        return self.rows[self.order[place]]


class OrderedTrainer(Trainer):
    """transformers' Trainer, over a dataset that is in order already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)


class Progress(TrainerCallback):
    """Keep every step's loss, and print a line now and then on rank 0."""

    def __init__(self, outcome: Outcome, num_steps: int, say: Callable[[str], None]) -> None:
        """Write into `outcome`."""
        self._outcome, self._num_steps, self._say = outcome, num_steps, say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take what the Trainer logs: once a step."""
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        self._outcome.losses.append((step, loss))
        if not loss < float("inf"):
            raise NumericsError(f"finetune: the loss of step {step} is {loss}; lower --lr, or look at the data")
        if step in (1, self._num_steps) or step % max(1, self._num_steps // NUM_PROGRESS_LINES) == 0:
            self._say(f"step {step}/{self._num_steps}  loss {loss:.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Keep what an untouched model gives."""
        if state.global_step == 0:
            self._outcome.before = _own_metrics(metrics)


def num_steps_of(settings: FinetuneSettings, num_rows: int) -> int:
    """Count the steps: as asked, else whole epochs, rounded up to whole batches."""
    return settings.steps or -(-settings.epochs * num_rows // settings.batch)


class Tuning:
    """A model under transformers' Trainer: train it, measure it, and collect its weights on rank 0."""

    def __init__(
        self,
        settings: FinetuneSettings,
        prepared: Prepared,
        scratch: Path,
        *,
        num_processes: int,
        on_cpu: bool,
        say: Callable[[str], None],
    ) -> None:
        """Load the model and wrap it; `scratch` is where the Trainer would write, which it does not."""
        self.settings, self.prepared, self.outcome = settings, prepared, Outcome()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        num_steps = num_steps_of(settings, len(prepared.train))
        # DeepSpeed's stage 3 cuts the model while it is loaded, and learns of it from these arguments.
        self._arguments = _arguments(settings, prepared, scratch, num_steps, num_processes, on_cpu)
        transformers.set_seed(settings.seed)
        model = load_model(settings, prepared)
        self.architecture = type(model).__name__
        if settings.lora is not None:
            model = with_adapter(model, settings)
        model.config.use_cache = False
        self.trainer = OrderedTrainer(
            model=model,
            args=self._arguments,
            data_collator=collator(prepared),
            train_dataset=InOrder(prepared.train, num_examples=num_steps * settings.batch, seed=settings.seed),
            eval_dataset=prepared.heldout or None,
            compute_loss_func=_class_loss if prepared.labels is not None else _token_loss,
            preprocess_logits_for_metrics=_predicted_class if prepared.labels is not None else _answer_sums,
            compute_metrics=functools.partial(_metrics, labels=prepared.labels),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Progress(self.outcome, num_steps, say))

    def run(self) -> Outcome:
        """Train to the end, and measure the held-out rows."""
        self.trainer.train()
        if self.prepared.heldout:
            self.outcome.after = _own_metrics(self.trainer.evaluate())
        return self.outcome

    def weights(self) -> dict[str, Tensor]:
        """Collect the trained weights by the names of the model in memory; every rank calls, rank 0 gets all."""
        return self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)

    @property
    def model(self) -> Any:
        """Give the model itself, without what wraps it."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)


def load_model(settings: FinetuneSettings, prepared: Prepared) -> Any:
    """Load the directory in fp32; only a classification's head may be new.

    Raises:
        ConfigError: transformers has no such class, or the weights are not whole.
    """
    common: dict[str, Any] = {
        "dtype": torch.float32,
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    try:
        if prepared.labels is None:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(settings.source, **common)
        else:
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                settings.source, num_labels=len(prepared.labels), ignore_mismatched_sizes=True, **common
            )
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"finetune: transformers cannot load {settings.source} for {settings.task}: {first}"
        ) from error
    model, info = loaded
    model.config.pad_token_id = prepared.pad_id
    mismatched = [name[0] if isinstance(name, tuple) else name for name in info["mismatched_keys"]]
    lacking = sorted({*map(str, info["missing_keys"]), *map(str, mismatched)})
    if prepared.labels is not None:
        lacking = [name for name in lacking if not HEAD_NAMES & set(name.split("."))]
    if lacking:
        raise ConfigError(
            f"finetune: {settings.source} lacks {len(lacking)} weights of the shape that config.json says, the first "
            f"{lacking[0]}; export it again, or copy all of its files"
        )
    return model


def with_adapter(model: Any, settings: FinetuneSettings) -> Any:
    """Put a LoRA adapter on every linear layer but the output's, twice the rank as its alpha."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    assert settings.lora is not None
    adapter = LoraConfig(
        r=settings.lora,
        lora_alpha=2 * settings.lora,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM if settings.task == "sft" else TaskType.SEQ_CLS,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, adapter)


def has_experts(source: Path) -> bool:
    """Tell whether a step may leave weights of the model without a gradient."""
    return any("expert" in key for key in read_config(source))


def collator(prepared: Prepared) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Give what pads rows to the longest of a batch, on the right; padding counts for nothing in the loss."""
    if prepared.labels is None:
        return transformers.DataCollatorForSeq2Seq(prepared.tokenizer, label_pad_token_id=IGNORED)
    return transformers.DataCollatorWithPadding(prepared.tokenizer)


def _arguments(
    settings: FinetuneSettings,
    prepared: Prepared,
    scratch: Path,
    num_steps: int,
    num_processes: int,
    on_cpu: bool,
) -> TrainingArguments:
    micro_batch = settings.micro_batch_of(num_processes)
    accumulation = settings.accumulation_of(num_processes)
    under_deepspeed: dict[str, Any] = {}
    if settings.zero:
        under_deepspeed = {"deepspeed": finetune_config(settings.zero, accumulates=accumulation > 1)}
    if settings.zero and on_cpu:
        # By itself accelerate knows of no backend here, and would take every rank for the only one.
        announce_deepspeed()
        PartialState(backend="gloo")
        under_deepspeed["accelerator_config"] = {"use_configured_state": True}
    return TrainingArguments(
        output_dir=str(scratch),
        use_cpu=on_cpu and not settings.zero,
        bf16=settings.dtype == "bf16" or (settings.dtype is None and not on_cpu),
        max_steps=num_steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=int(settings.warmup * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_on_start=bool(prepared.heldout) and prepared.labels is None,
        eval_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=has_experts(settings.source),
        **under_deepspeed,
    )


def _token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Give the mean over the answer tokens of the whole step, on all ranks; labels [batch, sequence]."""
    total = cross_entropy(
        outputs["logits"][:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORED).sum())


def _class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Give the mean over the examples of the whole step, on all ranks; labels [batch]."""
    total = cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else labels.numel())


def _answer_sums(logits: Any, labels: Tensor) -> Tensor:
    """Give [batch, 2]: each row's summed loss in nats, and the tokens that count."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
    )
    return torch.stack([losses.double().sum(1), (targets != IGNORED).sum(1).double()], dim=1)


def _predicted_class(logits: Any, labels: Tensor) -> Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def _metrics(evaluation: Any, labels: list[str] | None) -> dict[str, Any]:
    """Make the held-out figures of what all ranks gave: a loss over answer tokens, or a classification's scores."""
    if labels is None:
        loss, tokens = evaluation.predictions.sum(axis=0)
        return {"own": {"loss": float(loss / tokens), "tokens": int(tokens)}}
    scores = classification_scores(evaluation.label_ids.tolist(), evaluation.predictions.tolist(), labels)
    return {"own": scores}


def _own_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics["eval_own"]
