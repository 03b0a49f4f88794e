"""The main job, live, on real data: TOFU's fictitious authors, and a small Llama that knows them."""

from .run import ASSETS, DemoSettings, run_demo

__all__ = ["ASSETS", "DemoSettings", "run_demo"]
