r"""Upload an adapter to the Hugging Face Hub, into a repository that is private unless --public is given. It needs an
adapter that another command wrote, and a token that may write there, from `hf auth login` or in HF_TOKEN.

Example:
  peft-perta push calibrated_adapter my-org/forgets-it
"""

from __future__ import annotations

import argparse

from ..adapters import push_adapter


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", metavar="DIR", help="a directory of an adapter that a command of peft-perta wrote")
    parser.add_argument("name", metavar="ORG/NAME", help="the repository's name on the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="let everyone read it (default: private)")


def run(options: argparse.Namespace) -> None:
    """Upload the adapter."""
    address = push_adapter(options.adapter, options.name, public=options.public)
    print(f"It is in {address}{'' if options.public else ', private'}")
