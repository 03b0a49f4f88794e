"""Can it still recite the book, answer about it, and be told to have read it?

A small MUSE benchmark. The task adapter learns passages of two books and answers about them; the retain-only adapter
learns one of the books. A negative adapter removes the other book, as strongly as the loss on retain rows allows. The
muse suite judges the full, the unlearned and the retain-only model.

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
    parser.add_argument(
        "--retain-tolerance", type=float, default=0.3, help="rise of the retain loss that is allowed, in nats per token"
    )
    parser.add_argument("--rows", type=int, help="rows of each file to learn and to judge (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length of a generated answer (default: 200)")
    options = parser.parse_args()

    rows = {}
    for name in ("forget", "retain"):
        texts = json.loads((DATA / "privleak" / f"{name}.json").read_text(encoding="utf-8"))
        questions = json.loads((DATA / "knowmem" / f"{name}_qa.json").read_text(encoding="utf-8"))
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

    stacks = {"retain-only": ["retain-only"], "full": ["task"], "unlearned": ["task", "negative"]}
    logs = {}
    for name, stack in stacks.items():
        logs[name] = evaluate(
            model,
            tokenizer,
            {"muse": DATA},
            adapters=stack,
            retain_only_logs={"muse": logs["retain-only"]} if logs else None,
            rows=options.rows,
            max_new_tokens=options.max_new_tokens,
            output_dir=options.output / name,
        )["muse"]
    print(f"{'':<12}" + "".join(f"{metric:>22}" for metric in METRICS))
    for name in ("full", "unlearned", "retain-only"):
        print(f"{name:<12}" + "".join(f"{logs[name][metric]['agg_value']:>22.3f}" for metric in METRICS))


if __name__ == "__main__":
    main()
