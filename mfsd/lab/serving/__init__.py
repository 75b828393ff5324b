# SPDX-License-Identifier: Apache-2.0
"""The emulated serving system.

forward.py    the one forward pass            hinter.py, teller.py        what daemons are told, and by whom
conduits.py   it moves bytes by plain TCP     wire.py, management.py      framed bytes; messages between ranks
real.py       ... by gloo and Mooncake        mooncake.py                 Mooncake's transfer engine
driver.py     what drivers get and give
loop.py       one process plays all hosts     processes.py, worker.py     a process per host

There are two drivers since neither can do the other's work. gloo and Mooncake want a process per rank, and only with
processes the demo shows what a host does: serving and daemon side by side, as many threads as there are. But ranks as
processes keep time only as long as there are processors for all of them; with one loop that runs whenever it wants to,
two processors carry sixteen ranks. Everything else - requests, passes, hints, figures - is the same code for both.
"""
