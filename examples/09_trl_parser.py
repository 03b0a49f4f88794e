"""My settings are in YAML for TRL's parser: how does unlearning go beside TrainingArguments and LoraConfig?

UnlearningSettings is a dataclass that TrlParser and HfArgumentParser read like any other. UnlearningTrainer takes it
beside the TrainingArguments; the LoraConfig comes from TRL's ModelConfig. Both losses are evaluated on the way, on
retain rows that are held out, and training stops where they rise by more than the tolerance.

    python examples/09_trl_parser.py --config examples/09_trl_parser.yaml [--forget_loss simnpo] [--report_to trackio]
"""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config

from peft_perta import UnlearningSettings, UnlearningTrainer, attach_adapters, load_base, stack_adapters
from peft_perta.comparison import ASSETS
from peft_perta.data import read_rows


@dataclass
class Data:
    """What to forget, what to keep, and the adapter that taught the model both."""

    forget: str = field(default=str(ASSETS / "forget.jsonl"), metadata={"help": "the rows to forget"})
    retain: str = field(default=str(ASSETS / "retain.jsonl"), metadata={"help": "the rows to keep"})
    task_adapter: str = field(
        default=str(ASSETS / "task_adapter"), metadata={"help": "what makes the base the full model"}
    )
    rows: int = field(default=40, metadata={"help": "rows of each set, and held-out rows"})


def main() -> None:
    parser = TrlParser((Data, UnlearningSettings, TrainingArguments, ModelConfig))
    data, settings, arguments, of_model = parser.parse_args_and_config()
    forget, retain = read_rows(data.forget)[: data.rows], read_rows(data.retain)
    model, tokenizer = load_base(of_model.model_name_or_path or str(ASSETS / "base"))
    model = attach_adapters(model, {"task": data.task_adapter})
    model.add_adapter("unlearn", get_peft_config(of_model))
    stack_adapters(model, ["task", "unlearn"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".unlearn." in name)
    trainer = UnlearningTrainer(
        model, arguments, forget, retain[: data.rows], processing_class=tokenizer, settings=settings,
        eval_dataset=retain[-data.rows :],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    print(f"\n{'step':>4}{'forget loss':>14}{'held-out loss':>16}")
    for point in trainer.evaluations.points:
        print(f"{point['step']:>4}{point['forget']:>14.3f}{point['retain']:>16.3f}")
    print(
        f"The adapter is in {arguments.output_dir}/unlearn. train_unlearning, as in examples/06_train.py, also writes"
    )
    print("how it was made, and resumes when it is killed.")


if __name__ == "__main__":
    main()
