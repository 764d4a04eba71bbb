"""Writes the Chit-Chat Challenge's conversations (package chitchat-dataset, MIT) as messages, with some held out.

    python examples/chitchat/make.py DIR [--held-out 200] [--conversations N]

gives DIR/training.jsonl and DIR/validation.jsonl. Two people talk: who begins is the user, the other the assistant.
A conversation is whole on one side, chosen by its id, so that the same call always writes the same files; what was said
more than once is there once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any


def main() -> None:
    options = arguments()
    found = json.loads((resources.files("chitchat_dataset") / "dataset.json").read_text())
    names = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    talks = [messages for name in names if (messages := list(talk(found[name]["messages"])))]
    lines = list(dict.fromkeys(json.dumps({"messages": messages}, ensure_ascii=False) for messages in talks))
    held, trained = lines[: options.held_out], lines[options.held_out :][: options.conversations]
    options.folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("training", trained), ("validation", held)):
        file = options.folder / f"{part}.jsonl"
        file.write_text("".join(f"{line}\n" for line in chosen))
        print(f"{file}: {len(chosen)} conversations")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--held-out", type=int, default=200, metavar="N", help="conversations for validation")
    parser.add_argument("--conversations", type=int, metavar="N", help="conversations for training; default: all others")
    return parser.parse_args()


def talk(turns: list[list[dict[str, Any]]]) -> Iterator[dict[str, str]]:
    """The turns as messages, up to the assistant's last: nothing after it would be learnt. A turn is what one person
    wrote until the other did, and an empty one ends the conversation."""
    said = [" ".join(part["text"].strip() for part in turn).strip() for turn in turns]
    said = said[: said.index("") if "" in said else len(said)]
    for index, text in enumerate(said[: len(said) // 2 * 2]):
        yield {"role": "assistant" if index % 2 else "user", "content": text}


if __name__ == "__main__":
    main()
