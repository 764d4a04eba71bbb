"""What is served is never packed, but PEFT imports bitsandbytes wherever that is installed, and with it torch's compiler: a
fifth of what the engine needs to start. None in its place makes it look absent."""

import sys

sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
