"""etcd, by its JSON gateway: one lease for a client, as its own library's sessions have, and a transaction a key.

So one keep-alive renews all that a client holds, and revoking the lease frees all. A key's create_revision can serve
as a fencing token; etcd checks it only for what is written to etcd.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from benchmarks.contestant import AT_ITS_DEFAULT, OF_LEASES, TTL_S, Client, Contestant, Opener
from benchmarks.servers import Servers

DEFAULT_TTL_S = 60
"""Of a session of etcd's own client library."""


class LeaseGone(RuntimeError):
    """The lease that was named has ended."""


class EtcdClient(Client):
    def __init__(self, port: int, ttl_s: float | None) -> None:
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.ttl_s = int(DEFAULT_TTL_S if ttl_s is None else ttl_s)
        self.lease: str | None = None

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        self.connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        if response.status == 404:
            raise LeaseGone(f"etcd answered {answer}")
        if response.status != 200:
            raise RuntimeError(f"etcd answered {response.status}: {answer}")
        return answer

    def take(self, streams: Sequence[str]) -> str:
        for stream in streams:
            assert self.acquire(stream) is not None
        assert self.lease is not None
        return self.lease

    def renew(self, held: str) -> None:
        assert int(self._ask("lease/keepalive", ID=held)["result"].get("TTL", 0)) > 0

    def let_go(self, held: str) -> None:
        self._ask("lease/revoke", ID=held)
        self.lease = None

    def acquire(self, stream: str) -> str | None:
        if self.lease is None:
            self.lease = self._ask("lease/grant", TTL=self.ttl_s)["ID"]
        key = base64.b64encode(stream.encode()).decode()
        try:
            answer = self._ask(
                "kv/txn",
                compare=[{"key": key, "target": "CREATE", "result": "EQUAL", "createRevision": "0"}],
                success=[{"requestPut": {"key": key, "value": "", "lease": self.lease}}],
            )
        except LeaseGone:  # it has waited for longer than its own lasts
            self.lease = None
            return None
        return key if answer.get("succeeded") else None

    def release(self, grant: str) -> None:
        assert self._ask("kv/deleterange", key=grant).get("deleted") == "1"

    def hold(self, streams: Sequence[str]) -> str:
        held = self.take(streams)
        keeper = EtcdClient(self.port, self.ttl_s)

        def keep() -> None:
            while not threading.Event().wait(self.ttl_s / 3):
                keeper.renew(held)

        threading.Thread(target=keep, daemon=True).start()
        return held

    def close(self) -> None:
        if self.lease is not None:
            with suppress(LeaseGone):  # one that only waits does not keep its own alive
                self.let_go(self.lease)
        self.connection.close()


class Etcd(Contestant):
    name = "etcd"
    title = "etcd lease + transaction"
    durability = "fsync"
    not_for: ClassVar[Mapping[str, str]] = {
        **AT_ITS_DEFAULT,
        **OF_LEASES,
        "heartbeat": "one keep-alive renews all keys of a process, however many",
        "fenced": "its revisions fence only what is written to etcd",
    }

    def start(self, servers: Servers) -> None:
        self.port, self.server = servers.etcd

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(EtcdClient, self.port, ttl_s)

    def abandon(self, streams: Sequence[str]) -> None:
        """What has expired in etcd is gone."""
        client = EtcdClient(self.port, TTL_S)
        client._ask(
            "kv/deleterange",
            key=base64.b64encode(min(streams).encode()).decode(),
            range_end=base64.b64encode((max(streams) + "\0").encode()).decode(),
        )
        client.close()
