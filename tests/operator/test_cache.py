"""The cache believes the newest word only."""

from __future__ import annotations

from dataclasses import dataclass

from tuneward_operator.cache import Cache, ObjectKey


@dataclass(frozen=True)
class Thing:
    key: ObjectKey
    uid: str
    version: int
    owner: ObjectKey | None = None


OWNER = ObjectKey("team", "bot")


def thing(name: str = "x", version: int = 1, uid: str = "u1", owner: ObjectKey | None = OWNER) -> Thing:
    return Thing(ObjectKey("team", name), uid, version, owner)


def test_an_older_word_changes_nothing() -> None:
    cache: Cache[Thing] = Cache()
    assert cache.put(thing(version=5))
    assert not cache.put(thing(version=4))
    assert cache.get("team", "x") == thing(version=5)


def test_what_was_seen_deleted_never_comes_back_but_its_successor_does() -> None:
    cache: Cache[Thing] = Cache()
    cache.put(thing())
    cache.remove(ObjectKey("team", "x"), "u1")
    assert not cache.put(thing(version=9))
    assert cache.put(thing(version=10, uid="u2"))
    assert cache.remove(ObjectKey("team", "x"), "u1") is None
    assert len(cache) == 1


def test_a_list_takes_away_only_what_it_could_have_shown() -> None:
    cache: Cache[Thing] = Cache()
    cache.put(thing("old", version=3))
    cache.put(thing("kept", version=4, uid="u2"))
    cache.put(thing("made-after-the-list", version=12, uid="u3"))
    gone = cache.retain({ObjectKey("team", "kept")}, version=10, namespace=None)
    assert [value.key.name for value in gone] == ["old"]
    assert sorted(value.key.name for value in cache) == ["kept", "made-after-the-list"]


def test_a_list_of_one_namespace_says_nothing_of_another() -> None:
    cache: Cache[Thing] = Cache()
    cache.put(thing())
    assert cache.retain(set(), version=10, namespace="other") == []


def test_children_are_found_by_owner_and_follow_a_change_of_owner() -> None:
    cache: Cache[Thing] = Cache()
    cache.put(thing("b", uid="u2"))
    cache.put(thing("a"))
    assert [value.key.name for value in cache.owned(OWNER)] == ["a", "b"]
    other = ObjectKey("team", "other")
    cache.put(thing("a", version=2, owner=other))
    assert [value.key.name for value in cache.owned(OWNER)] == ["b"]
    assert [value.key.name for value in cache.owned(other)] == ["a"]
