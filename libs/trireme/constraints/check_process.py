"""`python -m trireme.constraints.check_process`: compiles constraints where that may take for ever.

A line of JSON in, a line of JSON out. Whoever starts it may kill it at any time; by itself it dies when a
constraint takes more than `CPU_S` of the processor's time or too much memory, and ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import math
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Final

from llguidance import LLTokenizer

from trireme.constraints.compiling import compiled, open_tokens
from trireme.constraints.constraint import Constraint, ConstraintKind
from trireme.errors import TriremeError

CPU_S: Final = 2
"""For one constraint; the tokenizer is read before."""
MEMORY_BYTES: Final = 4 << 30
TOKENIZERS: Final = 8
"""Kept open."""
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    opened: dict[str, LLTokenizer] = {}
    for line in sys.stdin:
        print(json.dumps({"fault": _fault(json.loads(line), opened)}), flush=True)


def _fault(asked: dict[str, Any], opened: dict[str, LLTokenizer]) -> str:
    """What is wrong with a constraint; empty: nothing."""
    key = json.dumps(asked["tokens"])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        if key not in opened:
            if len(opened) == TOKENIZERS:
                opened.clear()
            checkpoint, vocab_size, eos = asked["tokens"]
            opened[key] = open_tokens(Path(checkpoint), vocab_size=vocab_size, eos_token_ids=eos)
        used = resource.getrusage(resource.RUSAGE_SELF)
        latest_s = math.ceil(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (latest_s, hard))
        compiled(Constraint(ConstraintKind(asked["kind"]), asked["text"]), opened[key])
    except TriremeError as error:
        return error.message
    except MemoryError:
        return f"the {asked['kind']} takes too much memory to compile"
    return ""


if __name__ == "__main__":
    main()
