"""Can it still recite the book, answer about it, and be told to have read it?

A small MUSE: the task adapter learns passages of two books and answers about them, a retain-only model adapter one book alone,
and a negative adapter takes the other book out of the first, as strongly as the rows to keep allow. The muse suite
judges the model before and after, and the retain-only model, which never saw what should go.

    python examples/05_muse.py [--output muse]
"""

import argparse
import json
from pathlib import Path

from peft_perta import (
    PerTAConfig,
    attach_adapters,
    evaluate,
    get_perta_state_dict,
    load_base,
    save_perta_adapter,
    train_forget_adapter,
)
from peft_perta.comparison import ASSETS
from peft_perta.data import spread

DATA = Path(__file__).resolve().parent / "muse_books"
METRICS = ("forget_verbmem_ROUGE", "extraction_strength", "forget_knowmem_ROUGE", "privleak", "retain_knowmem_ROUGE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("muse"))
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--retain-tolerance", type=float, default=0.3, help="what forgetting may cost, nats per token")
    parser.add_argument("--rows", type=int, help="so many of each file are learned and asked; all by default")
    options = parser.parse_args()

    rows = {}
    for name in ("forget", "retain"):
        texts = json.loads((DATA / "privleak" / f"{name}.json").read_text())
        questions = json.loads((DATA / "knowmem" / f"{name}_qa.json").read_text())
        count = options.rows or len(texts)
        rows[name] = [{"text": text} for text in spread(texts, count)] + spread(questions, count)
    model, tokenizer = load_base(str(ASSETS / "base"))
    learned = {"task": rows["forget"] + rows["retain"], "retain-only": rows["retain"], "learned": rows["forget"]}
    for name, learned_rows in learned.items():
        model = train_forget_adapter(
            model,
            learned_rows,
            tokenizer,
            adapter_name=name,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            logging_strategy="no",
        )
    lora_config, state_dict, provenance = get_perta_state_dict(
        model,
        PerTAConfig(strength="auto", retain_tolerance=options.retain_tolerance),
        rows["forget"],
        rows["retain"],
        forget_adapter="learned",
        task_adapter="task",
        tokenizer=tokenizer,
    )
    print(provenance)
    save_perta_adapter(options.output / "adapter", lora_config, state_dict, provenance)
    attach_adapters(model, {"negative": options.output / "adapter"})

    stacks = {"retain-only": ["retain-only"], "before": ["task"], "after": ["task", "negative"]}
    logs = {}
    for name, stack in stacks.items():
        found = evaluate(
            model,
            tokenizer,
            {"muse": DATA},
            adapters=stack,
            retain_only_logs={"muse": logs["retain-only"]} if logs else None,
            rows=options.rows,
            output_dir=options.output / name,
        )
        logs[name] = found["muse"]
    print(f"{'':<10}" + "".join(f"{metric:>22}" for metric in METRICS))
    for name in ("before", "after", "retain-only"):
        print(f"{name:<10}" + "".join(f"{logs[name][metric]['agg_value']:>22.3f}" for metric in METRICS))


if __name__ == "__main__":
    main()
