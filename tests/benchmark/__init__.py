"""The benchmark: the relay beside nchan, a naive asyncio relay, sse-relay-server, and the limit in C.

`servers` starts what is measured, `measure` has the load and the instruments, `works` says what is done
to each server, `report` holds the bars and prints the tables.
"""
