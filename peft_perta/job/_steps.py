"""The steps of a job. Each writes one directory or file of its name into the output, by the functions that the single
commands use: what `peft-perta forget`, `train`, `unlearn`, `refine`, `calibrate` and `extrapolate` would write there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters import EmittedAdapter, PerTAProvenance, extrapolate_adapter, load_emitted
from ..data import SELF, note, read_rows, write_file
from ..errors import NumericalError
from ..evaluation import TOLERANCE, Calibration, Goal, calibrate, own_rows
from ..gradients import remove_checkpoint
from ..html_report import PICTURE_NAME, draw_calibration
from ..perta import get_perta_state_dict, refine_adapter
from ..training import (
    LoraSettings,
    UnlearningSettings,
    evaluation_arguments,
    train_forget_adapter,
    train_unlearning,
)
from ._workshop import ADAPTER, Rows, Workshop
from .recipe import Recipe, Schedule, part_of

OWN_ROWS, BEFORE, FORGET_ADAPTER = "retain.jsonl", "before.json", "forget_adapter"
TRAINED, UNLEARNED, REFINED = "trained", "unlearned", "refined"


@dataclass(frozen=True)
class Step:
    """One step of a job.

    Attributes:
        name: of what it writes into the output.
        what: what it does, in a few words.
        run: does it.
        settings: the keys of the recipe that it depends on, beside the model and the rows; ``section.key`` for one of
            a section.
        needs: the steps whose output it reads.
        after: the workshop of the steps that come after it.
    """

    name: str
    what: str
    run: Callable[[Workshop], None]
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: Callable[[Workshop], Workshop] = lambda workshop: workshop


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps up to the adapter, in their order."""
    steps = [Step(BEFORE, "measure the models as they are", measure_before, ("judging.rows", "target_forget_loss"))]
    made: tuple[str, ...] = ()
    if recipe.forget_training is not None:
        made = (FORGET_ADAPTER,)
        steps.append(Step(*made, "train the forget adapter", _train_forget_adapter, ("forget_training", "seed")))
    if recipe.unlearn is not None:
        steps.append(Step(UNLEARNED, "weigh and negate it (PerTA)", _unlearn, ("unlearn", "forget_adapter"), made))
        made = (UNLEARNED,)
    if recipe.train is not None:
        made = (TRAINED,)
        steps.append(Step(*made, "train an adapter to forget", _train, ("train", "seed")))
    if recipe.refine is not None:
        steps.append(Step(REFINED, "refine it along its input directions", _refine, ("refine",), made))
        made = (REFINED,)
    goal = ("judging.rows", "target_forget_loss", "retain_tolerance")
    return [*steps, Step(ADAPTER, "find the strength that meets the goal", _scale, goal, (BEFORE, *made))]


def own_rows_step(recipe: Recipe) -> list[Step]:
    """The step that comes before all others where the full model writes the rows to keep."""
    if recipe.retain != SELF:
        return []
    settings = ("seed", "judging.batch_size")
    return [Step(OWN_ROWS, "let the full model write the rows to keep", _write_rows, settings, after=_on_own_rows)]


def performed(step: Step, workshop: Workshop) -> Workshop:
    """Do a step. Returns the workshop of the steps after it."""
    step.run(workshop)
    return step.after(workshop)


def _on_own_rows(workshop: Workshop) -> Workshop:
    """The workshop with the rows to keep that the full model wrote."""
    rows, written = workshop.rows, read_rows(workshop.directory / OWN_ROWS)
    return replace(workshop, rows=Rows.of(rows.forget, written, rows.held_out))


def _write_rows(workshop: Workshop) -> None:
    rows = own_rows(workshop.subject(workshop.full), workshop.rows.forget, seed=workshop.recipe.seed)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(workshop.directory / OWN_ROWS, "".join(lines))


def read_values(workshop: Workshop, name: str) -> Any:
    """The content of a file that a step wrote."""
    return json.loads((workshop.directory / name).read_text(encoding="utf-8"))


def target_of(recipe: Recipe, before: dict[str, Any]) -> float | None:
    """The forget loss to reach; None where no model shows how far to go."""
    if recipe.target_forget_loss is not None:
        return recipe.target_forget_loss
    return before["yardstick"]["forget"] if before["yardstick"] else None


def measure_before(workshop: Workshop) -> None:
    """Write the losses of the full model and of the yardstick.

    Raises:
        NumericalError: there is nothing to forget.
    """
    yardstick = workshop.yardstick
    before = {
        "full": workshop.losses(workshop.full),
        "yardstick": None if yardstick is None else workshop.losses(yardstick),
    }
    loss, target = before["full"]["forget"], target_of(workshop.recipe, before)
    if target is not None and loss >= target * (1 - TOLERANCE):
        raise NumericalError(
            f"the forget loss is {loss:.3f} before anything is done, and the goal is {target:.3f}: there is nothing to "
            "forget; check the forget rows and --task-adapter, or name a higher --target-forget-loss"
        )
    write_file(workshop.directory / BEFORE, json.dumps(before, indent=1) + "\n")


