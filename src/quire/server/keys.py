"""Who may send requests, and how much: API keys, their tenants, and the file that lists both.

A tenant is who shares: its requests wait in one queue of a fair schedule, count against its quotas, and find
each other's KV in the prefix cache. It may have several keys. The file holds keys' SHA-256 digests only. It
is read again when its content changes; one with a mistake is not used, and the old keys stay.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
import tomllib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError
from quire.placement import Placement
from quire.server.quotas import Quotas

logger = logging.getLogger(__name__)

ENVIRONMENT = ("QUIRE_API_KEY", "VLLM_API_KEY")
ADMIN_ENVIRONMENT = "QUIRE_ADMIN_API_KEY"
CHECK_SECONDS = 1.0
"""Between two looks at the file."""
MOST_BYTES = 4 << 20
MOST_TENANTS = 1000
"""Each has values in /metrics."""

_Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
_Limit = Annotated[int, msgspec.Meta(ge=1)] | None


class TenantOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=1000)] = 1.0
    """Its share of the work, relative to others', while they all have requests waiting."""
    best_priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] = 0
    """A request's `priority` below it counts as this one."""
    rpm: _Limit = None
    """Requests a minute."""
    tpm: _Limit = None
    """Tokens a minute, of prompts and answers."""
    concurrency: _Limit = None
    """Requests at a time."""
    shared_cache: bool = False
    """Whether its requests may find KV of other tenants with this option."""


class _KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-fA-F]{64}\Z")]
    tenant: _Name
    expires: Any = None
    """RFC 3339, or a date: its first second in UTC."""
    name: str = ""
    """For people."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_KeyEntry]
    tenants: dict[_Name, TenantOptions] = {}


class Tenant:
    def __init__(self, name: str) -> None:
        """Without limits, until `change`."""
        self.name = name
        self.owner = hashlib.sha256(name.encode("utf-8")).digest()
        self.quotas = Quotas()

    def change(self, options: TenantOptions, *, salts: bool) -> None:
        """What it has used stays. salts: whether the prefix cache separates it from others."""
        self.options = options
        self._space = self.name if salts and not options.shared_cache else ""
        self.quotas.change(options.rpm, options.tpm, options.concurrency)

    def place(self, asked: Placement) -> Placement:
        """What a request may have of what it asks for."""
        salt = asked.cache_salt
        return msgspec.structs.replace(
            asked,
            tenant=self.name,
            weight=self.options.weight,
            priority=max(asked.priority, self.options.best_priority),
            cache_salt=f"{self._space}/{salt}" if salt else self._space or None,
        )


@dataclass(frozen=True, slots=True)
class Key:
    tenant: Tenant
    expires: float | None = None
    """By `time.time()`."""


class Keys:
    """All keys that are accepted. Those of the file change while the server runs."""

    def __init__(self, plain: Iterable[str] = (), path: Path | None = None) -> None:
        """plain: keys from flags, each a tenant of its own. Raises `ConfigError` for a key that is empty,
        which would not protect, and for a file that cannot be read or has a mistake."""
        self.path = path
        self._used = self._refused = b""
        """The file's content that is in use, and the one that was refused last."""
        self.is_current = True
        """Whether the file, as it is now, is in use."""
        self.tenants: dict[str, Tenant] = {}
        self._plain: dict[bytes, Key] = {}
        plain = list(dict.fromkeys(plain))
        for text in plain:
            if not text.strip():
                raise ConfigError("api_key must not be empty. Leave it out to serve without keys.")
            digest = key_digest(text.encode("utf-8"))
            salts = len(plain) > 1 or path is not None
            tenant = Tenant(f"key-{digest.hex()[:16]}")
            tenant.change(TenantOptions(), salts=salts)
            self._plain[digest] = Key(tenant)
        self._keys = self._plain
        if path is not None:
            self.use(read(path))
        else:
            self.tenants = {key.tenant.name: key.tenant for key in self._plain.values()}

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._plain) or self.path is not None

    def find(self, given: bytes) -> Key | None:
        """The key, if it is one and has not expired. What is looked up is a digest, so the time that it takes
        says nothing about keys that are similar."""
        key = self._keys.get(key_digest(given))
        if key is not None and key.expires is not None and time.time() >= key.expires:
            return None
        return key

    def use(self, content: bytes) -> None:
        """Replace the file's keys. Raises `ConfigError`, and changes nothing then."""
        parsed = _parse(content, str(self.path))
        tenants = {key.tenant.name: key.tenant for key in self._plain.values()}
        for name, options in parsed.tenants.items():
            tenant = tenants[name] = self.tenants.get(name) or Tenant(name)
            tenant.change(options, salts=True)
        keys = dict(self._plain)
        for entry in parsed.keys:
            keys[bytes.fromhex(entry.sha256)] = Key(tenants[entry.tenant], _time_of(entry.expires))
        self.tenants, self._keys, self._used = tenants, keys, content

    def uses(self) -> Mapping[str, Quotas]:
        """By the tenant's name."""
        return {name: tenant.quotas for name, tenant in self.tenants.items()}

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Meanwhile, changes of the file take effect. They are seen by its content, not by its time or inode:
        a Kubernetes Secret changes by a link above it."""
        task = asyncio.ensure_future(self.follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def follow(self) -> None:
        """As long as it is not cancelled."""
        while self.path is not None:
            await asyncio.sleep(CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        assert self.path is not None
        content = b""
        try:
            content = await asyncio.to_thread(read, self.path)
            if content != self._used and content != self._refused:
                self.use(content)
                logger.info("API keys: %d of %d tenants", len(self._keys), len(self.tenants))
        except ConfigError as error:
            if self.is_current or content != self._refused:
                logger.error("API keys stay as they were: %s", error)
            self._refused = content
        self.is_current = content == self._used


def configured_keys(config: ServerConfig, environ: Mapping[str, str]) -> Keys:
    """From flags, environment and file. Raises `ConfigError`."""
    plain = (*config.api_key, *(environ[name] for name in ENVIRONMENT if environ.get(name)))
    path = Path(config.api_keys_file) if config.api_keys_file else None
    return Keys(plain, path)


def configured_admin_keys(config: ServerConfig, environ: Mapping[str, str], keys: Keys) -> Keys:
    """Those of the admin endpoints, which must differ from clients' `keys`. Raises `ConfigError`."""
    plain = list(config.admin_api_key)
    if environ.get(ADMIN_ENVIRONMENT):
        plain.append(environ[ADMIN_ENVIRONMENT])
    for text in plain:
        if not text.strip():
            raise ConfigError("admin_api_key must not be empty.")
        if keys.find(text.encode("utf-8")) is not None:
            raise ConfigError("admin_api_key: the same key is a client's. Choose another.")
    return Keys(plain)


