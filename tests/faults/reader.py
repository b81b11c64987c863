"""A process that reads through a client of its own and writes down what it sees: python reader.py NAME FILE SECONDS KEY…

Its settings come from the environment. SIGUSR1 blocks its event loop for SECONDS.
"""

import asyncio
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from actors import Observed
from history import History

from cacheinval import Client


async def main(name: str, notes: str, seconds: str, *keys: str) -> None:
    with open(notes, "a", buffering=1) as sink:
        history = History(sink)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: time.sleep(float(seconds)))
        async with Client() as client:
            observed = Observed(name, client, history, keys)
            await asyncio.gather(observed.keep_telling(), observed.keep_reading(0.01))


asyncio.run(main(*sys.argv[1:]))
