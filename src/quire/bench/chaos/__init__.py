"""`quire chaos`: disturb a server that it starts itself, and check after each fault that nothing is lost.

options.py      what a run is asked to do
server.py       the server as a child process, and its folder
processes.py    its processes, their memory and descriptors, from /proc
workload.py     the requests, and the answers of a server that is not disturbed
wire.py         one request on a connection of its own, and how it ended
load.py         clients that send requests while a fault strikes
faults/         a family: one small class per fault, and a registry
clock.py        the wall clock of the server's processes (clock.c)
invariants.py   what must hold after a fault; pure functions
growth.py       whether memory or descriptors grow over the run
run.py          the run
report.py       its JSON and its summary
"""