def entry_for(key: str, *, tenant: str, name: str = "", expires: str = "") -> str:
    """The lines of the file for a key. Raises `ConfigError`."""
    lines = [
        "[[keys]]",
        f'sha256 = "{key_digest(key.encode("utf-8")).hex()}"',
        f"tenant = {msgspec.json.encode(tenant).decode()}",
    ]
    if name:
        lines.append(f"name = {msgspec.json.encode(name).decode()}")
    if expires:
        lines.append(f"expires = {expires}")
    text = "\n".join(lines) + "\n"
    _parse(text.encode("utf-8"), "the new entry")
    return text


def with_fair_shares(config: EngineConfig, keys: Keys) -> EngineConfig:
    """The fair policy where there may be several tenants, unless another is asked for."""
    several = keys.path is not None or len(keys.tenants) > 1
    if not several or config.scheduler.scheduling_policy != "auto":
        return config
    scheduler = dataclasses.replace(config.scheduler, scheduling_policy="fair")
    return dataclasses.replace(config, scheduler=scheduler)


def key_digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read(path: Path) -> bytes:
    """Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"api_keys_file: {path} cannot be read ({error.strerror}).") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"api_keys_file: {path} is larger than {MOST_BYTES} bytes.")
    return content


def _parse(content: bytes, where: str) -> _File:
    """TOML, or JSON if it begins like that. Raises `ConfigError`."""
    try:
        text = content.decode("utf-8")
        is_json = text.lstrip().startswith("{")
        file = msgspec.convert(msgspec.json.decode(text) if is_json else tomllib.loads(text), _File)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.MsgspecError) as error:
        raise ConfigError(f"api_keys_file: {where}: {error}.") from None
    tenants = dict(file.tenants)
    seen: set[str] = set()
    for number, entry in enumerate(file.keys):
        digest = entry.sha256.lower()
        if digest in seen:
            raise ConfigError(f"api_keys_file: {where}: keys[{number}] is there twice.")
        seen.add(digest)
        tenants.setdefault(entry.tenant, TenantOptions())
        try:
            _time_of(entry.expires)
        except ValueError as error:
            raise ConfigError(f"api_keys_file: {where}: keys[{number}].expires: {error}.") from None
    if len(tenants) > MOST_TENANTS:
        raise ConfigError(f"api_keys_file: {where}: more than {MOST_TENANTS} tenants.")
    return _File(file.keys, tenants)


def _time_of(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("a date and time, like 2027-01-31T12:00:00Z, is expected")
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
