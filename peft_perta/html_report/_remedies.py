"""The commands that fill in what a page lacks."""

_EVALUATE = "peft-perta evaluate --model MODEL --adapter DIR --suite NAME=PATH --output DIR"

UNLEARN = "peft-perta unlearn ... --html-report"
SEARCH_STRENGTH = "peft-perta unlearn ... --strength auto --target-forget-loss LOSS --html-report"
COMPARE_STRENGTHS = "peft-perta calibrate ... --forget-adapter DIR --retain-only-adapter DIR"
EVALUATE = f"{_EVALUATE} --html-report"
EVALUATE_FULL = f"{_EVALUATE} --full --html-report"
EVALUATE_RETAIN_ONLY_ADAPTER = f"{_EVALUATE} --retain-only-adapter DIR --html-report"
EVALUATE_RETAIN_ONLY = f"{_EVALUATE} --retain-only-log JSON --html-report"
ATTACK = f"{_EVALUATE} --attacks all --html-report"
