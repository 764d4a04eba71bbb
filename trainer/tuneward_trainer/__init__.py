"""PEFT imports bitsandbytes wherever that is installed, and with it torch's compiler: a fifth of what a process needs to
start, for nothing unless it trains on packed weights. None in its place makes it look absent; `nf4` takes that back."""

import sys

sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
