"""The tokens of a server: for whom each stands, what its holder may do, and until when.

1. Token store
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import threading
from typing import NamedTuple

from joborch_base import statements
from joborch_base.identity import TOKEN_PREFIX, is_whole_token, link_key, new_token
from joborch_base.routes import Caller
from joborch_base.store import Store
from joborch_base.vocabulary import Clock, HttpError, rfc3339

# == 1. Token store ==  Only digests are stored. All tokens are in memory, so that checking one never waits for the database.


class StoredToken(NamedTuple):
    """A row of the table `tokens`."""

    name: str
    role: str  # one of routes.ROLES
    services: str  # separated by commas; empty: all
    user_id: int | None  # of the role user
    digest: str  # SHA-256 of the token's text, in hex
    key: str | None  # of the role client: what its link's MACs are made with (see `link_key`), in hex
    created_at: float  # wall time
    expires_at: float | None
    instance: str | None  # of the client that has it
    once: int = 0  # 1: its client must replace it before it can do anything else

    @property
    def session_key(self) -> bytes:
        """The key of the MACs in cookies that stand for this token."""
        return hmac.new(bytes.fromhex(self.digest), b"joborch session 1", "sha256").digest()

    def caller(self, proof: str) -> Caller:
        """Return the caller that this token stands for; `proof` says how it was shown, as in Caller."""
        return Caller(self.name, proof, self.role, tuple(filter(None, self.services.split(","))), self.user_id, self.digest)


class TokenStore:
    """The tokens that `joborch token add` made, which a server keeps in its database. A client has none."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store, self.clock, self.lock = store, clock, threading.Lock()
        rows = [StoredToken(*row) for row in store.read(statements.TOKEN_ALL)] if store.mode == "server" else []
        self.by_name = {token.name: token for token in rows}
        self.by_digest = {token.digest: token for token in rows}

    def __bool__(self) -> bool:
        """Tell whether there is any token."""
        return bool(self.by_name)

    def add(self, name: str, role: str, services: str, user_id: int | None, lives_s: float | None, once: bool = False) -> str:
        """Store a new token durably, and return its text, which is kept nowhere. Raises HttpError 409 if the name is taken.

        One that works `once` has to be replaced by its client (`renew`).
        """
        text, now = new_token(), self.clock.wall()
        key = link_key(text).hex() if role == "client" else None
        expires_at = None if lives_s is None else now + lives_s
        token = StoredToken(name, role, services, user_id, digest_of(text), key, now, expires_at, None, int(once))
        with self.lock:
            try:
                self.store.write(lambda db: db.execute(statements.TOKEN_ADD, token._asdict()).rowcount)
            except sqlite3.IntegrityError as error:
                remedy = f"revoke it with `joborch token revoke {name}`, or choose another name"
                raise HttpError(409, f"there is a token called {name}: {remedy}", "name") from error
            self.by_name[name] = self.by_digest[token.digest] = token
        return text

    def revoke(self, name: str) -> bool:
        """Delete a token durably; it is invalid from now on. Return False if there is none of this name."""
        with self.lock:
            known = self.store.write(lambda db: db.execute(statements.TOKEN_REVOKE, {"name": name}).rowcount == 1)
            token = self.by_name.pop(name, None)
            if token is not None:
                del self.by_digest[token.digest]
        return known

    def bind(self, name: str, instance: str) -> None:
        """Store durably which client has a token: the first one that uses it."""
        with self.lock:
            if self.store.write(lambda db: db.execute(statements.TOKEN_BIND, {"name": name, "instance": instance}).rowcount == 1):
                token = self.by_name[name]._replace(instance=instance)
                self.by_name[name] = self.by_digest[token.digest] = token

    def renew(self, name: str, text: str) -> bool:
        """Replace a token that works once by the one that its client has made, durably. It is valid until it is revoked.

        Return False if it was replaced already.
        """
        new = {"name": name, "digest": digest_of(text), "key": link_key(text).hex()}
        with self.lock:
            is_done = self.store.write(lambda db: db.execute(statements.TOKEN_RENEW, new).rowcount == 1)
            if is_done:
                old = self.by_name[name]
                token = old._replace(digest=new["digest"], key=new["key"], expires_at=None, once=0)
                del self.by_digest[old.digest]
                self.by_name[name] = self.by_digest[token.digest] = token
        return is_done

    def named(self, name: str) -> StoredToken | None:
        """Return the token of this name, or None if there is none or it has expired."""
        token = self.by_name.get(name)
        return None if token is None or self.has_expired(token) else token

    def is_valid(self, caller: Caller | None) -> bool:
        """Tell whether the token that a caller has shown is still valid. Callers without a stored token stay valid."""
        if caller is None or not caller.digest:
            return True
        token = self.named(caller.name)
        return token is not None and token.digest == caller.digest

    def has_expired(self, token: StoredToken) -> bool:
        """Tell whether a token has expired."""
        return token.expires_at is not None and token.expires_at <= self.clock.wall()

    def find(self, text: str) -> tuple[StoredToken | None, str]:
        """Return the valid token with this text and "", or None and the reason, as the beginning of a message."""
        token = self.by_digest.get(digest_of(text))
        if token is not None and self.has_expired(token):
            return None, f"the token {token.name} expired at {rfc3339(token.expires_at)}: ask for a new one"
        if token is not None:
            return token, ""
        if not text.startswith(TOKEN_PREFIX):
            return None, "the token is wrong"
        if "," in text:
            return None, "there are several tokens: send one"
        if not is_whole_token(text):
            return None, f"the token is incomplete or was changed: copy all of it, from {TOKEN_PREFIX} to its end"
        return None, "this server does not know the token: it was revoked, or another server made it"


def digest_of(text: str) -> str:
    """Return the SHA-256 of a token's text, in hex. A token has so many random letters that a fast digest is safe."""
    return hashlib.sha256(text.encode("latin-1", "replace")).hexdigest()
