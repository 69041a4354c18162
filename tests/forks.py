"""One server for the whole suite from which tests fork processes that have what takes seconds to import behind them.

A process of Python has one such server, whoever asks first: so there is one list of what it imports.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forks_imports"])
