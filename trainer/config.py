"""The run file as typed, frozen sections, and the one place that derives numbers from it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.config import DataConfig, ReadingConfig, TaskConfig
from ..data.division import num_lanes, samples_per_reader
from ..data.errors import DataConfigError
from ..data.tasks.spans import SpanRates, raw_length
from ..model.config import ModelConfig
from ..model.families import task_name, trained_on
from ..model.pipeline import pipeline_problems
from .errors import ConfigError
from .ramp import BatchSchedule
from .sections import (
    OFFLOAD_STAGES,
    BudgetSection,
    CheckpointSection,
    EvaluateSection,
    ExportSection,
    MeterSection,
    OptimizerSection,
    ParallelSection,
    ProfileSection,
    RampPhase,
    RunSection,
    ScheduleSection,
    Section,
    TrainSection,
)


class RunConfig(Section):
    """A whole run file."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig
    task: TaskConfig = TaskConfig()
    reading: ReadingConfig = ReadingConfig()
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    meter: MeterSection = MeterSection()
    budget: BudgetSection = BudgetSection()
    profile: ProfileSection = ProfileSection()

    def resolve(self, world_size: int, vocab_size: int) -> ResolvedRun:
        """Derive everything that follows from the world size and the tokenizer's vocabulary.

        Raises:
            ConfigError: with every violated rule in one message.
        """
        problems: list[str] = []
        parallel, train = self.parallel, self.train
        model = self.model
        if model.vocab_size is None:
            model = ModelConfig(**{**model.model_dump(), "vocab_size": vocab_size})
        elif model.vocab_size < vocab_size:
            problems.append(
                f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
                "leave it out to take the tokenizer's"
            )
        problems += model.layout_problems(parallel.tensor)
        problems += pipeline_problems(
            model.total_layers,
            parallel.pipeline,
            parallel.virtual_pipeline,
            parallel.pipeline_layers,
            key="model.num_layers" + (" + model.num_decoder_layers" if model.num_decoder_layers else ""),
        )
        problems += self._problems() + self._length_problems() + self._offload_problems()
        task = self.filled_task
        problems += _task_problems(model, task)
        ranks = parallel.tensor * parallel.pipeline
        if world_size % ranks:
            problems.append(
                f"{world_size} processes cannot be cut into groups of parallel.tensor x parallel.pipeline = "
                f"{parallel.tensor} x {parallel.pipeline}; start a multiple of {ranks}"
            )
        if self.profile.first_step is not None and (last := max(self.profile.ranks)) >= world_size:
            problems.append(
                f"profile.ranks names rank {last}; the {world_size} processes are ranks 0 to {world_size - 1}"
            )
        dp = max(1, world_size // ranks)
        batches = self.schedule_batches(())
        try:
            batches = self.schedule_batches(train.ramp)
        except ValueError as error:
            problems.append(str(error))
        sizes = sorted({phase.global_batch for phase in batches.phases})
        lanes = self.data.lanes or num_lanes(*sizes)
        problems += self._lane_problems(sizes, dp, lanes)
        if not any(size % lanes for size in sizes):
            for global_batch in sizes:
                problems += self._batch_problems(global_batch, dp, lanes)
        mix_ends: tuple[int, ...] = ()
        try:
            mix_ends = batches.mix_ends(self.data.mix)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return ResolvedRun(
            run=self.model_copy(update={"model": model, "task": task}),
            world_size=world_size,
            data_parallel=dp,
            batches=batches,
            lanes=lanes,
            mix_ends=mix_ends,
            steps=train.steps or batches.steps_for(train.tokens or 0),
        )

    def schedule_batches(self, ramp: tuple[RampPhase, ...]) -> BatchSchedule:
        """Say what each step takes, pairs of texts being two sequences; raises as `BatchSchedule.of`."""
        train, texts = self.train, self.model.texts_per_sample
        return BatchSchedule.of(ramp, train.global_batch, self.data.sequence_length, texts)

    @property
    def filled_task(self) -> TaskConfig:
        """Give the task with what it leaves to the model."""
        task, model = self.task, self.model
        task = task.model_copy(update={"name": task.name or task_name(model)})
        if task.name == "masked" and task.next_sentence is None:
            task = task.model_copy(update={"next_sentence": model.next_sentence})
        return task

    @property
    def lengths(self) -> dict[str, int]:
        """Give the sequence lengths that the run has, the last and longest first, each by the key it stands under."""
        lengths = {"data.sequence_length": self.data.sequence_length}
        for number, row in enumerate(self.train.ramp):
            if row.sequence_length is not None:
                lengths[f"train.ramp[{number}].sequence_length"] = row.sequence_length
        return lengths

    def target_length(self, sequence_length: int) -> int:
        """Targets of a sequence, where a decoder has them beside the inputs of an encoder; else 0.

        Raises:
            DataConfigError: sequences are too short for any.
        """
        if (task := self.filled_task).name != "spans":
            return 0
        return raw_length(sequence_length, SpanRates(task.noise, task.mean_span))[1]

    def _length_problems(self) -> list[str]:
        """Check every length that the run has."""
        longest, most = self.data.sequence_length, self.model.max_sequence_length
        problems, before = [], 0
        if longest > most:
            problems.append(
                f"data.sequence_length = {longest} exceeds model.max_sequence_length = {most}; lower the first or "
                "raise the second"
            )
        for number, row in enumerate(self.train.ramp):
            length, given = row.sequence_length or longest, f"train.ramp[{number}].sequence_length"
            if length > longest:
                problems.append(
                    f"{given} = {length} exceeds data.sequence_length = {longest}, the run's longest; lower the first "
                    "or raise the second"
                )
            elif length < before:
                problems.append(
                    f"{given} = {length} is less than the {before} before it; lengths may only grow"
                )
            before = min(length, longest)
        parallel = self.parallel
        for key, length in self.lengths.items():
            if parallel.sequence and length % parallel.tensor:
                problems.append(
                    f"parallel.sequence = true needs {key} = {length} to be a multiple of parallel.tensor = "
                    f"{parallel.tensor}"
                )
            problems += self._target_problems(key, length)
        return problems

    def _target_problems(self, key: str, length: int) -> list[str]:
        """Check the targets of a sequence; what sequence parallel needs names the nearest legal lengths."""
        tensor = self.parallel.tensor
        try:
            targets = self.target_length(length)
        except DataConfigError as error:
            return [f"{key} = {length}: {error}"]
        if not self.parallel.sequence or targets % tensor == 0:
            return []

        def fits(other: int) -> bool:
            return self.target_length(other) % tensor == 0

        longest = self.data.sequence_length
        least, most = 2 * tensor, 1 + (self.model.max_sequence_length if length == longest else longest)
        below = next((other for other in range(length // tensor * tensor, least, -tensor) if fits(other)), None)
        above = next(
            (other for other in range(-(-length // tensor) * tensor, most, tensor) if fits(other)), None
        )
        near = " or ".join(str(other) for other in (below, above) if other is not None)
        return [
            f"parallel.sequence = true needs the {targets} targets of {key} = {length} to be a multiple "
            f"of parallel.tensor = {tensor}; set "
            + (f"{key} = {near}, or " if near else "")
            + "parallel.sequence = false"
        ]

    def _lane_problems(self, sizes: list[int], dp: int, lanes: int) -> list[str]:
        """Check that the lanes divide every batch, and feed every data-parallel rank."""
        if uneven := [size for size in sizes if size % lanes]:
            return [
                f"data.lanes = {lanes} does not divide the global batch {uneven[0]}; take a divisor of "
                f"{' and '.join(map(str, sizes))}"
            ]
        if lanes >= dp or dp > sizes[0]:
            return []
        common = math.gcd(*sizes)
        if common >= dp:
            enough = min(count for count in range(dp, common + 1) if common % count == 0)
            return [
                f"the data is dealt into {lanes} lanes, and there are {dp} data-parallel ranks, of which some would "
                f"have none; set data.lanes = {enough}, or more for more ranks later (it is fixed once a run has begun)"
            ]
        return [
            f"the global batch(es) {', '.join(map(str, sizes))} have {common} as their largest common divisor, "
            f"fewer than the {dp} data-parallel ranks, which share data by it: some would have none; "
            f"take multiples of {dp}"
        ]

    def _batch_problems(self, global_batch: int, dp: int, lanes: int) -> list[str]:
        """Check that a global batch gives every rank something, and the interleaved schedule what it can take."""
        parallel, train = self.parallel, self.train
        if dp > global_batch:
            return [
                f"{self._batch_name(global_batch)} is smaller than the {dp} data-parallel ranks; "
                "raise it or start fewer processes"
            ]
        count = -(-samples_per_reader(global_batch, dp, lanes) // train.micro_batch)
        if parallel.virtual_pipeline == 1 or count % parallel.pipeline == 0:  # 1F1B takes any number
            return []
        a_rank = parallel.pipeline * -(-count // parallel.pipeline)
        return [
            f"parallel.virtual_pipeline > 1 takes a multiple of parallel.pipeline = {parallel.pipeline} micro-batches "
            f"a step; {self._batch_name(global_batch)} in micro-batches of {train.micro_batch} on {dp} "
            f"data-parallel rank(s) makes {count}; a batch of {train.micro_batch * dp * a_rank} would do"
        ]

    def _batch_name(self, global_batch: int) -> str:
        """Give the key that a batch stands under, and the batch."""
        own = global_batch == self.train.global_batch
        return f"train.{'' if own else 'ramp: '}global_batch = {global_batch}"

    def _problems(self) -> list[str]:
        """Check the rules that join two sections and need no world size."""
        parallel, problems = self.parallel, []
        if parallel.sequence and parallel.tensor == 1:
            problems.append("parallel.sequence = true needs parallel.tensor > 1; set it to false")
        saves, evaluations = self.checkpoint, self.evaluate.every_steps
        if saves.keep_best and not (
            self.data.heldout and evaluations and saves.every_steps and saves.every_steps % evaluations == 0
        ):
            problems.append(
                f"checkpoint.keep_best = {saves.keep_best} needs a held-out loss at every save: data.heldout, "
                f"checkpoint.every_steps and evaluate.every_steps that divides it, got {saves.every_steps} and "
                f"{evaluations}"
            )
        if self.budget.cost is not None and self.meter.price_per_kwh is self.meter.price_per_gpu_hour is None:
            problems.append(
                "budget.cost needs a price; set meter.price_per_kwh, meter.price_per_gpu_hour or both"
            )
        if parallel.zero == 0 and self.train.dtype != "fp32":
            problems.append(
                f"parallel.zero = 0 accumulates {self.train.dtype} gradients without fp32 masters; "
                "set parallel.zero = 1 (it costs nothing more on one data-parallel rank) or train.dtype = 'fp32'"
            )
        return problems

    def _offload_problems(self) -> list[str]:
        """Check what offload goes with; each message names the nearest legal setting."""
        parallel, problems = self.parallel, []
        given, least = f'parallel.offload = "{parallel.offload}"', OFFLOAD_STAGES[parallel.offload]
        if parallel.zero < least:
            problems.append(
                f"{given} needs parallel.zero {'= 3' if least == 3 else '>= 2'}, got {parallel.zero}; "
                f"set parallel.zero = {least}"
            )
        if parallel.offload == "nvme" and parallel.nvme_path is None:
            problems.append(
                f"{given} needs parallel.nvme_path, a directory on a local disk; "
                'name one, or set parallel.offload = "cpu"'
            )
        if parallel.offload == "nvme" and self.checkpoint.asynchronous:
            problems.append(
                f"checkpoint.asynchronous = true copies to host memory what {given} put into files; leave it out"
            )
        if parallel.offload != "nvme" and parallel.nvme_path is not None:
            problems.append(
                f'parallel.nvme_path is for parallel.offload = "nvme", got "{parallel.offload}"; take one of them out'
            )
        if parallel.offload == "none":
            return problems
        if parallel.ds_config is not None:
            problems.append(
                f"{given} chooses a DeepSpeed file, and parallel.ds_config names one; "
                'set parallel.offload = "none" and put the offload sections into that file'
            )
        if parallel.pipeline > 1:
            tensor = parallel.tensor * parallel.pipeline
            more = (
                ""
                if self.model.layout_problems(tensor)
                else f" (parallel.tensor = {tensor} takes as many ranks)"
            )
            problems.append(
                f"{given} needs parallel.pipeline = 1, got {parallel.pipeline}: several stages keep whole gradients on "
                f"the device until one reduction a step; set parallel.pipeline = 1 with more tensor parallel{more}, or "
                'parallel.offload = "none"'
            )
        return problems


def _task_problems(model: ModelConfig, task: TaskConfig) -> list[str]:
    """Check that the model has what its task trains."""
    usual, name = task_name(model), task.name or ""
    keys, theirs = (["name"], name) if name != usual else task.misplaced(usual) or ([], usual)
    problems = []
    if keys:
        which = f"family '{model.family}'{'' if model.pooling is None else ' with model.pooling'}"
        problems.append(
            f"task.{', task.'.join(keys)}: of task '{theirs}', and {which} is trained on '{usual}'; leave it out, or "
            f"train {trained_on(theirs)}"
        )
    if name == usual and bool(task.next_sentence) != model.next_sentence:
        given = str(task.next_sentence).lower()
        problems.append(
            f"task.next_sentence = {given} and model.next_sentence = {str(model.next_sentence).lower()}: the model has "
            "a head for what the task makes, or neither; leave the first out"
        )
    return problems


@dataclass(frozen=True)
class ResolvedRun:
    """A run with everything derived: `run.model.vocab_size` is set, the layout factors, the steps are known."""

    run: RunConfig
    world_size: int
    data_parallel: int
    batches: BatchSchedule
    lanes: int
    mix_ends: tuple[int, ...]  # the first samples that the rows of data.mix no longer rule
    steps: int

    @property
    def parts(self) -> dict[str, str]:
        """Give the parts of the loss, each with the field that says which of its predictions count."""
        return self.run.task.parts

    @property
    def target_length(self) -> int:
        """Targets of the longest sequence, where a decoder has them beside the inputs of an encoder; else 0."""
        return self.run.target_length(self.run.data.sequence_length)

    def num_predicted(self, sequence_length: int) -> float:
        """Give the predictions of a sequence where not every token is one, as FLOPs count them."""
        task = self.run.task
        if task.name != "masked":
            return self.run.target_length(sequence_length)
        predicted = task.predicted * sequence_length
        return min(predicted, task.max_predictions or predicted)

    @property
    def saves_asynchronously(self) -> bool:
        """Tell whether checkpoints are written from a copy, which memory that was offloaded would not hold."""
        wanted = self.run.checkpoint.asynchronous
        return self.run.parallel.offload == "none" if wanted is None else wanted

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.batches.tokens_before(self.steps)

    def samples_per_rank(self, global_batch: int) -> int:
        """Samples that a data-parallel rank gets of a global batch; some have weight zero where it does not divide."""
        return samples_per_reader(global_batch, self.data_parallel, self.lanes)

    def num_micro_batches(self, global_batch: int) -> int:
        """Forwards of a rank in a step; the last one is filled up with samples of weight zero."""
        return -(-self.samples_per_rank(global_batch) // self.run.train.micro_batch)

    @property
    def most_micro_batches(self) -> int:
        """Forwards of a rank in the largest step of the run."""
        return max(self.num_micro_batches(phase.global_batch) for phase in self.batches.phases)
