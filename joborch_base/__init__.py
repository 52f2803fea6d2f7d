"""What the program is built on: settings, files, the database, HTTP, executors. No module of this package imports `joborch`.

Each module imports only those above it in this list:

    vocabulary    constants, errors and small functions that several modules share; the table of plug-ins
    settings      every setting with its reader, and the configuration that they make
    logs          the log: lines for people, or one JSON object each
    files         files and folders: checked names, durable writes, removal
    data_folder   the folder of a server or client, whom it trusts, and its disk space
    states        the states of a job and its legal moves; every reason why a job ends
    scheduling    whose turn it is, which client gets a job, why a job waits: pure functions
    elastic       which cloud instances are wanted: a pure function
    threads       loops and the pools of threads that they run in
    archives      ZIP files, and transfers between server and client
    processes     what /proc says of processes
    identity      who the peer of a connection is
    routes        the declaration of routes, access to them, and HTTP requests
    connections   the HTTP server: every connection, and who may have one
    calls         HTTP calls to clients, also those that a client fetches
    executors     what every executor does: the wrapper, exit files, inherited variables; what a client knows of its payloads
    cgroups       control groups of payloads
    usage         what payloads use, and which of them use too much
    local         the executor that runs payloads on this machine
    statements    all SQL
    database      the connection that writes, the schema, steady time
    store         the jobs table: moves, accounts, claims
    access        whose job is whose: what each caller may see
    tokens        the tokens of a server, and for whom they stand
    weak_setups   what in the settings lets other users in
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - it is parsed by 3.8 as well, which has no list[str]
    sys.exit(f"joborch needs Python 3.9 or later, and this is {sys.version.split()[0]}: start it with a newer one")
