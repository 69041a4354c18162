"""Imported by Python at its start where PYTHONPATH names this folder: DeepSpeed's launchers, of which the tests start thirty, import
without looking for garbage, as our commands do by themselves; that spares a third of a start. What they start is as it is elsewhere.
"""

import gc
import sys

if "deepspeed.launcher.launch" in sys.orig_argv or any(word.endswith("/deepspeed") for word in sys.orig_argv[:2]):
    gc.disable()
