"""What the operator last saw of one kind, as slim frozen values, newest version only.

Own writes go in at once (`put`), so a pass never forgets what the pass before it made; a late event or list that is older
than what is here changes nothing, and an object that was seen deleted never comes back from a late answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

TOMBSTONES = 4096


class ObjectKey(NamedTuple):
    namespace: str
    name: str


class Seen(Protocol):
    """What every cached value knows of itself."""

    @property
    def key(self) -> ObjectKey: ...
    @property
    def uid(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def owner(self) -> ObjectKey | None: ...


V = TypeVar("V", bound=Seen)


class Cache(Generic[V]):
    def __init__(self) -> None:
        self._items: dict[ObjectKey, V] = {}
        self._owned: dict[ObjectKey, dict[ObjectKey, V]] = {}
        self._dead: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[V]:
        return iter(list(self._items.values()))

    def get(self, namespace: str, name: str) -> V | None:
        return self._items.get(ObjectKey(namespace, name))

    def owned(self, owner: ObjectKey) -> list[V]:
        """All that belong to `owner`, by name."""
        return sorted(self._owned.get(owner, {}).values(), key=lambda value: value.key)

    def put(self, value: V) -> bool:
        """Returns False, and changes nothing, where `value` is older than what is known."""
        known = self._items.get(value.key)
        if value.uid in self._dead or (known is not None and known.version > value.version):
            return False
        if known is not None:
            self._unlink(known)
        self._items[value.key] = value
        if value.owner is not None:
            self._owned.setdefault(value.owner, {})[value.key] = value
        return True

    def remove(self, key: ObjectKey, uid: str | None = None) -> V | None:
        """Drops `key`, or only that `uid` of it. Returns what was dropped."""
        known = self._items.get(key)
        if uid is not None:
            self._bury(uid)
        if known is None or (uid is not None and known.uid != uid):
            return None
        self._bury(known.uid)
        del self._items[key]
        self._unlink(known)
        return known

    def retain(self, keys: set[ObjectKey], version: int, namespace: str | None) -> list[V]:
        """After a list at `version`: drops and returns what the list lacks and is not newer than it."""
        gone = [
            value
            for key, value in self._items.items()
            if key not in keys and value.version <= version and namespace in (None, key.namespace)
        ]
        for value in gone:
            self.remove(value.key)
        return gone

    def _unlink(self, value: V) -> None:
        if value.owner is not None and value.owner in self._owned:
            self._owned[value.owner].pop(value.key, None)
            if not self._owned[value.owner]:
                del self._owned[value.owner]

    def _bury(self, uid: str) -> None:
        self._dead[uid] = None
        while len(self._dead) > TOMBSTONES:
            self._dead.popitem(last=False)