def _train_forget_adapter(workshop: Workshop) -> None:
    settings = workshop.recipe.forget_training
    assert settings is not None
    model = train_forget_adapter(
        workshop.model,
        workshop.rows.forget,
        workshop.tokenizer,
        workshop.directory / FORGET_ADAPTER,
        lora_config=LoraSettings(**part_of(settings, LoraSettings)).to_lora_config(),
        max_length=workshop.recipe.max_length,
        show_progress_bar=workshop.show_progress_bar,
        **_trainer_settings(settings, workshop.recipe),
    )
    workshop.detach(model, "forget")


def _trainer_settings(settings: Schedule, recipe: Recipe) -> dict[str, Any]:
    return {
        "seed": recipe.seed,
        "report_to": recipe.report_to or "none",
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_steps,
        "per_device_train_batch_size": settings.batch_size,
    }


def _unlearn(workshop: Workshop) -> None:
    config, output = workshop.recipe.unlearn, workshop.directory / UNLEARNED
    assert config is not None
    forget_adapter = workshop.recipe.forget_adapter or workshop.directory / FORGET_ADAPTER
    with workshop.attached({"forget": forget_adapter}) as model:
        emitted = get_perta_state_dict(
            model,
            config,
            workshop.rows.forget,
            workshop.rows.retain,
            task_adapter=workshop.task,
            tokenizer=workshop.tokenizer,
            checkpoint_dir=_checkpoint(output) if config.weighting != "uniform" else None,
            show_progress_bar=workshop.show_progress_bar,
        )
    emitted.save(output)
    remove_checkpoint(_checkpoint(output))


def _train(workshop: Workshop) -> None:
    settings, output = workshop.recipe.train, workshop.directory / TRAINED
    assert settings is not None
    train_unlearning(
        workshop.model,
        workshop.rows.forget,
        workshop.rows.retain,
        workshop.tokenizer,
        UnlearningSettings(**part_of(settings, UnlearningSettings)),
        output_dir=output,
        held_out=workshop.rows.held_out,
        task_adapter=workshop.task,
        lora_config=LoraSettings(**part_of(settings, LoraSettings)).to_lora_config(),
        dtype=settings.dtype,
        max_length=workshop.recipe.max_length,
        checkpoint_dir=_checkpoint(output),
        show_progress_bar=workshop.show_progress_bar,
        **_trainer_settings(settings, workshop.recipe),
        gradient_accumulation_steps=settings.accumulation_steps,
        **evaluation_arguments(settings.eval_steps),
    )
    remove_checkpoint(_checkpoint(output))


def _checkpoint(output: Path) -> Path:
    return output.with_name(f"{output.name}.checkpoint")


def _refine(workshop: Workshop) -> None:
    with workshop.attached({"unlearn": _made(workshop, refined=False)}) as model:
        refine_adapter(
            model,
            "unlearn",
            workshop.rows.forget,
            workshop.rows.retain,
            workshop.recipe.refine,
            task_adapter=workshop.task,
            tokenizer=workshop.tokenizer,
            show_progress_bar=workshop.show_progress_bar,
        ).save(workshop.directory / REFINED)


def _made(workshop: Workshop, *, refined: bool) -> Path:
    """The last adapter before its strength was sought."""
    made = TRAINED if workshop.recipe.train is not None else UNLEARNED
    return workshop.directory / (REFINED if refined else made)


def _scale(workshop: Workshop) -> None:
    """Write the adapter at the strength that meets the goal.

    Forgetting comes first: where the target is reached beyond the retain tolerance, the adapter is that of the target.
    Where no strength reaches it, it is the one that forgets most within the tolerance; where none costs as much as
    that, it is the adapter as it was made.
    """
    recipe, output = workshop.recipe, workshop.directory / ADAPTER
    made = _made(workshop, refined=recipe.refine is not None)
    target = target_of(recipe, read_values(workshop, BEFORE))
    goals = [Goal(target_forget_loss=target)] if target is not None else []
    emitted = load_emitted(made)
    with workshop.attached({"unlearn": made}) as model:
        for goal in (*goals, Goal(retain_tolerance=recipe.retain_tolerance)):
            try:
                emitted = _at_goal(workshop, model, emitted, goal)
                break
            except NumericalError as error:
                note(f"this goal cannot be met: {error}")
    emitted.save(output)
    calibration = calibration_of(emitted)
    if calibration is not None:
        draw_calibration(calibration, output / PICTURE_NAME)


def calibration_of(emitted: EmittedAdapter) -> Calibration | None:
    """The search for the adapter's strength; None where no goal could be met."""
    return getattr(emitted.provenance, "calibration", None)


def _at_goal(workshop: Workshop, model: Any, emitted: EmittedAdapter, goal: Goal) -> EmittedAdapter:
    search = {
        "with_adapters": workshop.full,
        "batch_size": workshop.recipe.judging.batch_size,
        "show_progress_bar": workshop.show_progress_bar,
    }
    if not isinstance(emitted.provenance, PerTAProvenance):
        return extrapolate_adapter(model, "unlearn", "auto", goal=goal, **workshop.judged, **search)
    calibration = calibrate(
        model,
        goal,
        **workshop.judged,
        adapter_name="unlearn",
        retain_only=[workshop.retain_only] if workshop.retain_only else None,
        **search,
    )
    return emitted.scaled(calibration.strength).with_calibration(calibration)
