"""Metrics, health and the console, over HTTP; the extra ``http`` brings what it needs.

It runs in threads of its own and reads what the daemon keeps in memory (:mod:`cdc.fleet`): a scrape asks no database,
and a database that does not answer keeps no page waiting, except ``/api/status``, which is what `cdc status` prints.
When its port is taken or it fails, changes are delivered all the same.

Why waitress: it is small, pure Python, without dependencies, and a server in earnest: one thread reads all sockets
with limits on sizes and times, so a client that dribbles holds up nobody, and a few threads run the pages. An asyncio
server would bring an event loop and four packages into a program of threads; the standard library's server gives each
connection a thread, without a limit.

Who may do what. Reading needs no token: by default only this machine can reach it, and row values are not shown unless
`show_values` allows. With a token configured, whatever shows row values needs it too. Changing something always needs
the token, in a header that no other site's page can make a browser send. While it listens on loopback, requests by any
other host name are refused, so that no name that was pointed here (DNS rebinding) reads along.
"""

from __future__ import annotations

from cdc.http.server import Server

__all__ = ["Server"]
