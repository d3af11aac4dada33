"""The whole relay in simulated time: a seed decides everything that happens, and names it.

    python tests/simulation --seeds 1000

The real program runs, from `Relay.run` down, with aiohttp, aiopg and asyncio's own transports. Put in
the place of what surrounds it: time and sockets (`kernel`), PostgreSQL (`postgres`), clients
(`clients`), and publishers and faults (`world`), drawn from a seed (`plan`). What happened is a history
of records that JSON can hold, and `checker` judges it without knowing the program.
"""
